"""Dilated attention on a GPU: kept rows are gathered side by side, and each branch is one kernel call.

A GPU wants few calls that fill it, where a CPU wants no copies (`longnet_kit.attention.mixture`). Here the rows that a
branch keeps, of all its heads, go into one compact tensor; what the branches give is mixed in one pass over the
sequence, and so are gradients. Compact results of all branches are in memory until then: sum of 1 / r times a tensor's
size, 2 for rates that double.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longnet_kit.attention import flash
from longnet_kit.attention.patterns import HeadOffsets

if TYPE_CHECKING:
    from longnet_kit.attention.compact_kernels import Branch, Heads

MOST_COPIES = 3
"""Most that the branches' compact tensors may hold together, in sizes of the whole tensor."""

_ROUND = 128
_ROUNDED_FROM = 1024


def takes(q: Tensor, lengths: Sequence[int], rates: Sequence[int], causal: bool) -> bool:
    """Whether this way runs: on CUDA, where segments cut the sequence evenly.

    Heads may keep one position less than others, which leaves a row of zeros at the end of a segment: a causal query
    does not see it. Without `causal` the rates must divide the segments.
    """
    tokens = q.shape[1]
    segments = [(min(w, tokens), r) for w, r in zip(lengths, rates, strict=True)]
    return (
        _on_gpu(q)
        and q.dtype in (torch.float16, torch.bfloat16, torch.float32)
        and all(tokens % w == 0 and (causal or w % r == 0) for w, r in segments)
        and sum(1 / r for r in rates) <= MOST_COPIES
        and (found := kernels()) is not None
        and q.shape[:3].numel() * MOST_COPIES <= found.MAX_ROWS
    )


def _on_gpu(q: Tensor) -> bool:
    return q.device.type == "cuda"


@cache
def kernels() -> ModuleType | None:
    """`compact_kernels`, if triton is there."""
    try:
        from longnet_kit.attention import compact_kernels
    except ImportError:
        return None
    return compact_kernels


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    rates: Sequence[int],
    head_offsets: HeadOffsets,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `dilated_op.dilated`; `takes` has said yes."""
    batch, tokens = q.shape[:2]
    run, branches, heads = _plan(tokens, lengths, rates, causal, head_offsets, first_head, total_heads)
    outs, lses = [], []
    for branch in branches:
        (q_, k_, v_), _ = _compact(run, (q, k, v), None, branch, heads)
        out, lse = flash.forward(q_, k_, v_, causal, scale)
        outs.append(out)
        lses.append(lse)
    return run.mix(outs, lses, branches, heads, batch, tokens)


def backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    lengths: Sequence[int],
    rates: Sequence[int],
    head_offsets: HeadOffsets,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `dilated_op.dilated_backward`; `takes` has said yes."""
    batch, tokens = q.shape[:2]
    run, branches, heads = _plan(tokens, lengths, rates, causal, head_offsets, first_head, total_heads)
    parts: tuple[list[Tensor], list[Tensor], list[Tensor]] = [], [], []
    for branch in branches:
        (grad_, q_, k_, v_, out_), lse_ = _compact(run, (grad_out, q, k, v, out), lse, branch, heads)
        assert lse_ is not None
        for of_branches, grad in zip(parts, flash.backward(grad_, q_, k_, v_, out_, lse_, causal, scale), strict=True):
            of_branches.append(grad)
        del grad_, q_, k_, v_, out_, lse_
    dq, dk, dv = (run.add_up(of_branches, branches, heads, batch, tokens) for of_branches in parts)
    return dq, dk, dv


def _plan(
    tokens: int, lengths: Sequence[int], rates: Sequence[int], causal: bool, head_offsets: HeadOffsets, first_head: int,
    total_heads: int,
) -> tuple[ModuleType, list[Branch], Heads]:  # fmt: skip
    """The kernels, the branches with how many rows a segment takes, and the heads."""
    run = kernels()
    assert run is not None
    branches = []
    for w, r in ((min(w, tokens), r) for w, r in zip(lengths, rates, strict=True)):
        kept = -(-w // r)
        if causal and kept >= _ROUNDED_FROM:
            kept = -(-kept // _ROUND) * _ROUND  # of such lengths the fastest kernels run, see routes.py
        branches.append(run.Branch(w, r, kept))
    return run, branches, run.Heads(head_offsets, first_head, total_heads)


def _compact(
    run: ModuleType, xs: tuple[Tensor, ...], lse: Tensor | None, branch: Branch, heads: Heads
) -> tuple[list[Tensor], Tensor | None]:
    """The rows of a branch; where it keeps all of them, the tensors cut into segments, without a copy if need be."""
    if branch.r > 1 or branch.kept > branch.w:
        return run.gather(xs, lse, branch, heads)
    cut = [x.reshape(-1, branch.w, *x.shape[2:]).transpose(1, 2) for x in xs]
    return cut, None if lse is None else lse.reshape(-1, branch.w, lse.shape[2]).transpose(1, 2)
