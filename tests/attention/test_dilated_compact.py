"""The way of a GPU: rows gathered, a kernel per branch, one mix. Without one, triton's interpreter runs the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention import dilated, dilated_compact, flash
from longnet_kit.testing import reference
from tests.attention.oracle import problem

pytest.importorskip("triton", reason="needs triton, which comes with torch's CUDA builds and with the extra dev")

from longnet_kit.attention import compact_kernels

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAPER = {"segment_lengths": [2048, 4096, 8192, 16384, 32768], "dilation_rates": [1, 2, 4, 6, 12]}


@pytest.fixture
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Go this way on a CPU too."""
    monkeypatch.setattr(dilated_compact, "_on_gpu", lambda _: True)


@st.composite
def even_options(draw: st.DrawFn) -> tuple[dict, int]:
    """Branches whose segments cut the sequence evenly, and its length."""
    tokens = draw(st.sampled_from([1, 7, 24, 60]))
    fitting = [w for w in range(1, tokens + 1) if tokens % w == 0] + [tokens + 5]
    branches = draw(st.lists(st.tuples(st.sampled_from(fitting), st.integers(1, 9)), min_size=1, max_size=4))
    lengths, rates = (list(numbers) for numbers in zip(*branches, strict=True))
    rule = draw(st.sampled_from(["interleaved", "grouped", "none"]))
    return {"segment_lengths": lengths, "dilation_rates": rates, "head_offsets": rule}, tokens


def outcome(qkv: Tensor, grad_out: Tensor, options: dict, heads: tuple[int, int], causal: bool) -> list[Tensor]:
    """Output, lse and the gradient of qkv, (B, N, 3, H, D)."""
    rule = options["segment_lengths"], options["dilation_rates"], options["head_offsets"], *heads
    qkv = qkv.detach().requires_grad_()
    out, lse = dilated.dilated(*qkv.unbind(2), *rule, causal, qkv.shape[-1] ** -0.5)
    (grad,) = torch.autograd.grad(out, qkv, grad_out)
    if qkv.dtype == torch.float32:
        assert dilated_compact.takes(qkv[:, :, 0], *rule[:2], causal) == fits(options, qkv.shape[1], causal)
    return [x.detach().double().cpu() for x in (out, lse, grad)]


def fits(options: dict, tokens: int, causal: bool) -> bool:
    """Whether even branches can go this way."""
    branches = zip(options["segment_lengths"], options["dilation_rates"], strict=True)
    return sum(1 / r for r in options["dilation_rates"]) <= 3 and all(
        causal or min(w, tokens) % r == 0 for w, r in branches
    )


@pytest.mark.usefixtures("everywhere")
@settings(max_examples=25)
@example(
    ({"segment_lengths": [20, 60], "dilation_rates": [3, 7], "head_offsets": "interleaved"}, 60), 2, (0, 5, 0), 8, True
)
@example(
    ({"segment_lengths": [4, 65], "dilation_rates": [9, 1], "head_offsets": "grouped"}, 60), 1, (1, 4, 2), 8, False
)
@given(
    drawn=even_options(),
    batch=st.integers(1, 3),
    heads=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2)),
    head_dim=st.sampled_from([1, 4, 5, 8]),
    causal=st.booleans(),
)
def test_it_gives_what_views_give(drawn: tuple, batch: int, heads: tuple, head_dim: int, causal: bool) -> None:
    options, tokens = drawn
    first, count, more = heads
    exact = problem(batch, tokens, count, head_dim)
    rule = first, first + count + more
    expected = outcome(exact.qkv, exact.grad_out, options, rule, causal)
    given_ = (x.to(DEVICE, torch.float32) for x in (exact.qkv, exact.grad_out))
    for one, other in zip(outcome(*given_, options, rule, causal), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_what_kernels_give_is_mixed_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the inputs, whether or not a batch is too large for one launch."""
    own, given_ = flash._batches, []
    monkeypatch.setattr(flash, "_batches", lambda q, k: (slice(i, i + 1) for i in range(len(q))))
    monkeypatch.setattr(compact_kernels, "_rows", lambda x: given_.append(x) or x.transpose(1, 2).contiguous())
    options = {"segment_lengths": [8, 24], "dilation_rates": [1, 2], "head_offsets": "interleaved"}
    drawn = problem(2, 48, 4, 8)
    for batches in (own, flash._batches):
        monkeypatch.setattr(flash, "_batches", batches)
        outcome(drawn.qkv.to(DEVICE, torch.float32), drawn.grad_out.to(DEVICE, torch.float32), options, (0, 4), True)
    assert len(given_) == 2 * (2 + 2 * 3)
    assert all(x.transpose(1, 2).is_contiguous() for x in given_)


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(("causal", "rounded"), [(True, False), (True, True), (False, True)])
def test_it_is_the_patterns_softmax(monkeypatch: pytest.MonkeyPatch, causal: bool, rounded: bool) -> None:
    """Also where segments take more rows than they keep, to have lengths of which fast kernels run."""
    if rounded:
        monkeypatch.setattr(dilated_compact, "_ROUNDED_FROM", 1)
        monkeypatch.setattr(dilated_compact, "_ROUND", 5)
    options = {"segment_lengths": [8, 24, 48], "dilation_rates": [1, 2, 3]}
    exact = problem(2, 48, 4, 8, causal, torch.rand(2, 48) < 0.7)
    assert dilated_compact.takes(torch.zeros(2, 48, 4, 8), *options.values(), causal)
    backend = attention.build({"backend": "dilated", **options})

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor) -> Tensor:
        narrow = (x.to(DEVICE, torch.float32) for x in (q, k, v))
        return backend(*narrow, causal, mask.to(DEVICE)).to(q)

    found = exact.outcome(attend)
    expected = exact.outcome(lambda q, k, v, causal, mask: reference(backend.pattern, q, k, v, causal, mask))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
