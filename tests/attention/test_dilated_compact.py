"""The way of a GPU: rows gathered, a kernel per branch, one mix. Without one, triton's interpreter runs the kernels."""

from __future__ import annotations

import logging
import math
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention import dilated, dilated_compact, flash
from longnet_kit.plan.ledger import run_backward, without_data
from longnet_kit.testing import reference
from tests.attention.oracle import problem

pytest.importorskip("triton", reason="needs triton, which comes with torch's CUDA builds and with the extra dev")

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
    branches = [(min(w, tokens), r) for w, r in zip(options["segment_lengths"], options["dilation_rates"], strict=True)]
    return sum(math.ceil(w / r) / w for w, r in branches) <= 3 and all(causal or w % r == 0 for w, r in branches)


def laid(qkv: Tensor, layout: str) -> Tensor:
    """(B, N, 3, H, D) of the same numbers, or of its first sequence's where a batch is expanded."""
    if layout == "heads first":
        return qkv.permute(0, 3, 2, 1, 4).contiguous().permute(0, 3, 2, 1, 4)
    if layout == "tokens first":
        return qkv.transpose(0, 1).contiguous().transpose(0, 1)
    return qkv[:1].expand_as(qkv) if layout == "expanded" else qkv


@pytest.mark.usefixtures("everywhere")
@settings(max_examples=25)
@example(
    ({"segment_lengths": [20, 60], "dilation_rates": [3, 7], "head_offsets": "interleaved"}, 60), 2, (0, 5, 0), 8, True,
    "fused", False,
)  # fmt: skip
@example(
    ({"segment_lengths": [4, 65], "dilation_rates": [9, 1], "head_offsets": "grouped"}, 60), 1, (1, 4, 2), 8, False,
    "heads first", True,
)  # fmt: skip
@given(
    drawn=even_options(),
    batch=st.integers(1, 3),
    heads=st.tuples(st.integers(0, 3), st.integers(1, 5), st.integers(0, 2)),
    head_dim=st.sampled_from([1, 4, 5, 8]),
    causal=st.booleans(),
    layout=st.sampled_from(["fused", "heads first", "tokens first", "expanded"]),
    same_gradient=st.booleans(),
)
def test_it_gives_what_views_give(
    drawn: tuple, batch: int, heads: tuple, head_dim: int, causal: bool, layout: str, same_gradient: bool
) -> None:
    options, tokens = drawn
    first, count, more = heads
    exact = problem(batch, tokens, count, head_dim)
    rule = first, first + count + more
    if same_gradient:  # as `sum().backward()` gives
        exact.grad_out = torch.ones((), dtype=torch.float64).expand_as(exact.grad_out)
    expected = outcome(laid(exact.qkv, layout), exact.grad_out, options, rule, causal)
    qkv = laid(exact.qkv.to(DEVICE, torch.float32), layout)
    grad_out = exact.grad_out.to(DEVICE, torch.float32).expand_as(exact.grad_out)
    for one, other in zip(outcome(qkv, grad_out, options, rule, causal), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("everywhere")
def test_what_kernels_give_is_mixed_without_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the layout of the inputs, whether or not a batch is too large for one launch."""
    own, given_ = flash._batches, []
    monkeypatch.setattr(flash, "_batches", lambda q, k: (slice(i, i + 1) for i in range(len(q))))
    side_by_side = dilated_compact._side_by_side
    monkeypatch.setattr(dilated_compact, "_side_by_side", lambda x: given_.append(x) or side_by_side(x))
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


@pytest.mark.usefixtures("everywhere")
@pytest.mark.parametrize(
    ("change", "taken"),
    [
        ({}, True),
        ({"lengths": [16, 48]}, False),  # 64 tokens are four segments of 16, and no whole number of 48
        ({"lengths": [8, 8, 8, 8], "rates": [1, 1, 1, 1]}, False),  # four copies
        ({"lengths": [1] * 4, "rates": [100] * 4}, False),  # a row each of every segment
        ({"rates": [1, 3], "causal": False}, False),  # 32 is no multiple of 3
        ({"dtype": torch.float64}, False),
        ({"shape": (2**20, 64, 16)}, False),  # more rows than 32 bits count
    ],
)
def test_what_it_takes(change: dict, taken: bool) -> None:
    asked = {"lengths": [8, 32], "rates": [1, 3], "causal": True, "dtype": torch.float32, "shape": (2, 64, 4)} | change
    q = torch.empty(*asked["shape"], 8, dtype=asked["dtype"], device="meta")
    assert dilated_compact.takes(q, asked["lengths"], asked["rates"], asked["causal"]) == taken


@pytest.mark.usefixtures("everywhere")
def test_without_triton_views_are_taken_and_that_is_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(attention, "compact_kernels", raising=False)
    monkeypatch.setitem(sys.modules, "longnet_kit.attention.compact_kernels", None)
    dilated_compact._kernels.cache_clear()
    try:
        q = torch.randn(1, 16, 2, 4)
        with caplog.at_level(logging.WARNING):
            for _ in range(2):
                assert not dilated_compact.takes(q, [4, 16], [1, 2], True)
        assert caplog.text.count("triton does not run here") == 1
    finally:
        dilated_compact._kernels.cache_clear()


@pytest.mark.skipif(DEVICE == "cuda", reason="the large tensor is a file of holes, which a GPU cannot read")
def test_heads_may_be_far_apart(tmp_path: Path) -> None:
    """Beyond what 32 bits address."""
    step = 2**30 + 16
    flat = torch.from_file(str(tmp_path / "holes"), shared=True, size=2 * step + 64, dtype=torch.float16)
    x = flat.as_strided((1, 4, 3, 2), (0, 2, step, 1))
    x[:] = torch.randn(1, 4, 3, 2)
    branch = dilated_compact.Branch(4, 2, 2)
    (found,), _ = dilated_compact._compact((x,), None, branch, dilated_compact.Heads("none", 0, 3))
    assert torch.equal(found, x[:, ::2].transpose(1, 2))


def test_a_plan_counts_what_it_allocates() -> None:
    """In tensors of q's size: at the second branch, whose rows are gathered, and not later, most is there."""
    size = 2**16 * 4 * 8 * 4  # bytes
    backend = attention.build(
        {"backend": "dilated", "segment_lengths": [2**14, 2**15, 2**16], "dilation_rates": [1, 2, 4]}
    )
    with without_data(cuda=True) as ledger:
        q, k, v = (torch.empty(1, 2**16, 4, 8, requires_grad=True) for _ in range(3))
        ledger.phase = "forward"
        out = backend(q, k, v)
        ledger.phase = "backward"
        run_backward(out, torch.empty_like(out))
    peaks = {phase: sum(peak.values()) / size for phase, peak in ledger.peaks().items()}
    lse = 3 / 8  # at most: one for the eight elements of a head, mixed, gathered, of branches
    assert (
        3 + 1 + 3 / 2 + 1 / 2 <= peaks["forward"] <= 6 + lse
    )  # q, k, v; a first result; rows of q, k, v; their result
    assert 5 + 3 + 5 / 2 + 3 / 2 <= peaks["backward"] <= 12 + lse  # out and its gradient too; gradients of three
