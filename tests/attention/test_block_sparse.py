"""The xformers backend against the definition: both of its routes, the fmha one on a plain torch kernel."""

from __future__ import annotations

import importlib
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longnet_kit import attention
from longnet_kit.attention import block_sparse, block_sparse_fmha, block_sparse_merged, block_sparse_tensor
from longnet_kit.attention.block_sparse_pieces import pieces, staircase
from longnet_kit.attention.patterns import BlockSparse
from longnet_kit.testing import check_backend, run_checks
from tests.attention.oracle import Problem, problem, problems

attn_bias = pytest.importorskip("xformers.ops.fmha.attn_bias", reason="xformers has no wheel for this platform")

SMALL = {"backend": "xformers", "block_size": 16, "local_blocks": 2}
BOTH = pytest.mark.parametrize("layout", ["fixed", "local"])


@st.composite
def block_patterns(draw: st.DrawFn, block_sizes: st.SearchStrategy[int]) -> BlockSparse:
    local_blocks = draw(st.integers(1, 6))
    summary_blocks = draw(st.integers(1, local_blocks))
    return BlockSparse(draw(st.sampled_from(["fixed", "local"])), draw(block_sizes), local_blocks, summary_blocks)


def backend_of(pattern: BlockSparse, name: str = "xformers") -> attention.AttentionBackend:
    numbers = {key: getattr(pattern, key) for key in ("block_size", "local_blocks", "summary_blocks")}
    return attention.build({"backend": name, "pattern": pattern.layout, **numbers})


class Plain:
    """fmha's part, in plain torch under the materialised bias."""

    name = "plain"

    bias = staticmethod(block_sparse_fmha.Fmha.bias)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, bias, scale)
        lse = scores.logsumexp(-1)
        return torch.einsum("bhpk,bkhd->bphd", (scores - lse[..., None]).exp(), v.to(lse.dtype)).to(q.dtype), lse

    def backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        weights = (self._scores(q, k, bias, scale) - lse[..., None]).exp()
        grad, out, q, k, v = (x.to(lse.dtype) for x in (grad, out, q, k, v))
        dweights = torch.einsum("bphd,bkhd->bhpk", grad, v)
        dscores = weights * (dweights - (grad * out).sum(-1).transpose(1, 2)[..., None]) * scale
        dq, dk = torch.einsum("bhpk,bkhd->bphd", dscores, k), torch.einsum("bhpk,bphd->bkhd", dscores, q)
        return dq, dk, torch.einsum("bhpk,bphd->bkhd", weights, grad)

    def _scores(self, q: Tensor, k: Tensor, bias: Any, scale: float) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        scores = torch.einsum("bphd,bkhd->bhpk", q.to(exact), k.to(exact)) * scale
        return scores + bias.materialize((q.shape[1], k.shape[1]), exact)


def through_pieces(pattern: BlockSparse, kernel: block_sparse_merged.Kernel | None = None) -> Any:
    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None) -> Tensor:
        return block_sparse_merged.attend(q, k, v, pattern, causal, mask, kernel or Plain())

    return attend


@settings(deadline=None, max_examples=100)
@given(problems(max_seq_len=150), block_patterns(st.sampled_from([16, 17, 24, 33])))
def test_block_sparse_tensors_give_the_pattern(drawn: Problem, pattern: BlockSparse) -> None:
    drawn.assert_matches(backend_of(pattern), pattern)


@settings(deadline=None, max_examples=100)
@given(problems(max_seq_len=60), block_patterns(st.integers(1, 9)))
def test_merged_pieces_give_the_pattern(drawn: Problem, pattern: BlockSparse) -> None:
    drawn.assert_matches(through_pieces(pattern), pattern)


@settings(deadline=None, max_examples=100)
@given(problems(max_seq_len=150), block_patterns(st.sampled_from([1, 2, 5, 16, 33])))
def test_torchs_kernels_give_the_pattern(drawn: Problem, pattern: BlockSparse) -> None:
    drawn.assert_matches(backend_of(pattern, "block_sparse"), pattern)


