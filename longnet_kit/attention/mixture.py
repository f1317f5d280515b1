"""One softmax over the union of several branches' keys, built up branch by branch, forward and backward.

Branches are given as views into the whole tensors, so results land in place. A first branch that reaches every position
writes, and where one kernel call does all of it, what the kernel gives is the running tensor. Later branches are added
where they land, a quarter of the tensors at a time, or a head where that is more: what a kernel hands over takes no
more than that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longnet_kit.attention import flash
from longnet_kit.attention.views import View

PARTS = 4
"""A kernel call that only adds to the running tensors covers at most one in so many of their elements."""


class Mixture:
    """The running output and the log of its softmax denominators.

    Args:
        q: (B, N, H, D), the queries.
        covered: the first branch added reaches every position, so it writes and later ones are mixed in.
    """

    out: Tensor
    """(B, N, H, D), at least float32; 0 where nothing was attended to."""
    lse: Tensor
    """(B, N, H); -inf where nothing was attended to."""

    def __init__(self, q: Tensor, covered: bool) -> None:
        self._written = not covered
        if not covered:
            self.out = q.new_zeros(q.shape, dtype=exact(q))
            self.lse = q.new_full(q.shape[:-1], -torch.inf, dtype=exact(q))

    def attend(self, views: tuple[View, ...], q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> None:
        """Mix in a branch: in each view, its queries attend to its keys."""
        if not self._written:
            if whole := _one_call(views, q, k, v):
                q_, k_, v_ = whole
                out, lse = flash.forward(q_, k_, v_, causal, scale)
                self.out, self.lse = _unfold(out, q), _unfold(lse, q)
                self._written = True
                return
            self.out, self.lse = (q.new_empty(shape, dtype=exact(q)) for shape in (q.shape, q.shape[:-1]))
        for view in views:
            for q_, k_, v_, out, lse in _parts(view, q, k, v, self.out, self.lse):
                self.add(out, lse, *flash.forward(q_, k_, v_, causal, scale))
        self._written = True

    def add(self, out: Tensor, lse: Tensor, branch_out: Tensor, branch_lse: Tensor) -> None:
        """Mix into views of the running tensors what a branch gives there."""
        if self._written:
            merge(out, lse, branch_out, branch_lse)
        else:
            out.copy_(branch_out)
            lse.copy_(branch_lse)


class Gradients:
    """The running gradients of q, k and v.

    Args:
        q: (B, N, H, D), the queries.
        covered: the first branch added reaches every position, so it writes and later ones are added.
    """

    dq: Tensor
    dk: Tensor
    dv: Tensor
    """(B, N, H, D) each, at least float32."""

    def __init__(self, q: Tensor, covered: bool) -> None:
        self._written = not covered
        if not covered:
            self.dq, self.dk, self.dv = (q.new_zeros(q.shape, dtype=exact(q)) for _ in range(3))

    def add(
        self,
        views: tuple[View, ...],
        grad_out: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        causal: bool,
        scale: float,
    ) -> None:
        """Add a branch's part, under the `out` and `lse` of the whole mixture."""
        saved = grad_out, q, k, v, out, lse
        if not self._written:
            if whole := _one_call(views, *saved):
                grads = _kernel_gradients(whole, causal, scale)
                self.dq, self.dk, self.dv = (_unfold(grad, q) for grad in grads)
                self._written = True
                return
            self.dq, self.dk, self.dv = (q.new_empty(q.shape, dtype=exact(q)) for _ in range(3))
        for view in views:
            for *saved_, dq, dk, dv in _parts(view, *saved, self.dq, self.dk, self.dv):
                self._land((dq, dk, dv), _kernel_gradients(saved_, causal, scale))
        self._written = True

    def take(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Hand the three over in a dtype, one by one, so that in half precision they are not all there twice."""
        dq = self.dq.to(dtype)
        del self.dq
        dk = self.dk.to(dtype)
        del self.dk
        dv = self.dv.to(dtype)
        del self.dv
        return dq, dk, dv

    def _land(self, totals: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
        """Write or add what a kernel call gives; after it nothing holds the call's results, which are large."""
        for total, part in zip(totals, parts, strict=True):
            total.add_(part) if self._written else total.copy_(part)


def merge(out: Tensor, lse: Tensor, branch_out: Tensor, branch_lse: Tensor) -> None:
    """Mix one branch into the running output, in place, in proportion to the softmax denominators (LongNet eq. 10).

    Args:
        out: (B, H, m, D), float32 or float64.
        lse: (B, H, m), of the same dtype; -inf where nothing was attended to yet.
        branch_out: (B, H, m, D), any float.
        branch_lse: (B, H, m); finite, since a kept query sees at least itself.
    """
    share = torch.sigmoid(branch_lse - lse).unsqueeze(-1)  # e^branch_lse / (e^branch_lse + e^lse)
    out.lerp_(branch_out.to(out.dtype), share)
    lse.copy_(torch.logaddexp(lse, branch_lse))


def causal_after(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor, scale: float) -> Tensor:
    """Causal attention of the next tokens of a stream to each other, and to all of a past that may be empty.

    Kernels align causal queries with the first keys, and here they stand at the last; so there are two calls.

    Args:
        q, k, v: (B, H, n, D).
        past_k, past_v: (B, H, m, D).

    Returns:
        (B, H, n, D), of q's dtype.
    """
    out, lse = flash.forward(q, k, v, True, scale)
    if past_k.shape[2]:
        out = out.to(lse.dtype)
        merge(out, lse, *flash.forward(q, past_k, past_v, False, scale))
    return out.to(q.dtype)


def exact(q: Tensor) -> torch.dtype:
    """The dtype in which branches are added up: at least float32."""
    return torch.promote_types(q.dtype, torch.float32)


def unit_stride(x: Tensor) -> Tensor:
    """Kernels need the elements of a head side by side; anything else about the strides is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _kernel_gradients(saved: Sequence[Tensor], causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    grad_out, q, k, v, out, lse = saved
    return flash.backward(grad_out, q, k, v, out, lse, causal, scale)


def _one_call(views: tuple[View, ...], *tensors: Tensor) -> tuple[Tensor, ...] | None:
    """The view of each tensor if a single call covers all of them, and gives what sums are held in."""
    if len(views) == 1 and views[0].covers(tensors[0]) and tensors[0].dtype == exact(tensors[0]):
        calls = list(views[0].calls(*tensors))
        return calls[0] if len(calls) == 1 else None
    return None


def _unfold(x: Tensor, like: Tensor) -> Tensor:
    """What a call that covers everything gives, (B', H, m, ...), as (B, N, H, ...), in one piece.

    Without a copy of what most kernels give, who lay heads side by side.
    """
    return x.transpose(1, 2).reshape(*like.shape[:3], *x.shape[3:]).contiguous()


def _parts(view: View, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The view of each tensor, (B', heads, kept, ...), in parts of at most 1 / PARTS of the first tensor's elements."""
    most = max(1, tensors[0].numel() // PARTS)
    for call in view.calls(*tensors):
        one_head = call[0][0, 0].numel()
        heads = max(1, min(view.heads, most // one_head))
        rows = max(1, most // (one_head * heads))
        for row in range(0, call[0].shape[0], rows):
            for head in range(0, view.heads, heads):
                yield tuple(x[row : row + rows, head : head + heads] for x in call)
