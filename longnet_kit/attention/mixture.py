"""One softmax over the union of several branches' keys, built up branch by branch, forward and backward.

Branches are given as views into the whole tensors, so results land in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from longnet_kit.attention import flash
from longnet_kit.attention.views import View


class Mixture:
    """The running output and the log of its softmax denominators.

    Args:
        q: (B, N, H, D), the queries.
        covered: the first branch added reaches every position, so it writes and later ones are mixed in.
    """

    def __init__(self, q: Tensor, covered: bool) -> None:
        self.out = q.new_empty(q.shape, dtype=exact(q))
        """(B, N, H, D), at least float32; 0 where nothing was attended to."""
        self.lse = q.new_empty(q.shape[:-1], dtype=exact(q))
        """(B, N, H); -inf where nothing was attended to."""
        self._written = not covered
        if not covered:
            self.out.zero_()
            self.lse.fill_(-torch.inf)

    def attend(self, views: Iterable[View], q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> None:
        """Mix in a branch: in each view, its queries attend to its keys."""
        for view in views:
            for out, lse, q_, k_, v_ in view.calls(self.out, self.lse, q, k, v):
                self.add(out, lse, *flash.forward(q_, k_, v_, causal, scale))
        self._written = True

    def add(self, out: Tensor, lse: Tensor, branch_out: Tensor, branch_lse: Tensor) -> None:
        """Mix into views of the running tensors what a branch gives there."""
        if self._written:
            merge(out, lse, branch_out, branch_lse)
        else:
            out.copy_(branch_out)
            lse.copy_(branch_lse)


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


def zero_gradients(q: Tensor) -> list[Tensor]:
    """What the gradients of q, k and v are added up in: (B, N, H, D) each, at least float32."""
    return [torch.zeros_like(q, dtype=exact(q)) for _ in range(3)]


def add_gradients(
    grads: Sequence[Tensor],
    views: Iterable[View],
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> None:
    """Add a branch's part of the gradients of q, k and v, under the `out` and `lse` of the whole mixture."""
    for view in views:
        for dq, dk, dv, *saved in view.calls(*grads, grad_out, q, k, v, out, lse):
            dout_, q_, k_, v_, out_, lse_ = saved
            branch = flash.backward(dout_, q_, k_, v_, out_, lse_, causal, scale)
            for total, part in zip((dq, dk, dv), branch, strict=True):
                total.add_(part)


def exact(q: Tensor) -> torch.dtype:
    """The dtype in which branches are added up: at least float32."""
    return torch.promote_types(q.dtype, torch.float32)


def unit_stride(x: Tensor) -> Tensor:
    """Kernels need the elements of a head side by side; anything else about the strides is free."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
