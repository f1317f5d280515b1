"""How much of each query's attention goes to each branch: LongNet eq. 10, by three routes that must agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention import maps, patterns
from longnet_kit.attention.sharding import bind
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from tests.attention.oracle import EXACT, Problem, dilated_options, problem, problems
from tests.attention.test_sharding import cases

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
ORDERED: dict[str, Any] = {"segment_lengths": [40, 4, 10], "dilation_rates": [4, 1, 3]}


def direct(pattern: patterns.Dilated, drawn: Problem, first_head: int = 0, total_heads: int | None = None) -> Tensor:
    """e^lse_i / sum_j e^lse_j, one query at a time: (branches, B, N, H)."""
    q, k, _ = drawn.qkv.unbind(2)
    batch, seq_len, heads, head_dim = q.shape
    denominators = torch.zeros(len(pattern.branches), batch, seq_len, heads, dtype=torch.float64)
    for i, branch in enumerate(pattern.branches):
        m = pattern.branch_multiplicity(branch, seq_len, total_heads or heads, drawn.causal)
        m = m[first_head : first_head + heads].bool()
        for b in range(batch):
            real = torch.ones(seq_len, dtype=torch.bool) if drawn.mask is None else drawn.mask[b]
            for h in range(heads):
                for p in real.nonzero().flatten():
                    keys = (m[h, p] & real).nonzero().flatten()
                    denominators[i, b, p, h] = (k[b, keys, h] @ q[b, p, h] / head_dim**0.5).exp().sum()
    total = denominators.sum(0)
    return denominators / torch.where(total == 0, 1, total)


def weights(backend: attention.AttentionBackend, drawn: Problem, **heads: int) -> Tensor:
    q, k, _ = drawn.qkv.unbind(2)
    return backend.branch_weights(q, k, drawn.causal, drawn.mask, **heads)


def both(options: dict[str, Any]) -> tuple[attention.AttentionBackend, attention.AttentionBackend]:
    """The fast way and the default one."""
    slow = {"backend": "naive", "pattern": {"kind": "dilated", **options}}
    return attention.build({"backend": "dilated", **options}), attention.build(slow)


@given(drawn=problems(), options=dilated_options())
def test_both_ways_give_the_share_of_each_branch(drawn: Problem, options: dict[str, Any]) -> None:
    fast, slow = both(options)
    expected = direct(fast.pattern, drawn)  # type: ignore[arg-type]
    for backend in (fast, slow):
        found = weights(backend, drawn)
        assert found.dtype == torch.float64 and not found.requires_grad
        assert (found - expected).abs().max() < EXACT


@given(drawn=problems(), options=dilated_options())
def test_shares_sum_to_one_where_a_branch_keeps_the_position(drawn: Problem, options: dict[str, Any]) -> None:
    fast, _ = both(options)
    batch, seq_len, _, heads, _ = drawn.qkv.shape
    kept = torch.stack([fast.pattern.keeps(b, seq_len, heads).T for b in fast.branches])[:, None]  # type: ignore[union-attr]
    kept = kept.expand(-1, batch, -1, -1)
    if drawn.mask is not None:
        kept = kept & drawn.mask[None, :, :, None]
    found = weights(fast, drawn)
    assert (found[~kept] == 0).all() and (found[kept] > 0).all()
    assert (found.sum(0) - kept.any(0).double()).abs().max() < EXACT


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_shares_mix_the_branches_into_the_output(causal: bool, padded: bool) -> None:
    """And they come in the order of the recipe, which here is not that of the computation."""
    drawn = problem(2, 43, 5, causal=causal, mask=torch.rand(2, 43) < 0.7 if padded else None)
    fast, _ = both(ORDERED)
    assert fast.branches == [(40, 4), (4, 1), (10, 3)]
    shares, mixed = weights(fast, drawn), 0
    for (w, r), share in zip(fast.branches, shares, strict=True):
        alone = attention.build({"backend": "dilated", "segment_lengths": [w], "dilation_rates": [r]})
        mixed = mixed + share[..., None] * alone(*drawn.qkv.unbind(2), drawn.causal, drawn.mask)
    assert (mixed - fast(*drawn.qkv.unbind(2), drawn.causal, drawn.mask)).abs().max() < EXACT


@pytest.mark.parametrize("head_offsets", ["interleaved", "grouped", "none"])
def test_some_heads_are_told_where_they_stand(head_offsets: str) -> None:
    drawn = problem(2, 31, 3)
    for backend in both(ORDERED | {"head_offsets": head_offsets}):
        found = weights(backend, drawn, first_head=2, total_heads=7)
        assert (found - direct(backend.pattern, drawn, 2, 7)).abs().max() < EXACT  # type: ignore[arg-type]


@given(case=cases())
def test_shares_from_shards_are_those_of_the_whole(case: tuple[int, Problem, dict[str, Any]]) -> None:
    size, drawn, config = case
    whole = weights(attention.build(config), drawn)
    found = torch.cat(threads.run(size, lambda shard: from_shard(config, drawn, shard)), 2)
    assert (found - whole).abs().max() < EXACT


def from_shard(config: dict[str, Any], drawn: Problem, shard: ThreadShard) -> Tensor:
    """This rank's tokens' shares."""
    backend = attention.build(config)
    bind(backend, shard)
    mask = None if drawn.mask is None else drawn.mask.chunk(shard.size, 1)[shard.rank]
    q, k, _ = drawn.qkv.chunk(shard.size, 1)[shard.rank].unbind(2)
    return backend.branch_weights(q, k, drawn.causal, mask)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_the_default_way_works_from_shards_too(causal: bool, padded: bool) -> None:
    drawn = problem(2, 24, 5, causal=causal, mask=torch.rand(2, 24) < 0.7 if padded else None)
    config = {"backend": "naive", "pattern": {"kind": "dilated", **ORDERED}}
    found = torch.cat(threads.run(3, lambda shard: from_shard(config, drawn, shard)), 2)
    assert (found - weights(attention.build(config), drawn)).abs().max() < EXACT


def test_shards_that_do_not_fit_a_segment_are_refused() -> None:
    drawn = problem(1, 24, 2)
    config = {"backend": "dilated", "segment_lengths": [5], "dilation_rates": [1]}
    with pytest.raises(ValueError, match="segment of 5 tokens neither tiles"):
        threads.run(2, lambda shard: from_shard(config, drawn, shard))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, slow = problem(3, 37, 5), both(ORDERED)[1]
    whole = weights(slow, drawn)
    monkeypatch.setattr(maps, "MAX_SCORES", 3 * 5 * 37 * 4)
    assert (weights(slow, drawn) - whole).abs().max() < EXACT


def test_scores_as_large_as_trained_models_give_them_stay_exact() -> None:
    drawn = problem(1, 40, 2, 8)
    drawn.qkv[:, :, :2] *= 30  # denominators far beyond the range of exp
    fast, slow = (weights(backend, drawn) for backend in both(ORDERED))
    assert fast.isfinite().all() and (fast - slow).abs().max() < EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padded", [True, False])
def test_low_precision_inputs_give_float32_shares(dtype: torch.dtype, padded: bool) -> None:
    q, k = (torch.randn(2, 43, 3, 8).to(dtype) for _ in range(2))
    mask = torch.rand(2, 43) < 0.7 if padded else None
    fast, slow = both(ORDERED)
    exact = slow.branch_weights(q.double(), k.double(), True, mask)
    for backend in (fast, slow):
        with torch.autocast("cpu", torch.bfloat16):
            found = backend.branch_weights(q, k, True, mask)
        assert found.dtype == torch.float32
        assert (found - exact).abs().max() < {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-3}[dtype]


def test_uninitialised_memory_is_never_read() -> None:
    drawn, (fast, slow) = problem(2, 23), both({"segment_lengths": [4, 10], "dilation_rates": [2, 3]})
    torch.use_deterministic_algorithms(True)  # also fills fresh memory with NaN
    try:
        assert torch.empty(3).isnan().all()
        assert (weights(fast, drawn) - weights(slow, drawn)).abs().max() < EXACT
    finally:
        torch.use_deterministic_algorithms(False)


def test_the_fast_way_makes_no_square() -> None:
    """131,072 tokens: the score matrix of one head would take 64 GiB."""
    q = torch.randn(1, 2**17, 2, 8)
    backend = attention.build({"backend": "dilated", "segment_lengths": [256, 2**17], "dilation_rates": [1, 512]})
    assert backend.branch_weights(q, q).shape == (2, 1, 2**17, 2)


@pytest.mark.parametrize("config", [{"backend": "sdpa"}, {"backend": "naive"}, {"backend": "xformers"}])
def test_a_backend_without_branches_says_so(config: dict[str, Any]) -> None:
    backend, q = attention.build(config), torch.randn(1, 4, 2, 8)
    assert backend.branches == []
    with pytest.raises(ValueError, match="has no branches.*dilated"):
        backend.branch_weights(q, q)


def test_a_plug_in_may_call_its_own_parts_branches() -> None:
    class Sum(attention.AttentionBackend):
        def __init__(self, own: Any) -> None:
            super().__init__()
            self.branches = own

        def forward(self, q, k, v, causal=True, key_padding_mask=None):  # type: ignore[no-untyped-def]
            return sum(branch(q, k, v, causal, key_padding_mask) for branch in self.branches)

    parts, q = list(both(ORDERED)), torch.randn(1, 9, 2, 8)
    for own in (parts, torch.nn.ModuleList(parts)):
        backend = Sum(own)
        torch.testing.assert_close(backend(q, q, q), parts[0](q, q, q) + parts[1](q, q, q))
        with pytest.raises(ValueError, match="has no branches"):
            backend.branch_weights(q, q)


def test_malformed_inputs_are_refused() -> None:
    q, backend = torch.randn(1, 9, 2, 8), both(ORDERED)[0]
    with pytest.raises(ValueError, match="k has shape"):
        backend.branch_weights(q, q[:, :5])
    with pytest.raises(ValueError, match="total_heads is 3"):
        backend.branch_weights(q, q, first_head=2, total_heads=3)
