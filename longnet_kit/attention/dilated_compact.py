"""Dilated attention on a GPU: kept rows are gathered side by side, and each branch is one kernel call.

A GPU wants few calls that fill it, where a CPU wants no copies (`longnet_kit.attention.mixture`). Here the rows that a
branch keeps, of all its heads, go into one compact tensor; what the branches give is mixed in one pass over the
sequence, and so are gradients. Results of all branches are in memory until then: sum of 1 / r times a tensor's size, 2
for rates that double, and in the backward pass three times that.

A row is the D elements of a position and head. A compact tensor holds the kept rows of a branch of S segments in one
piece, (B S, K, H, D); kernels get it as (B S, H, K, D).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention import flash
from longnet_kit.attention.patterns import HeadOffsets

MOST_COPIES = 3
"""Most that the branches' compact tensors may hold together, in sizes of the whole tensor."""

MAX_ROWS = 2**31 - 2**10
"""Rows of a tensor: the kernels count them in 32 bits."""

_ROUND = 128
_ROUNDED_FROM = 1024

log = logging.getLogger(__name__)


class Branch(NamedTuple):
    """A branch whose segments cut the sequence evenly."""

    w: int
    r: int
    kept: int
    """K: rows a compact tensor has per segment and head, at least ceil(w / r); those too many are zeros."""


class Heads(NamedTuple):
    """Which residues the heads of a call keep."""

    rule: HeadOffsets
    first: int
    total: int


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
        and sum(-(-w // r) / w for w, r in segments) <= MOST_COPIES
        and q.shape[:3].numel() * MOST_COPIES <= MAX_ROWS
        and kernels() is not None
    )


def _on_gpu(q: Tensor) -> bool:
    return q.device.type == "cuda" or _left_out


_left_out = False


@contextmanager
def without_kernels() -> Iterator[None]:
    """Go this way on any device and move no data: for tensors that have none, and what is allocated for them."""
    global _left_out
    before, _left_out = _left_out, True
    try:
        yield
    finally:
        _left_out = before


def kernels() -> Any:
    """`compact_kernels`; None, and a warning once, where they do not run."""
    if _left_out:
        return SimpleNamespace(**dict.fromkeys(("gather", "mix", "add_up"), lambda *_: None))
    return _kernels()


@cache
def _kernels() -> Any:
    try:
        from longnet_kit.attention import compact_kernels

        if torch.cuda.is_available():  # triton compiles its launcher with the system's C compiler
            x = torch.zeros(1, 1, 1, 1, device="cuda")
            compact_kernels.add_up([x], torch.empty_like(x), [Branch(1, 1, 1)], Heads("none", 0, 1))
    except Exception as error:
        log.warning(
            "dilated attention takes a kernel call per strided view, which is slower: triton does not run here (%s); "
            "it comes with torch's CUDA builds on Linux, and needs a C compiler",
            error,
        )
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
    branches, heads = _branches(q, lengths, rates, causal), Heads(head_offsets, first_head, total_heads)
    outs, lses = [], []
    with torch.cuda.device_of(q):  # triton launches on the current device, torch on its tensors'
        for branch in branches:
            (q_, k_, v_), _ = _compact((q, k, v), None, branch, heads)
            out, lse = flash.forward(q_, k_, v_, causal, scale)
            outs.append(_side_by_side(out))
            lses.append(lse.contiguous())
            del q_, k_, v_, out, lse
        out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=lses[0].dtype)
        kernels().mix(outs, lses, out, lse, branches, heads)
    return out, lse


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
    branches, heads = _branches(q, lengths, rates, causal), Heads(head_offsets, first_head, total_heads)
    parts: list[list[Tensor]] = [[], [], []]  # of dq, dk and dv
    with torch.cuda.device_of(q):
        for branch in branches:
            (grad_, q_, k_, v_, out_), lse_ = _compact((grad_out, q, k, v, out), lse, branch, heads)
            assert lse_ is not None
            grads = flash.backward(grad_, q_, k_, v_, out_, lse_, causal, scale)
            for of_branches, grad in zip(parts, grads, strict=True):
                of_branches.append(_side_by_side(grad))
            del grad_, q_, k_, v_, out_, lse_, grads, grad
        sums = []
        while parts:  # one by one, so that branches' parts and sums are not all there at once
            of_branches = parts.pop(0)
            sums.append(q.new_empty(q.shape))
            kernels().add_up(of_branches, sums[-1], branches, heads)
    dq, dk, dv = sums
    return dq, dk, dv


def _branches(q: Tensor, lengths: Sequence[int], rates: Sequence[int], causal: bool) -> list[Branch]:
    """The branches, with how many rows a segment takes."""
    found = []
    for w, r in ((min(w, q.shape[1]), r) for w, r in zip(lengths, rates, strict=True)):
        kept = -(-w // r)
        if causal and kept >= _ROUNDED_FROM:
            kept = -(-kept // _ROUND) * _ROUND  # of such lengths the fastest kernels run, see routes.py
        found.append(Branch(w, r, kept))
    return found


def _compact(
    xs: tuple[Tensor, ...], lse: Tensor | None, branch: Branch, heads: Heads
) -> tuple[list[Tensor], Tensor | None]:
    """The kept rows of tensors, and of the softmax denominators' logs where they are given; zeros beyond the kept.

    Args:
        xs: (B, N, H, D) each.
        lse: (B, N, H), in one piece.

    Returns:
        (B S, H, K, D) each, a view of the tensor where the branch keeps all of it and strides allow; and (B S, H, K).
    """
    batch, tokens, count, head_dim = xs[0].shape
    if branch.r == 1 and branch.kept == branch.w:
        cut = [x.reshape(-1, branch.w, *x.shape[2:]).transpose(1, 2) for x in xs]
        return cut, None if lse is None else lse.reshape(-1, branch.w, count).transpose(1, 2)
    segments = batch * (tokens // branch.w)
    found = [x.new_empty(segments, branch.kept, count, head_dim) for x in xs]
    found_lse = None if lse is None else lse.new_empty(segments, count, branch.kept)
    kernels().gather(xs, found, lse, found_lse, branch, heads)
    return [x.transpose(1, 2) for x in found], found_lse


def _side_by_side(x: Tensor) -> Tensor:
    """(B S, H, K, D) as (B S, K, H, D) in one piece; most kernels lay it so."""
    return x.transpose(1, 2).contiguous()
