"""Dense attention with its softmax denominators, forward and backward, on each device.

The only file that names torch's private attention ops. Their backward takes `out` and `lse` from outside: given the
merged ones of several partial softmaxes, the partial gradients add up to the exact gradient of the one softmax.

Tensors are (B, H, n, D) here, keys and values (B, H, m, D), with any strides but a last one of 1; lse is (B, H, n),
float32 (float64 for float64).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention import routes
from longnet_kit.attention.inputs import exactly

aten = torch.ops.aten

Forward = Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor, Tensor]]

_MAX_BATCH = 65_535  # of a CUDA grid's second and third dimension
_MAX_ELEMENTS = 2**31 - 1  # CUDA kernels index with 32 bits
_MAX_SCORES = 2**26  # of the math route, at a time


class Route(NamedTuple):
    """A kernel in both directions."""

    name: str
    forward: Forward
    backward: Backward


def route(q: Tensor, k: Tensor) -> Route:
    """The kernel that runs on the device of queries (B, H, n, D) and keys (B, H, m, D), for their dtype and shapes.

    CPU: torch's flash kernel. CUDA: the fastest that takes them, by the table of `longnet_kit.attention.routes`.
    Everything else takes plain matrix products.
    """
    if q.device.type == "cpu":
        return CPU
    if q.device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(q.device)
        return CUDA[routes.fastest(major, q.dtype, q.shape[-1], q.shape[2], k.shape[2])]
    return MATH


def forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Attention and the log of its softmax denominators.

    Args:
        q: (B, H, n, D).
        k, v: (B, H, m, D), with m = n if causal.
        causal: query i sees keys 0 to i.
        scale: factor on the scores.

    Returns:
        out: (B, H, n, D), of q's dtype; lse: (B, H, n).
    """
    kernel = route(q, k)
    parts = [kernel.forward(q[s], k[s], v[s], causal, scale) for s in _batches(q, k)]
    if len(parts) == 1:
        return parts[0]
    return _joined(out for out, _ in parts), torch.cat([lse for _, lse in parts])


def backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v through the keys given here, under the `out` and `lse` of a softmax that may hold more keys.

    Args:
        grad_out, q, out: (B, H, n, D).
        k, v: (B, H, m, D), with m = n if causal.
        lse: (B, H, n).

    Returns:
        Gradients of q, k and v, shaped as they are, of q's dtype.
    """
    kernel = route(q, k)
    lse = lse.contiguous()  # kernels read it as a raw pointer
    parts = [kernel.backward(grad_out[s], q[s], k[s], v[s], out[s], lse[s], causal, scale) for s in _batches(q, k)]
    if len(parts) == 1:
        return parts[0]
    dq, dk, dv = (_joined(grads) for grads in zip(*parts, strict=True))
    return dq, dk, dv


def _joined(parts: Iterable[Tensor]) -> Tensor:
    """Parts of a batch, (B, H, n, D) each, with heads side by side in memory, as most kernels lay them."""
    return torch.cat([x.transpose(1, 2) for x in parts]).transpose(1, 2)


def _batches(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the batch within what one kernel launch takes: all of it on CPU."""
    batch = q.shape[0]
    step = batch
    if q.device.type == "cuda":
        step = max(1, min(_MAX_BATCH, _MAX_ELEMENTS // max(q[0].numel(), k[0].numel())))
    return (slice(start, start + step) for start in range(0, batch, step))


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    op = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return op(grad_out, q, k, v, out, lse, 0.0, causal, scale=scale)


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)
    return out, lse


def _flash_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = q.shape[2], k.shape[2]
    op = aten._scaled_dot_product_flash_attention_backward
    seed = _no_dropout(q)
    return op(grad_out, q, k, v, out, lse, None, None, n, m, 0.0, causal, seed, seed, scale=scale)


def _cudnn_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, False, scale=scale)
    return out, lse.reshape(q.shape[:3])  # (B, H, n, 1) in newer versions


def _cudnn_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n, m = q.shape[2], k.shape[2]
    # A graph is built per shape and strides: one fixed layout keeps them few.
    out, grad_out = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (out, grad_out))
    op = aten._scaled_dot_product_cudnn_attention_backward
    seed = _no_dropout(q)
    lse = lse.unsqueeze(-1)
    return op(grad_out, q, k, v, out, lse, seed, seed, None, None, None, n, m, 0.0, causal, scale=scale)


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    return out, lse[..., : q.shape[2]]  # the kernel rounds n up to a multiple of 32


def _efficient_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    n = q.shape[2]
    out = out.transpose(1, 2).contiguous().transpose(1, 2)
    rounded = lse.new_full((*lse.shape[:2], -(-n // 32) * 32), math.inf)
    rounded[..., :n] = lse
    op = aten._scaled_dot_product_efficient_attention_backward
    seed = _no_dropout(q)
    needed = [True, True, True, False]
    dq, dk, dv, _ = op(grad_out, q, k, v, None, out, rounded, seed, seed, 0.0, needed, causal, scale=scale)
    return dq, dk, dv


def _no_dropout(q: Tensor) -> Tensor:
    """What stands for the random state where nothing is dropped."""
    return torch.zeros((), dtype=torch.int64, device=q.device)


@exactly
def _math_forward(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for s in _score_slices(q, k):
        scores = _scores(q[s], k[s], causal, scale)
        lse = scores.logsumexp(-1)
        lses.append(lse)
        outs.append(((scores - lse.unsqueeze(-1)).exp() @ v[s].to(scores.dtype)).to(q.dtype))
    return torch.cat(outs), torch.cat(lses)


@exactly
def _math_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    grads: list[tuple[Tensor, Tensor, Tensor]] = []
    for s in _score_slices(q, k):
        scores = _scores(q[s], k[s], causal, scale)
        p = (scores - lse[s].unsqueeze(-1)).exp()  # (B, H, n, m)
        q_, k_, v_, out_, dout = (x[s].to(p.dtype) for x in (q, k, v, out, grad_out))
        dp = dout @ v_.transpose(-1, -2)
        ds = p * (dp - (dout * out_).sum(-1, keepdim=True)) * scale
        grads.append((ds @ k_, ds.transpose(-1, -2) @ q_, p.transpose(-1, -2) @ dout))
    dq, dk, dv = (torch.cat(parts).to(q.dtype) for parts in zip(*grads, strict=True))
    return dq, dk, dv


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    exact = torch.promote_types(q.dtype, torch.float32)
    scores = q.to(exact) @ k.to(exact).transpose(-1, -2) * scale
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(ahead, -math.inf)
    return scores


def _score_slices(q: Tensor, k: Tensor) -> Iterator[slice]:
    """Slices of the batch whose score matrices are of bounded size."""
    _, heads, n, _ = q.shape
    step = max(1, _MAX_SCORES // (heads * n * k.shape[2]))
    return (slice(start, start + step) for start in range(0, q.shape[0], step))


CPU = Route("cpu", _cpu_forward, _cpu_backward)
CUDNN = Route("cudnn", _cudnn_forward, _cudnn_backward)
FLASH = Route("flash", _flash_forward, _flash_backward)
EFFICIENT = Route("efficient", _efficient_forward, _efficient_backward)
MATH = Route("math", _math_forward, _math_backward)
CUDA = {"fa3": FLASH, "cudnn": CUDNN, "flash": FLASH, "efficient": EFFICIENT, "math": MATH}
"""Kernels by their names in the table; FlashAttention-3 stands behind the same ops as torch's own flash kernel."""
