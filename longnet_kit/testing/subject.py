"""A backend under test: what it is tried with, what it gives, and how close that must be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention.backend import AttentionBackend, Support
from longnet_kit.attention.patterns import Dilated, Pattern
from longnet_kit.testing.multiset import mixed_reference, reference

SEQ_LENS = (1, 2, 7, 32, 61)
WITHIN = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}
"""How far from what is expected a result in each dtype may be, for each unit of the largest number expected above 1."""
HEAD_DIMS = (8, 12, 16, 32, 64, 128)
"""Head widths to try; the first two that the backend supports are taken, the second only for values and gradients."""

Inputs = tuple[Tensor, Tensor, Tensor]
"""q, k, v."""


class Broken(Exception):
    """A claim does not hold; the message says where."""


class Unchecked(Exception):
    """A claim cannot be checked; the message says why."""


class Subject(NamedTuple):
    """A backend under test and where."""

    backend: AttentionBackend
    device: torch.device
    seq_lens: tuple[int, ...]
    dtype: torch.dtype
    """The widest that it supports."""
    head_dims: tuple[int, ...]
    """Up to two."""

    @property
    def within(self) -> float:
        return WITHIN[self.dtype]


def widest(backend: AttentionBackend, device: torch.device) -> tuple[torch.dtype, tuple[int, ...]]:
    """The widest dtype that the backend supports, and up to two head widths; float64 where it supports none."""
    for dtype in WITHIN:
        widths = [
            width
            for width in HEAD_DIMS
            if any(backend.supports(device=device, dtype=dtype, head_dim=width, causal=c) for c in (True, False))
        ]
        if widths:
            return dtype, tuple(widths[:2])
    return torch.float64, HEAD_DIMS[:1]


def telling_lengths(pattern: Pattern | None) -> tuple[int, ...]:
    """Short lengths, and the first longer one at which the pattern is not simply dense."""
    if pattern is None or not _is_dense(pattern, SEQ_LENS[-1]):
        return SEQ_LENS
    return SEQ_LENS + next(((length,) for length in (130, 300, 610) if not _is_dense(pattern, length)), ())


def _is_dense(pattern: Pattern, seq_len: int) -> bool:
    m = pattern.multiplicity(seq_len, 2, False)
    return bool((m == m[0, 0, 0]).all())


def draw(subject: Subject, seq_len: int, batch: int = 2, heads: int = 3, head_dim: int | None = None) -> Inputs:
    """q, k, v as slices of one fused projection, standard normal, in the widest dtype."""
    shape = (batch, seq_len, 3, heads, head_dim or subject.head_dims[0])
    qkv = torch.randn(shape, dtype=torch.float64).to(subject.device, subject.dtype)
    q, k, v = qkv.unbind(2)
    return q, k, v


def each(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    q, k, v = inputs
    return change(q), change(k), change(v)


def cases(subject: Subject, padding: bool = False) -> Iterator[tuple[int, bool, str]]:
    """Every length, causal and not, as far as the backend supports it in the widest dtype; and words for the case."""
    reason = ""
    for causal in (True, False):
        support = supports(subject, causal=causal, padding=padding)
        reason = reason or support.reason
        for seq_len in subject.seq_lens if support else ():
            yield seq_len, causal, f"{'causal' if causal else 'not causal'}, {seq_len} tokens"
    if reason and not any(supports(subject, causal=causal, padding=padding) for causal in (True, False)):
        raise Unchecked(f"the backend says: {reason}")


def supports(subject: Subject, dtype: torch.dtype | None = None, **inputs: bool) -> Support:
    dtype = dtype or subject.dtype
    return subject.backend.supports(device=subject.device, dtype=dtype, head_dim=subject.head_dims[0], **inputs)


def paddings(batch: int, seq_len: int, device: torch.device) -> Iterator[Tensor]:
    """Padding on the right, on the left, scattered, and all but one token."""
    position = torch.arange(seq_len, device=device).expand(batch, seq_len)
    row = torch.arange(batch, device=device)[:, None]
    yield position < (seq_len - row * (seq_len // 3)).clamp(min=1)
    yield position >= (row * (seq_len // 4))
    yield (torch.rand(batch, seq_len) < 0.6).to(device)
    yield position == seq_len // 2


def outcome(
    run: Callable[..., Tensor], inputs: Inputs, grad_out: Tensor, *rest: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of `run(*inputs, *rest)` with respect to fresh leaves with the strides of `inputs`."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = run(*leaves, *rest)
    if not out.requires_grad:
        raise Broken("the output has no gradient")
    grads = torch.autograd.grad(out, leaves, grad_out.to(out.dtype), allow_unused=True)
    return out.detach(), tuple(torch.zeros_like(x) if g is None else g for g, x in zip(grads, leaves, strict=True))


def expected(
    backend: AttentionBackend, inputs: Inputs, grad_out: Tensor, causal: bool, mask: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Output and gradients of the reference, in float64 whatever the inputs are; for a backend that has a pattern."""
    pattern, logits = backend.pattern, backend.branch_logits
    assert pattern is not None
    run = partial(reference, pattern)
    if logits is not None:
        assert isinstance(pattern, Dilated)
        run = partial(mixed_reference, pattern, logits.detach())
    return outcome(run, each(inputs, Tensor.double), grad_out.double(), causal, mask)


def expect_close(got: Tensor, expected: Tensor, within: float, what: str) -> None:
    if got.shape != expected.shape:
        raise Broken(f"{what} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
    if not got.isfinite().all():
        raise Broken(f"{what} is not finite")
    difference = (got.double() - expected.double()).abs().max().item()
    within *= max(1.0, expected.abs().max().item())
    if not difference <= within:
        raise Broken(f"{what} is off by {difference:.1e}, allowed {within:.0e}")