@BOTH
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("seq_len", [1, 15, 16, 17, 97, 32 * 4, 32 * 4 + 1])
def test_the_hard_lengths(layout: str, causal: bool, seq_len: int) -> None:
    pattern = BlockSparse(layout, 16, 2, 1)  # type: ignore[arg-type]
    lone = torch.arange(seq_len).expand(3, -1) == torch.tensor([[0], [seq_len // 2], [seq_len - 1]])
    for mask in (None, lone):
        drawn = problem(3, seq_len, 2, 4, causal, mask)
        drawn.assert_matches(backend_of(pattern), pattern)
        drawn.assert_matches(backend_of(pattern, "block_sparse"), pattern)
        drawn.assert_matches(through_pieces(pattern), pattern)


@settings(deadline=None, max_examples=150)
@given(
    block_patterns(st.integers(1, 9)), st.integers(1, 3), st.integers(1, 60), st.booleans(), st.sampled_from([2, 65535])
)
def test_biases_show_each_visible_pair_once(
    pattern: BlockSparse, batch: int, seq_len: int, causal: bool, most: int
) -> None:
    tokens = torch.arange(batch * seq_len)
    shown = torch.zeros(len(tokens), len(tokens), dtype=torch.int32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block_sparse_merged, "MAX_SEGMENTS", most)
        block_sparse_merged.plan.cache_clear()
        key = (pattern.layout, pattern.block_size, pattern.local_blocks, pattern.summary_blocks)
        calls = block_sparse_merged.plan(key, batch, seq_len, causal, torch.device("cpu"), Plain.bias)
        block_sparse_merged.plan.cache_clear()
    for queries, keys, bias in calls:
        rows, columns = tokens[queries], tokens[keys]
        assert len(bias.q_seqinfo.seqstart_py) - 1 <= most
        assert len(rows.unique()) == len(rows)  # backward adds without accumulating
        assert len(columns.unique()) == len(columns)
        visible = bias.materialize((len(rows), len(columns))).isfinite()
        assert visible.any(1).all()  # no query of a call without a key: its lse would be -inf
        shown[rows[:, None], columns] += visible.int()
    expected = torch.block_diag(*[pattern.multiplicity(seq_len, 1, causal)[0]] * batch)
    assert torch.equal(shown, expected)


def test_pieces_are_few() -> None:
    assert len(pieces(BlockSparse("fixed", 64, 4, 1), 2**20, True)) == 1 + 12  # 4096 windows
    assert len(pieces(BlockSparse("fixed", 64, 4, 1), 2**20, False)) == 2
    assert len(pieces(BlockSparse("local", 64, 5), 2**20, False)) == 1 + 3


@given(st.integers(1, 70))
def test_a_staircase_is_every_pair_once(count: int) -> None:
    seen = torch.zeros(count, count, dtype=torch.int32)
    for level in staircase(count):
        for low, high in level:
            seen[high.start : high.stop, low.start : low.stop] += 1
    assert torch.equal(seen, torch.ones_like(seen).tril(-1))


@BOTH
def test_rows_of_very_different_scores_stay_exact(layout: str) -> None:
    """Rows 55 nats and more below the batch's largest score, which xformers' own softmax does not normalise."""
    drawn = problem(2, 90, 2, 8)
    drawn.qkv[:, ::3, 0] *= 100
    drawn.qkv[0, :, 1] -= 30
    drawn.qkv[1, :, 1] *= 10  # and rows whose own scores lie further apart than exp reaches
    pattern = BlockSparse(layout, 16, 2, 1)  # type: ignore[arg-type]
    drawn.assert_matches(backend_of(pattern), pattern)
    drawn.assert_matches(through_pieces(pattern), pattern)


@BOTH
@pytest.mark.parametrize("causal", [True, False])
def test_a_row_does_not_depend_on_what_it_cannot_see(layout: str, causal: bool) -> None:
    """Not in the last bit either: neither the future nor the rest of the batch enters a row's softmax."""
    backend = attention.build({**SMALL, "pattern": layout})
    qkv = torch.randn(2, 100, 3, 2, 8)
    other = qkv.clone()
    other[1] *= 50
    if causal:
        other[0, 50:] *= 50
    (q, k, v), (other_q, other_k, other_v) = qkv.unbind(2), other.unbind(2)
    before, after = backend(q, k, v, causal)[0], backend(other_q, other_k, other_v, causal)[0]
    assert torch.equal(before[: 50 if causal else None], after[: 50 if causal else None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@BOTH
def test_every_dtype_is_as_good_as_its_rounding(layout: str, dtype: torch.dtype) -> None:
    backend = attention.build({**SMALL, "pattern": layout})
    drawn = problem(2, 70, 2, 8, mask=torch.rand(2, 70) < 0.8)
    drawn.qkv = drawn.qkv.to(dtype).double()
    drawn.grad_out = drawn.grad_out.to(dtype).double()
    rounded = Problem(drawn.qkv.to(dtype), drawn.grad_out.to(dtype), drawn.causal, drawn.mask)
    for given_, exact in zip(rounded.outcome(backend), drawn.outcome(backend), strict=True):
        assert given_.dtype == dtype
        # One rounding at the end is half an eps; float32 also rounds on the way.
        roundings = 16 if dtype == torch.float32 else 0.6
        assert (given_ - exact).abs().max() < roundings * torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_runs_under_autocast_and_compile(compiled: bool, padded: bool) -> None:
    backend = backend_of(BlockSparse("fixed", 16, 2, 1))
    run = torch.compile(backend, backend="aot_eager") if compiled else backend
    mask = torch.arange(50).expand(2, 50) < torch.tensor([[50], [9]]) if padded else None
    drawn = problem(2, 50, 2, 8, mask=mask)
    torch._dynamo.reset()
    drawn.assert_matches(run, backend.pattern)  # float64 is left alone by autocast as well
    with torch.autocast("cpu", torch.bfloat16):
        drawn.assert_matches(run, backend.pattern)
        qkv = drawn.qkv.float().requires_grad_()
        q, k, v = qkv.unbind(2)
        out = run(q, k, v, key_padding_mask=mask)
    assert out.dtype == torch.bfloat16
    assert (out - drawn.outcome(backend)[0]).abs().max() < 0.04
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad.dtype == torch.float32
    assert grad.isfinite().all()


def test_pieces_are_mixed_exactly_under_autocast() -> None:
    drawn = problem(1, 70, 2, 8)
    drawn = Problem(drawn.qkv.float(), drawn.grad_out.float(), drawn.causal, drawn.mask)
    run = through_pieces(BlockSparse("fixed", 4, 3, 1))
    exact = drawn.outcome(run)
    with torch.autocast("cpu", torch.bfloat16):  # around backward as well
        again = drawn.outcome(run)
    assert all(torch.equal(x, y) for x, y in zip(exact, again, strict=True))


def test_a_first_run_in_inference_mode_does_not_spoil_training() -> None:
    block_sparse_tensor._visible.cache_clear()
    block_sparse_merged.plan.cache_clear()
    pattern = BlockSparse("fixed", 16, 2, 1)
    for run in (backend_of(pattern), through_pieces(pattern)):
        with torch.inference_mode():
            problem_in_inference = torch.randn(1, 70, 2, 8)
            run(problem_in_inference, problem_in_inference, problem_in_inference, True, None)
        problem(1, 70, 2, 8).assert_matches(run, pattern)


def test_the_same_inputs_give_the_same_bits() -> None:
    backend = attention.build(SMALL).eval()
    qkv = torch.randn(2, 200, 3, 2, 16)
    q, k, v = qkv.unbind(2)
    first, *others = (backend(q, k, v) for _ in range(4))
    assert all(torch.equal(first, other) for other in others)


@BOTH
@pytest.mark.parametrize("causal", [True, False])
def test_uninitialised_memory_is_never_read(layout: str, causal: bool) -> None:
    pattern = BlockSparse(layout, 16, 2, 1)  # type: ignore[arg-type]
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    try:
        for run in (backend_of(pattern), through_pieces(pattern)):
            problem(2, 77, causal=causal).assert_matches(run, pattern)
    finally:
        torch.use_deterministic_algorithms(False)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements that any operation gave."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_memory_is_that_of_the_visible_blocks() -> None:
    seq_len = 8192
    backend = attention.build({**SMALL, "pattern": "local"})
    q = torch.randn(1, seq_len, 1, 4, requires_grad=True)
    with LargestTensor() as seen:
        backend(q, q, q).sum().backward()
    blocks = -(-seq_len // 16)
    assert seen.largest <= max(2 * blocks * 16 * 16, blocks * blocks)  # scores; the layout, a byte each
    assert seen.largest < seq_len * seq_len / 200


def test_layouts_are_built_once() -> None:
    backend = attention.build(SMALL)
    block_sparse_tensor._visible.cache_clear()
    for heads, seq_len in ((1, 65), (3, 70), (2, 80)):
        q = torch.randn(1, seq_len, heads, 4)
        backend(q, q, q)
    assert block_sparse_tensor._visible.cache_info().misses == 1  # all are five blocks


def test_slices_of_a_fused_projection_reach_the_kernel_without_a_copy() -> None:
    seen = []

    class Spy(Plain):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
            seen.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
            return super().forward(q, k, v, bias, scale)

    qkv = torch.randn(2, 24, 3, 2, 8)
    through_pieces(BlockSparse("fixed", 4, 2, 1), Spy())(*qkv.unbind(2), True, None)
    assert seen[0] == tuple(x.data_ptr() for x in qkv.unbind(2))


@pytest.mark.parametrize(("most", "calls"), [(24 * 2 * 8, 3), (2 * 24 * 2 * 8, 2), (10**9, 1)])
def test_batches_too_large_for_32_bits_are_split(monkeypatch: pytest.MonkeyPatch, most: int, calls: int) -> None:
    monkeypatch.setattr(block_sparse_merged, "MAX_ELEMENTS", most)
    seen = []

    class Spy(Plain):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
            seen.append(q.shape)
            return super().forward(q, k, v, bias, scale)

    pattern = BlockSparse("fixed", 4, 6, 1)  # one window, so one call for each part of the batch
    problem(3, 24, 2, 8).assert_matches(through_pieces(pattern, Spy()), pattern)
    assert len(seen) == calls


def test_a_sequence_too_large_for_32_bits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse_merged, "MAX_ELEMENTS", 100)
    with pytest.raises(ValueError, match=r"one sequence of \(24, 2, 8\).*384 elements.*at most 100: shorten"):
        problem(1, 24, 2, 8).outcome(through_pieces(BlockSparse("fixed", 4, 2, 1)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_probe_accepts_a_right_kernel(dtype: torch.dtype) -> None:
    assert block_sparse_fmha.check(Plain(), torch.device("cpu"), dtype, 16) == ""
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):  # whatever the first call is wrapped in
        assert block_sparse_fmha.check(Plain(), torch.device("cpu"), dtype, 16) == ""


class ForgetsMixing(Plain):
    """Differentiates each piece by itself: the gradient of the mixing weights is lost."""

    def backward(self, grad: Tensor, out: Tensor, lse: Tensor, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        own_out, own_lse = super().forward(*inputs)
        weight = (lse - own_lse).exp().transpose(1, 2)[..., None]
        return super().backward(grad / weight, own_out, own_lse, *inputs)


class IgnoresBias(Plain):
    def _scores(self, q: Tensor, k: Tensor, bias: Any, scale: float) -> Tensor:
        return torch.einsum("bphd,bkhd->bhpk", q, k).float() * scale


class NaturalBase2(Plain):
    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*inputs)
        return out, lse / 0.6931


class NaN(Plain):
    def forward(self, *inputs: Any) -> tuple[Tensor, Tensor]:
        out, lse = super().forward(*inputs)
        return out * float("nan"), lse


@pytest.mark.parametrize(
    ("kernel", "words"),
    [(ForgetsMixing, "dq"), (IgnoresBias, "out"), (NaturalBase2, "out"), (NaN, "out is off by nan")],
)
def test_the_probe_refuses_a_wrong_kernel(kernel: type[Plain], words: str) -> None:
    assert words in block_sparse_fmha.check(kernel(), torch.device("cpu"), torch.float32, 16)


@pytest.mark.parametrize("module", ["flash3", "flash"])
def test_the_operators_take_these_biases_forward_and_backward(module: str) -> None:
    operators = importlib.import_module(f"xformers.ops.fmha.{module}")
    biases = {attn_bias.BlockDiagonalMask, attn_bias.BlockDiagonalCausalFromBottomRightMask}
    for operator in (operators.FwOp, operators.BwOp):
        assert biases <= set(operator.SUPPORTED_ATTN_BIAS_TYPES)
        assert set(block_sparse_fmha.DTYPES) <= operator.SUPPORTED_DTYPES
        assert operator.VARLEN_LSE_PACKED  # (1, H, tokens)
        assert operator.SUPPORTS_CUSTOM_SCALE


def test_the_route_is_told_with_its_reason() -> None:
    backend = block_sparse.BlockSparseAttention()
    cpu = backend.route("cpu", torch.bfloat16)
    assert cpu == ("BlockSparseTensor", "fmha has no kernels for cpu, only for cuda")
    for dtype in (torch.float32, torch.float64):
        name, refusal = backend.route("cuda", dtype)
        assert name == "BlockSparseTensor"
        assert f"not in {dtype}" in refusal


@pytest.mark.skipif(torch.cuda.is_available(), reason="here the kernels may well run")
def test_a_refusal_says_what_was_tried() -> None:
    kernel, refusal = block_sparse_fmha.probe(torch.device("cuda"), torch.bfloat16, 64)
    assert kernel is None
    assert "flash3: " in refusal
    assert "flash: " in refusal


def test_the_route_that_passed_is_the_one_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_sparse_fmha, "probe", lambda *_: (Plain(), ""))
    monkeypatch.setattr(block_sparse_tensor, "attend", None)
    backend = backend_of(BlockSparse("fixed", 16, 2, 1))
    assert backend.route("cpu", torch.float64) == ("fmha", "")
    problem(2, 70, 2, 8, mask=torch.rand(2, 70) < 0.5).assert_matches(backend, backend.pattern)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_cuda_gives_what_the_cpu_gives(dtype: torch.dtype) -> None:
    pattern = BlockSparse("fixed", 16, 2, 1)
    backend = backend_of(pattern)
    print(backend.route("cuda", dtype))
    drawn = problem(2, 150, 2, 64, mask=torch.rand(2, 150) < 0.8)
    there = Problem(drawn.qkv.cuda().to(dtype), drawn.grad_out.cuda().to(dtype), True, drawn.mask.cuda())  # type: ignore[union-attr]
    bound = {torch.float64: 1e-12, torch.float32: 1e-2}.get(dtype, 5e-2)
    for given_, exact in zip(there.outcome(backend), drawn.outcome(backend), strict=True):
        assert (given_.cpu() - exact).abs().max() < bound * exact.abs().max()


@BOTH
def test_the_conformance_check_passes(layout: str) -> None:
    check_backend(attention.build({**SMALL, "pattern": layout}))


def test_the_conformance_check_refuses_blocks_one_too_many() -> None:
    backend = block_sparse.BlockSparseAttention("local", 16, 2)
    backend.forward = block_sparse.BlockSparseAttention("local", 16, 3).forward  # type: ignore[method-assign]
    assert any(check.passed is False for check in run_checks(backend))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"pattern": "strided"}, "pattern: got 'strided'.*'fixed'"),
        ({"block_size": 15}, "block_size: got 15, expected at least 16"),
        ({"block_size": "64"}, "block_size: got '64'"),
        ({"local_blocks": 0}, "local_blocks: got 0, expected at least 1"),
        ({"local_blocks": 2, "summary_blocks": 3}, "summary_blocks is 3.*local_blocks"),
        ({"summary_block": 1}, "did you mean 'summary_blocks'"),
    ],
)
def test_wrong_options_are_refused_by_key(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention.build({"backend": "xformers", **options})


def test_small_blocks_are_refused_from_python_too() -> None:
    with pytest.raises(ValueError, match="block_size is 8; xformers takes blocks of at least 16"):
        block_sparse.BlockSparseAttention(block_size=8)


def test_other_devices_are_refused() -> None:
    q = torch.zeros(1, 4, 1, 8, device="meta")
    with pytest.raises(ValueError, match="on meta: use sdpa or dilated"):
        attention.build(SMALL)(q, q, q)


def test_without_xformers_the_error_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)
    monkeypatch.setitem(sys.modules, "xformers.sparse", None)
    block_sparse_tensor.problem.cache_clear()
    q = torch.zeros(1, 4, 1, 8)
    try:
        backend = attention.build(SMALL)  # building needs no xformers
        with pytest.raises(ValueError, match=r"cannot import xformers.sparse .*pip install xformers"):
            backend(q, q, q)
    finally:
        block_sparse_tensor.problem.cache_clear()


def test_xformers_is_imported_on_first_use_and_quietly() -> None:
    code = """if True:
        import sys, torch
        from longnet_kit import attention
        from longnet_kit.attention import block_sparse
        backend = attention.build({"backend": "xformers"})
        assert not any(name.partition(".")[0] == "xformers" for name in sys.modules)
        q = torch.zeros(1, 4, 1, 8)
        backend(q, q, q)
        assert "xformers" in sys.modules
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
