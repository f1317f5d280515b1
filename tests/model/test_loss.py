"""The chunked loss: that of the plain one, in less memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from longnet_kit.model import loss
from longnet_kit.model.loss import token_losses


def problem(batch: int, seq_len: int, vocab: int = 19, dim: int = 6, seed: int = 0) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, seq_len, dim, dtype=torch.float64, generator=g).requires_grad_()
    weight = torch.randn(vocab, dim, dtype=torch.float64, generator=g).requires_grad_()
    targets = torch.randint(vocab, (batch, seq_len), generator=g)
    targets[torch.rand(batch, seq_len, generator=g) < 0.3] = -100
    return hidden, weight, targets


@given(st.integers(1, 3), st.integers(1, 20), st.integers(1, 70), st.integers(0, 9))
def test_chunks_change_neither_values_nor_gradients(batch: int, seq_len: int, chunk: int, seed: int) -> None:
    hidden, weight, targets = problem(batch, seq_len, seed=seed)
    upstream = torch.randn(batch, seq_len, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    plain = F.cross_entropy((hidden @ weight.T).flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    expected = torch.autograd.grad(plain, (hidden, weight), upstream)
    losses = token_losses(hidden, weight, targets, chunk_tokens=chunk)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, plain, rtol=0, atol=1e-12)
    assert (losses[targets == -100] == 0).all()
    for ours, theirs in zip(torch.autograd.grad(losses, (hidden, weight), upstream), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens' logits each product made, so far."""
    sizes: list[int] = []
    real = loss._losses

    def noted(hidden: torch.Tensor, *rest: torch.Tensor) -> torch.Tensor:
        sizes.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(loss, "_losses", noted)
    return sizes


def test_no_more_than_a_chunk_of_logits_is_held(made: list[int]) -> None:
    kept: list[torch.Size] = []

    def note(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.shape)
        return x

    hidden, weight, targets = problem(2, 25)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        losses = token_losses(hidden, weight, targets, chunk_tokens=8)
    assert made == [8] * 6 + [2]
    assert not [shape for shape in kept if shape[-1:] == (19,)], "logits were saved for the backward pass"
    losses.sum().backward()
    assert sorted(made[7:]) == [2] + [8] * 6


def test_what_fits_in_one_chunk_is_computed_once(made: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "MAX_LOGITS", 50 * 19)
    token_losses(*problem(2, 25)).sum().backward()
    assert made == [50]
    made.clear()
    token_losses(*problem(3, 25)).sum().backward()
    assert sorted(made) == [25, 25, 50, 50]


@pytest.mark.parametrize("chunk", [None, 7])
def test_low_precision_logits_have_a_float32_loss(chunk: int | None) -> None:
    hidden, weight, targets = problem(2, 25)
    low = token_losses(hidden.bfloat16(), weight.bfloat16(), targets, chunk)
    assert low.dtype == torch.float32
    exact = F.cross_entropy(
        (hidden.bfloat16() @ weight.bfloat16().T).float().flatten(0, 1), targets.flatten(), reduction="none"
    )
    torch.testing.assert_close(low.flatten(), exact, rtol=0, atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        cast = token_losses(hidden.float(), weight.float(), targets, chunk)
        cast.sum().backward()
    assert cast.dtype == torch.float32
    torch.testing.assert_close(cast.flatten(), exact, rtol=0, atol=1e-6)


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk_tokens is 0"):
        token_losses(*problem(1, 4), chunk_tokens=0)
