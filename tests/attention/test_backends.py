"""Every backend of the kit against the definition: one softmax over the pattern's multiset of keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention import sharding
from longnet_kit.errors import UserError
from longnet_kit.parallel import threads
from tests.attention.oracle import Problem, dilated_options, problem, problems

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")

CONFIGS = {
    "naive": {"backend": "naive"},
    "naive dilated": {
        "backend": "naive",
        "pattern": {"kind": "dilated", "segment_lengths": [4, 10], "dilation_rates": [1, 3]},
    },
    "sdpa": {"backend": "sdpa"},
    "dilated": {"backend": "dilated", "segment_lengths": [4, 10, 64], "dilation_rates": [1, 3, 5]},
}
compilable = pytest.mark.parametrize("name", CONFIGS)


@given(problems())
def test_sdpa_is_dense_attention(drawn: Problem) -> None:
    backend = attention.build({"backend": "sdpa"})
    drawn.assert_matches(backend, backend.pattern)


@settings(max_examples=200)
@given(problems(), dilated_options())
def test_dilated_is_one_softmax_over_all_branches(drawn: Problem, options: dict) -> None:
    backend = attention.build({"backend": "dilated", **options})
    drawn.assert_matches(backend, backend.pattern)


@given(problems(), dilated_options())
def test_naive_takes_any_pattern(drawn: Problem, options: dict) -> None:
    backend = attention.build({"backend": "naive", "pattern": {"kind": "dilated", **options}})
    drawn.assert_matches(backend, backend.pattern)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("seq_len", "heads", "lengths", "rates"),
    [
        (50, 4, [48], [6]),  # like the paper's 16384 / 6: here w is a multiple ...
        (50, 4, [16, 32], [1, 6]),  # ... and here it is not
        (100, 12, [16, 32, 64], [1, 6, 12]),
        (7, 3, [3, 3, 3], [2, 1, 2]),  # repeated branches, rate 1 in the middle
        (1, 5, [4], [1]),
        (31, 2, [64], [5]),  # w > N, r > H
        (24, 3, [2, 24], [5, 1]),  # r > w
        (41, 7, [1, 41], [1, 40]),
    ],
)
def test_dilated_on_the_hard_shapes(causal: bool, seq_len: int, heads: int, lengths: list, rates: list) -> None:
    for head_offsets in ("interleaved", "grouped", "none"):
        backend = attention.build(
            {
                "backend": "dilated",
                "segment_lengths": lengths,
                "dilation_rates": rates,
                "head_offsets": head_offsets,
            }
        )
        for mask in (None, torch.rand(3, seq_len) < 0.7):
            problem(3, seq_len, heads, 8, causal, mask).assert_matches(backend, backend.pattern)


def test_positions_that_no_branch_keeps_output_zero_and_get_no_gradient() -> None:
    backend = attention.build({"backend": "dilated", "segment_lengths": [8], "dilation_rates": [4]})
    out, grad = problem(1, 16, 2, causal=False).outcome(backend)
    kept = backend.pattern.keeps((8, 4), 16, 2).T  # (N, H)
    assert (out[0][~kept] == 0).all() and (grad[0].transpose(0, 1)[:, ~kept] == 0).all()
    assert (out[0][kept] != 0).all()


@pytest.mark.parametrize("rates", [[1, 3], [2, 3]])
def test_uninitialised_memory_is_never_read(rates: list[int]) -> None:
    backend = attention.build({"backend": "dilated", "segment_lengths": [4, 10], "dilation_rates": rates})
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        problem(2, 23).assert_matches(backend, backend.pattern)
    finally:
        torch.use_deterministic_algorithms(False)


def test_scores_as_large_as_trained_models_give_them_stay_exact() -> None:
    drawn = problem(1, 40, 2, 8)
    drawn.qkv[:, :, :2] *= 30  # denominators far beyond the range of exp
    backend = attention.build({"backend": "dilated", "segment_lengths": [8, 40], "dilation_rates": [1, 2]})
    drawn.assert_matches(backend, backend.pattern)


EVERY = {
    **CONFIGS,
    "set": {**CONFIGS["dilated"], "overlap": "set"},
    "equal": {**CONFIGS["dilated"], "mixing": "equal"},
    "block_sparse": {"backend": "block_sparse", "block_size": 4, "local_blocks": 2},
    "xformers": {"backend": "xformers", "block_size": 16},
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_scores_are_exact_in_half_precision_on_every_route(name: str, dtype: torch.dtype) -> None:
    """Inputs of deviation 4 give scores up to 100: rounded to half precision before the softmax, weights are off."""
    backend = attention.build(EVERY[name])
    qkv = torch.randn(2, 40, 3, 3, 16).mul_(torch.tensor([4, 4, 1])[:, None, None]).to(dtype)
    q, k, v = qkv.unbind(2)
    given = [x.double() for x in (q, k, v)]
    mask = torch.arange(40) < torch.tensor([[40], [23]])
    near = 2 * torch.finfo(dtype).eps * v.abs().max()

    def work(shard: threads.ThreadShard) -> Tensor:
        own = attention.build(EVERY[name])
        sharding.bind(own, shard)
        return own(*(x.chunk(2, 1)[shard.rank] for x in (q, k, v)))

    for causal in (True, False):
        for padding in (None, mask):
            expected = backend(*given, causal, padding)
            assert (backend(q, k, v, causal, padding) - expected).abs().max() < near
            with torch.autocast("cpu", dtype):
                assert (backend(q.float(), k.float(), v.float(), causal, padding) - expected).abs().max() < near
    expected = backend(*given)
    if name != "set":
        cache = backend.new_cache(2, 3, 16, dtype=dtype, max_tokens=40)
        steps = [backend(q[:, s], k[:, s], v[:, s], cache=cache) for s in (slice(17), slice(17, 18), slice(18, 40))]
        assert (torch.cat(steps, 1) - expected).abs().max() < near
    if EVERY[name]["backend"] in ("naive", "sdpa"):  # with branches in test_sharding
        heads = [x.repeat(1, 1, 2, 1) for x in (q, k, v)]
        q, k, v = heads
        sharded = torch.cat(threads.run(2, work), 1)
        assert (sharded - backend(*(x.double() for x in heads))).abs().max() < near
    found, right = (backend.attention_map(x, y) for x, y in (qkv.unbind(2)[:2], given[:2]))
    assert (found - right).abs().max() < 1e-4
    if backend.branches:
        found, right = (backend.branch_weights(x, y) for x, y in (qkv.unbind(2)[:2], given[:2]))
        assert (found - right).abs().max() < 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", EVERY)
def test_scores_beyond_half_precision_do_no_harm(name: str, dtype: torch.dtype) -> None:
    q = torch.full((1, 20, 2, 16), 300.0, dtype=dtype)
    v = torch.ones_like(q)
    backend = attention.build(EVERY[name])
    assert (backend(q, q, v) - 1).abs().max() < 0.02  # an lse of 360,000 is exact to 1 / 64 in float32
    with torch.autocast("cpu", dtype):
        assert (backend(q.float(), q.float(), v.float()) - 1).abs().max() < 0.02


def test_an_lse_of_zero_counts() -> None:
    """One key of score 0 has a log denominator of exactly 0; it is not "nothing seen yet"."""
    q = torch.zeros(1, 4, 1, 2, dtype=torch.float64)
    v = torch.arange(8.0, dtype=torch.float64).view(1, 4, 1, 2)
    out = attention.build({"backend": "dilated", "segment_lengths": [1, 4], "dilation_rates": [1, 1]})(q, q, v)
    assert torch.allclose(out[0, 1, 0], (v[0, 0, 0] + 2 * v[0, 1, 0]) / 3)


@compilable
@pytest.mark.parametrize("padded", [False, True])
def test_compiles_without_a_graph_break(name: str, padded: bool) -> None:
    backend = attention.build(CONFIGS[name])
    mask = torch.arange(21).expand(2, 21) < torch.tensor([[21], [9]]) if padded else None
    drawn = problem(2, 21, 3, 8, mask=mask)
    torch._dynamo.reset()
    compiled = torch.compile(backend, backend="aot_eager", fullgraph=True)
    drawn.assert_matches(compiled, backend.pattern)


@compilable
def test_autocast_casts_and_compiles(name: str) -> None:
    backend = attention.build(CONFIGS[name])
    qkv = torch.randn(2, 21, 3, 3, 8, requires_grad=True)
    exact = backend(*qkv.detach().double().unbind(2))
    torch._dynamo.reset()
    for run in (backend, torch.compile(backend, backend="aot_eager", fullgraph=True)):
        with torch.autocast("cpu", torch.bfloat16):
            out = run(*qkv.unbind(2))
        assert out.dtype == torch.bfloat16
        assert (out - exact).abs().max() < 0.04
        (grad,) = torch.autograd.grad(out.sum(), qkv)
        assert grad.dtype == torch.float32 and grad.isfinite().all()


@compilable
def test_first_head_and_total_heads_are_checked(name: str) -> None:
    backend = attention.build(CONFIGS[name])
    q = torch.randn(1, 4, 2, 4)
    if backend.head_dependent:
        with pytest.raises(ValueError, match="total_heads is 2"):
            backend(q, q, q, first_head=1, total_heads=2)


X = torch.zeros(2, 5, 3, 4)


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ((X[0], X, X), "q has shape"),
        ((X, X[:, :4], X), "k has shape"),
        ((X, X, X[..., :2]), "v has shape"),
        ((X.long(), X.long(), X.long()), "int64"),
        ((X, X.double(), X), "cast them to one dtype"),
        ((X, X, X.to("meta")), "move them to one device"),
        ((X[:, :0], X[:, :0], X[:, :0]), "at least 1"),
        ((X, X, None), "NoneType"),
        ((X, X, X, True, torch.ones(2, 5)), "bool"),
        ((X, X, X, True, torch.ones(2, 4, dtype=torch.bool)), "expected"),
        ((X, X, X, True, torch.ones(2, 5, dtype=torch.bool, device="meta")), "meta"),
    ],
)
@compilable
def test_wrong_inputs_are_refused(name: str, inputs: tuple, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention.build(CONFIGS[name])(*inputs)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"backend": "dilatedd"}, "did you mean 'dilated'"),
        ({}, "expected one of"),
        ({"backend": "dilated", "segment_length": [4], "rates": [1]}, "did you mean 'segment_lengths'.*rates"),
        ({"backend": "dilated", "segment_lengths": "4", "dilation_rates": [1]}, "segment_lengths: got '4'"),
        ({"backend": "dilated", "segment_lengths": [4, 0], "dilation_rates": [1, 2]}, r"segment_lengths\[1\]: got 0"),
        ({"backend": "sdpa", "dropout": 0.1}, "dropout: unknown key"),
    ],
)
def test_a_wrong_configuration_is_refused_by_key(config: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        attention.build(config)


def test_registering_a_taken_name_raises() -> None:
    with pytest.raises(ValueError, match="already registered by longnet_kit.attention.sdpa.SDPA"):
        attention.register("sdpa")(attention.AttentionBackend)
    assert {"dilated", "naive", "sdpa"} <= set(attention.names())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda out: out.flatten(2), r"returns shape \(1, 8, 8\), expected that of q, \(1, 8, 2, 4\)"),
        (lambda out: out.double(), r"returns torch.float64, expected torch.float32"),
        (lambda out: out.to("meta"), "returns a tensor on meta, expected one on cpu"),
        (lambda out: (out, None), "returns a tuple, expected a tensor"),
    ],
)
def test_an_output_is_checked_at_the_door(spoil: Any, words: str) -> None:
    class Spoilt(attention.AttentionBackend):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, mask: Tensor | None = None) -> Tensor:
            return spoil(v)

        def new_cache(self, *args: Any, **factory: Any) -> attention.KeyValueCache:
            return attention.KeyValueCache(*args, **factory)

        def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: Any) -> Tensor:
            return spoil(v)

    def work(shard: threads.ThreadShard) -> None:
        own = Spoilt()
        sharding.bind(own, shard)
        with pytest.raises(UserError, match=words.split(",")[0].replace("8, 8", "16, 4")):
            own(q, q, q)

    q, whole = torch.zeros(1, 8, 2, 4), f"Spoilt {words}.*longnet check-backend"
    with pytest.raises(UserError, match=whole):
        Spoilt()(q, q, q)
    with pytest.raises(UserError, match=whole):
        Spoilt()(q, q, q, cache=Spoilt().new_cache(1, 2, 4, max_tokens=8))
    threads.run(2, work)


def test_the_message_about_an_output_has_the_registered_name(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = attention.build({"backend": "sdpa"})
    monkeypatch.setattr(backend, "forward", lambda q, *_: q[:, :1])
    q = torch.zeros(1, 8, 2, 4)
    with pytest.raises(UserError, match="the attention backend sdpa returns"):
        backend(q, q, q)


def test_an_unknown_name_says_where_plug_ins_are_listed() -> None:
    with pytest.raises(UserError, match=r"unknown attention backend 'mine'; known: .*listed under imports:"):
        attention.build({"backend": "mine"})
