"""LongNet's dilated attention (arXiv 2307.02486) as an operation: a kernel per strided view, merged into one softmax.

On CUDA, where segments cut the sequence evenly, `longnet_kit.attention.dilated_compact` does it, a kernel per branch.

Forward: the kernel gives (out, lse) of each branch's view; they are mixed into the running ones by their softmax
denominators (eq. 9-10). Backward: the kernel's backward, given the mixed out and lse in place of the branch's own,
gives gradients that add up to those of the one softmax over the multiset of all branches' keys, mixing weights
included. Only q, k, v, out and lse are kept in between, whatever the number of branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.library import CustomOpDef  # pyright: ignore[reportPrivateImportUsage] what custom_op gives, not in __all__
from torch.utils.flop_counter import register_flop_formula

from longnet_kit.attention import derivatives, dilated_compact, padding, patterns
from longnet_kit.attention.mixture import Gradients, Mixture, exact, unit_stride
from longnet_kit.attention.views import View, branch_views

_NAME = "the attention backend dilated"


@torch.library.custom_op("longnet_kit::dilated", mutates_args=())
def dilated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_offsets: str,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Dilated attention of all branches and the log of the mixed softmax's denominators.

    Args:
        q, k, v: (B, N, H, D), heads first_head to first_head + H - 1 of total_heads.

    Returns:
        out: (B, N, H, D), of q's dtype, 0 where no branch keeps the position. lse: (B, N, H), -inf there; float32
        (float64 for float64).
    """
    q, k, v = (unit_stride(x) for x in (q, k, v))
    if dilated_compact.takes(q, segment_lengths, dilation_rates, causal):
        rule = segment_lengths, dilation_rates, head_offsets, first_head, total_heads
        return dilated_compact.forward(q, k, v, *rule, causal, scale)  # type: ignore[arg-type]
    mixture = Mixture(q, covered=1 in dilation_rates)
    for views in _dense_first(q, segment_lengths, dilation_rates, head_offsets, first_head, total_heads):
        mixture.attend(views, q, k, v, causal, scale)
    return mixture.out.to(q.dtype), mixture.lse


@torch.library.custom_op("longnet_kit::dilated_backward", mutates_args=())
def dilated_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_offsets: str,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, (B, N, H, D) each, from the saved tensors of `dilated`."""
    q, k, v, grad_out = (unit_stride(x) for x in (q, k, v, grad_out))
    if dilated_compact.takes(q, segment_lengths, dilation_rates, causal):
        rule = segment_lengths, dilation_rates, head_offsets, first_head, total_heads
        return dilated_compact.backward(grad_out, q, k, v, out, lse, *rule, causal, scale)  # type: ignore[arg-type]
    grads = Gradients(q, covered=1 in dilation_rates)
    for views in _dense_first(q, segment_lengths, dilation_rates, head_offsets, first_head, total_heads):
        grads.add(views, grad_out, q, k, v, out, lse, causal, scale)
    return grads.take(q.dtype)


def _dense_first(
    q: Tensor, lengths: list[int], rates: list[int], head_offsets: str, first_head: int, total_heads: int
) -> Iterator[tuple[View, ...]]:
    """The views of each branch, a branch of rate 1 first: it reaches every position, so it writes and others add."""
    _, seq_len, heads, _ = q.shape
    for w, r in sorted(zip(lengths, rates, strict=True), key=lambda branch: branch[1]):
        yield branch_views(seq_len, w, r, head_offsets, first_head, heads, total_heads)  # type: ignore[arg-type]


def make_differentiable(op: CustomOpDef, backward_op: CustomOpDef) -> None:
    """Give operations with the arguments of `dilated` and `dilated_backward` their fake kernels and autograd.

    There are first derivatives in reverse mode; others raise a UserError.
    """

    def fake(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=exact(q))

    def backward_fake(grad_out: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
        return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, *ctx.settings = inputs
        ctx.save_for_backward(q, k, v, *output)
        ctx.set_materialize_grads(False)  # mostly nothing uses lse

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        if grad_lse is None:
            grads = backward_op(grad_out, q, k, v, out, lse, *ctx.settings)
        else:
            # A column of ones in v, of zeros in out: a kernel's ds = p (grad_out v - grad_out out) gains p grad_lse.
            q, k, out = (F.pad(x, (0, padding.COLUMNS)) for x in (q, k, out))
            v = F.pad(v, (0, padding.COLUMNS), value=1.0)
            column = F.pad(grad_lse[..., None].to(out.dtype), (0, padding.COLUMNS - 1))
            wide = backward_op(torch.cat((grad_out, column), -1), q, k, v, out, lse, *ctx.settings)
            grads = tuple(grad[..., : -padding.COLUMNS] for grad in wide)
        return (*grads, *(None for _ in ctx.settings))

    op.register_fake(fake)
    backward_op.register_fake(backward_fake)
    op.register_autograd(backward, setup_context=save)
    backward_op.register_autograd(lambda *_: derivatives.refuse_second(_NAME))
    derivatives.guard(op, _NAME)
    derivatives.guard(backward_op, _NAME)


def forward_flops(q_shape: Sequence[int], k_shape: Any, v_shape: Any, *settings: Any, **_: Any) -> int:
    """FLOPs of an operation over dilated branches, from the arguments of `dilated`, shapes for tensors."""
    lengths, rates, head_offsets, first_head, total_heads, causal, _ = settings
    batch, seq_len, heads, head_dim = q_shape
    views = (
        view
        for w, r in zip(lengths, rates, strict=True)
        for view in branch_views(seq_len, w, r, head_offsets, first_head, heads, total_heads)
    )
    pairs = sum(v.segments * v.heads * patterns.square(v.kept, causal) for v in views)
    return 4 * batch * head_dim * pairs


def backward_flops(grad_shape: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *settings: Any, **_: Any) -> int:
    """The same of its backward."""
    return 5 * forward_flops(q, k, v, *settings) // 2  # five matrix products against two


make_differentiable(dilated, dilated_backward)
register_flop_formula(torch.ops.longnet_kit.dilated)(forward_flops)
register_flop_formula(torch.ops.longnet_kit.dilated_backward)(backward_flops)
