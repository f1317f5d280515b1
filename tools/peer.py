"""Dilated attention as other implementations do it: gather each branch, attend, scatter, mix whole tensors.

A yardstick for benchmarks. It follows the plan of torchscale's `DilatedAttention` with that plan's costs kept low: a
gather is one strided copy of a diagonal and its gradient one scatter, nothing is padded that need not be, the branch of
rate 1 is neither gathered nor scattered, and the mixing weights carry no gradient. The kernel is the kit's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_kit.attention import flash


def attend(q: Tensor, k: Tensor, v: Tensor, branches: Sequence[tuple[int, int]], causal: bool = True) -> Tensor:
    """Dilated attention, (B, N, H, D) in and out, with head offsets h mod r.

    Where a segment is not a multiple of the rate, or the sequence not of the segment, zeros are appended. Padding keys
    come last, so that a causal query never sees one.
    """
    outs, lses = [], []
    for w, r in branches:
        w = min(w, q.shape[1])
        out, lse = _Kernel.apply(*(_Gather.apply(x, w, r) for x in (q, k, v)), causal, q.shape[-1] ** -0.5)
        outs.append(_Scatter.apply(out, q.shape, w, r))
        lses.append(_scatter(lse.unsqueeze(-1), -torch.inf, (*q.shape[:3], 1), w, r))
    shares = torch.stack(lses).softmax(0).to(q.dtype)
    mixed = shares[0] * outs[0]
    for share, out in zip(shares[1:], outs[1:], strict=True):
        mixed = torch.addcmul(mixed, share, out)
    return mixed


class _Gather(torch.autograd.Function):
    """`_gather`; its gradient goes back by `_scatter`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: int, r: int) -> Tensor:
        ctx.place = x.shape, w, r
        return _gather(x, w, r)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return _scatter(grad, 0.0, *ctx.place), None, None


class _Scatter(torch.autograd.Function):
    """`_scatter` among zeros; its gradient comes back by `_gather`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shape: Sequence[int], w: int, r: int) -> Tensor:
        ctx.place = w, r
        return _scatter(x, 0.0, shape, w, r)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _gather(grad, *ctx.place), None, None, None


def _gather(x: Tensor, w: int, r: int) -> Tensor:
    """(B, N, H, D) to (B * segments, H, ceil(w / r), D): head h keeps every r-th token from h mod r on."""
    x = _segments(x, w, r)  # (B, segments, m, r, H, D)
    if r == 1:
        return x.squeeze(3).flatten(0, 1).transpose(1, 2)
    heads = x.shape[4]
    diagonals = (x[..., h : h + r, :].diagonal(0, 3, 4) for h in range(0, heads, r))  # (B, segments, m, D, heads)
    return torch.cat([kept.permute(0, 1, 4, 2, 3) for kept in diagonals], 2).flatten(0, 1)


def _scatter(x: Tensor, empty: float, shape: Sequence[int], w: int, r: int) -> Tensor:
    """What belongs to `_gather`: (B * segments, H, m, D) to (B, N, H, D), `empty` where nothing was kept."""
    batch, seq_len, heads, width = shape
    kept = x.unflatten(0, (batch, -1)).permute(0, 1, 3, 4, 2)  # (B, segments, m, D, H)
    if r == 1:
        return kept.transpose(-1, -2).flatten(1, 2)[:, :seq_len]
    whole = x.new_full((*kept.shape[:3], r, heads, width), empty)
    for h in range(0, heads, r):
        whole[..., h : h + r, :].diagonal(0, 3, 4).copy_(kept[..., h : h + r])
    return whole.flatten(2, 3)[:, :, :w].flatten(1, 2)[:, :seq_len]


def _segments(x: Tensor, w: int, r: int) -> Tensor:
    """(B, N, H, D) to (B, segments, m, r, H, D), with zeros where something is missing."""
    x = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % w)) if x.shape[1] % w else x
    x = x.unflatten(1, (-1, w))
    x = F.pad(x, (0, 0, 0, 0, 0, -w % r)) if w % r else x
    return x.unflatten(2, (-1, r))


class _Kernel(torch.autograd.Function):
    """The dense kernel; its denominators carry no gradient."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        out, lse = flash.forward(q, k, v, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = causal, scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return *flash.backward(grad_out, *ctx.saved_tensors, *ctx.settings), None, None
