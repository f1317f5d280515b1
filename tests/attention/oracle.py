"""Drawn attention problems and what the definition says about them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from longnet_kit.attention.patterns import Pattern
from longnet_kit.testing import reference

EXACT = 1e-9


@dataclass
class Problem:
    """Inputs of one attention call, fused as a projection leaves them."""

    qkv: Tensor  # (B, N, 3, H, D), NaN where padded
    grad_out: Tensor  # (B, N, H, D)
    causal: bool
    mask: Tensor | None

    def outcome(self, attend: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
        """Output and gradient of qkv."""
        qkv = self.qkv.detach().requires_grad_()
        out = attend(*qkv.unbind(2), self.causal, self.mask)
        (grad,) = torch.autograd.grad(out, qkv, self.grad_out)
        return out.detach(), grad

    def assert_matches(self, attend: Callable[..., Tensor], pattern: Pattern) -> None:
        """`attend` gives the pattern's softmax, values and gradients."""
        out, grad = self.outcome(attend)
        expected, expected_grad = self.outcome(lambda *inputs: reference(pattern, *inputs))
        assert (out - expected).abs().max() < EXACT
        assert (grad - expected_grad).abs().max() < EXACT


def problem(
    batch: int = 2,
    seq_len: int = 16,
    heads: int = 3,
    head_dim: int = 4,
    causal: bool = True,
    mask: Tensor | None = None,
) -> Problem:
    """Standard normal inputs; NaN in what `mask` pads."""
    qkv = torch.randn(batch, seq_len, 3, heads, head_dim, dtype=torch.float64)
    if mask is not None:
        qkv[~mask] = float("nan")
    return Problem(qkv, torch.randn(batch, seq_len, heads, head_dim, dtype=torch.float64), causal, mask)


@st.composite
def masks(draw: st.DrawFn, batch: int, seq_len: int) -> Tensor | None:
    """Padding of every kind, (B, N) bool, or none."""
    kind = draw(st.sampled_from(["none", "none", "scattered", "right", "left", "all but one", "one row empty"]))
    position = torch.arange(seq_len).expand(batch, seq_len)
    edge = torch.randint(1, seq_len + 1, (batch, 1))
    if kind == "scattered":
        return torch.rand(batch, seq_len) < 0.6
    if kind == "right":
        return position < edge
    if kind == "left":
        return position >= edge - 1
    if kind == "all but one":
        return position == edge - 1
    if kind == "one row empty":
        return (torch.arange(batch) > 0)[:, None].expand(batch, seq_len).contiguous()
    return None


@st.composite
def problems(draw: st.DrawFn, max_seq_len: int = 48) -> Problem:
    """Any N, H, batch, causality and padding, ugly ones included."""
    torch.manual_seed(draw(st.integers(0, 2**16)))
    batch = draw(st.sampled_from([1, 2, 3]))
    seq_len = draw(st.one_of(st.integers(1, max_seq_len), st.sampled_from([1, 2, 13, 31, 32, 37])))
    mask = draw(masks(batch, seq_len))
    heads, head_dim = draw(st.integers(1, 8)), draw(st.sampled_from([1, 4, 8]))
    return problem(batch, seq_len, heads, head_dim, draw(st.booleans()), mask)


@st.composite
def dilated_options(draw: st.DrawFn) -> dict[str, object]:
    """Branches in any order, repeated too, with r > w, w > N and w not a multiple of r among them."""
    branches = draw(st.lists(st.tuples(st.integers(1, 60), st.integers(1, 12)), min_size=1, max_size=4))
    return {
        "segment_lengths": [w for w, _ in branches],
        "dilation_rates": [r for _, r in branches],
        "head_offsets": draw(st.sampled_from(["interleaved", "grouped", "none"])),
    }
