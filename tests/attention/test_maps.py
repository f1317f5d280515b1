"""Attention maps are the derivative of the output with respect to the values, row by row, for every backend."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention import maps, patterns
from longnet_kit.attention.sharding import bind
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from tests.attention.oracle import EXACT, Problem, dilated_options, problem, problems

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
SMALL: dict[str, Any] = {"backend": "dilated", "segment_lengths": [4, 10, 64], "dilation_rates": [1, 3, 5]}


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    """Every backend, `naive` with every pattern."""
    options = draw(dilated_options())
    blocks = {"block_size": draw(st.integers(16, 20)), "local_blocks": draw(st.integers(1, 2))}
    layout = draw(st.sampled_from(["fixed", "local"]))
    return draw(
        st.sampled_from(
            [
                {"backend": "dilated", **options},
                {"backend": "sdpa"},
                {"backend": "xformers", "pattern": layout, **blocks},
                {"backend": "naive"},
                {"backend": "naive", "pattern": {"kind": "dilated", **options}},
                {"backend": "naive", "pattern": {"kind": "block_sparse", "layout": layout, "block_size": 3}},
            ]
        )
    )


def chosen(data: st.DataObject, seq_len: int) -> Tensor | None:
    """Some queries in any order, repeated too, or all."""
    positions = data.draw(st.none() | st.lists(st.integers(0, seq_len - 1), min_size=1, max_size=6))
    return None if positions is None else torch.tensor(positions)


def output_of(rows: Tensor, drawn: Problem) -> Tensor:
    """What the rows (B, H, Q, N) make of the values: (B, Q, H, D)."""
    return torch.einsum("bhqn,bnhd->bqhd", rows, drawn.qkv[:, :, 2].nan_to_num())


@given(drawn=problems(), config=configs(), data=st.data())
def test_the_map_times_the_values_is_the_output(drawn: Problem, config: dict[str, Any], data: st.DataObject) -> None:
    backend, queries = attention.build(config), chosen(data, drawn.qkv.shape[1])
    q, k, v = drawn.qkv.unbind(2)
    rows = backend.attention_map(q, k, queries, drawn.causal, drawn.mask)
    out = backend(q, k, v, drawn.causal, drawn.mask)
    out = out if queries is None else out[:, queries]
    assert rows.dtype == torch.float64 and not rows.requires_grad
    assert (output_of(rows, drawn) - out).abs().max() < EXACT


@given(drawn=problems(max_seq_len=16), options=dilated_options())
def test_the_map_is_the_derivative_by_the_values(drawn: Problem, options: dict[str, Any]) -> None:
    backend = attention.build({"backend": "dilated", **options})
    q, k, v = drawn.qkv.unbind(2)
    rows = backend.attention_map(q, k, None, drawn.causal, drawn.mask)
    v = v.detach().requires_grad_()
    out = backend(q, k, v, drawn.causal, drawn.mask)
    for query in {0, q.shape[1] - 1}:
        (grad,) = torch.autograd.grad(out[:, query, :, 0].sum(), v, retain_graph=True)  # (B, N, H, D)
        assert (rows[:, :, query] - grad[..., 0].transpose(1, 2)).abs().max() < EXACT


@given(drawn=problems(), config=configs())
def test_rows_sum_to_one_or_are_zero_and_padding_gets_nothing(drawn: Problem, config: dict[str, Any]) -> None:
    backend = attention.build(config)
    q, k, _ = drawn.qkv.unbind(2)
    rows = backend.attention_map(q, k, None, drawn.causal, drawn.mask)
    batch, seq_len, heads, _ = q.shape
    real = torch.ones(batch, seq_len, dtype=torch.bool) if drawn.mask is None else drawn.mask
    m = backend.pattern.multiplicity(seq_len, heads, drawn.causal) * real[:, None, None] * real[:, None, :, None]  # type: ignore[union-attr]
    assert ((rows > 0) <= (m > 0)).all() and (rows[m == 0] == 0).all()
    assert (rows.sum(-1) - m.any(-1).double()).abs().max() < EXACT


@given(drawn=problems(), options=dilated_options(), first=st.integers(0, 4), more=st.integers(0, 4))
def test_some_heads_are_told_where_they_stand(drawn: Problem, options: dict[str, Any], first: int, more: int) -> None:
    backend = attention.build({"backend": "dilated", **options})
    q, k, v = drawn.qkv.unbind(2)
    heads = {"first_head": first, "total_heads": first + q.shape[2] + more}
    rows = backend.attention_map(q, k, None, drawn.causal, drawn.mask, **heads)
    out = backend(q, k, v, drawn.causal, drawn.mask, **heads)
    assert (output_of(rows, drawn) - out).abs().max() < EXACT


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = problem(3, 37, 5, mask=torch.rand(3, 37) < 0.7)
    q, k, _ = drawn.qkv.unbind(2)
    backend = attention.build(SMALL)
    whole = backend.attention_map(q, k, key_padding_mask=drawn.mask)
    for scores in (1, 3 * 5 * 37 * 4):
        monkeypatch.setattr(maps, "MAX_SCORES", scores)
        assert (backend.attention_map(q, k, key_padding_mask=drawn.mask) - whole).abs().max() < EXACT


def test_a_few_rows_of_a_long_sequence_need_no_square() -> None:
    q = torch.randn(1, 2**16, 2, 8)
    rows = attention.build({"backend": "dilated"}).attention_map(q, q, torch.tensor([2**16 - 1, 5]))
    assert rows.shape == (1, 2, 2, 2**16)
    torch.testing.assert_close(rows.sum(-1), torch.ones(1, 2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_inputs_give_float32_weights(dtype: torch.dtype) -> None:
    q, k = (torch.randn(2, 20, 3, 8).to(dtype) for _ in range(2))
    backend = attention.build(SMALL)
    exact = backend.attention_map(q.double(), k.double())
    with torch.autocast("cpu", torch.bfloat16):
        rows = backend.attention_map(q, k)
    assert rows.dtype == torch.float32
    assert (rows - exact).abs().max() < 1e-5


@given(size=st.integers(2, 4), n=st.integers(1, 6), padded=st.booleans(), causal=st.booleans())
def test_every_rank_gets_the_whole_map(size: int, n: int, padded: bool, causal: bool) -> None:
    """Here `naive`, with 3 heads, could not even run on these ranks."""
    config = {"backend": "naive", "pattern": {"kind": "dilated", "segment_lengths": [4, 9], "dilation_rates": [1, 2]}}
    mask = torch.rand(2, n * size) < 0.6 if padded else None
    q, k, _ = problem(2, n * size, 3, mask=mask).qkv.unbind(2)
    queries = torch.tensor([n * size - 1, 0])
    expected = attention.build(config).attention_map(q, k, queries, causal, mask)

    def work(shard: ThreadShard) -> Tensor:
        backend = attention.build(config)
        bind(backend, shard)
        parts = [None if x is None else x.chunk(size, 1)[shard.rank] for x in (q, k, mask)]
        return backend.attention_map(parts[0], parts[1], queries, causal, parts[2])  # type: ignore[arg-type]

    for found in threads.run(size, work):
        assert torch.equal(found, expected)


class Mean(attention.AttentionBackend):
    """Says nothing of a pattern."""

    def forward(self, q, k, v, causal=True, key_padding_mask=None):  # type: ignore[no-untyped-def]
        return v.cumsum(1)


def test_a_backend_without_a_pattern_says_so() -> None:
    q = torch.randn(1, 4, 2, 8)
    with pytest.raises(ValueError, match="Mean has no pattern.*write its `pattern`"):
        Mean().attention_map(q, q)


@pytest.mark.parametrize(
    ("queries", "words"),
    [
        (torch.tensor([0, 9]), "queries holds 9.*0 to 8"),
        (torch.tensor([-1]), "queries holds -1.*0 to 8"),
        (torch.tensor([1.0]), "float32.*whole numbers"),
        (torch.tensor([True]), "bool.*whole numbers"),
        (torch.tensor(3), "one dimension"),
        (torch.zeros(2, 2, dtype=torch.int64), "one dimension"),
    ],
)
def test_queries_that_do_not_exist_are_refused(queries: Tensor, words: str) -> None:
    q = torch.randn(1, 9, 2, 8)
    with pytest.raises(ValueError, match=words):
        attention.build(SMALL).attention_map(q, q, queries)


def test_other_malformed_inputs_are_refused() -> None:
    q, backend = torch.randn(1, 9, 2, 8), attention.build(SMALL)
    with pytest.raises(ValueError, match="k has shape"):
        backend.attention_map(q, q[:, :5])
    with pytest.raises(ValueError, match="total_heads is 3"):
        backend.attention_map(q, q, first_head=2, total_heads=3)
    with pytest.raises(ValueError, match="key_padding_mask has shape"):
        backend.attention_map(q, q, key_padding_mask=torch.ones(1, 8, dtype=torch.bool))


def test_a_plug_in_pattern_is_enough() -> None:
    """It writes `multiplicity` only."""

    class Parity(patterns.Pattern):
        def multiplicity(self, seq_len: int, heads: int, causal: bool) -> Tensor:
            p = torch.arange(seq_len)
            m = ((p[:, None] - p) % 2 == 0).int().expand(heads, -1, -1)
            return m.tril() if causal else m

    class Patterned(Mean):
        @property
        def pattern(self) -> patterns.Pattern:
            return Parity()

    q = torch.randn(2, 9, 3, 4, dtype=torch.float64)
    rows = Patterned().attention_map(q, q, torch.tensor([4]))
    assert ((rows > 0) == torch.tensor([1, 0, 1, 0, 1, 0, 0, 0, 0], dtype=torch.bool)).all()


def test_a_watch_sees_what_is_attended_to_on_every_route() -> None:
    mask = torch.ones(1, 8, dtype=torch.bool)
    q, k, v = (torch.randn(1, 8, 2, 4) for _ in range(3))

    def work(shard: ThreadShard | None) -> list[tuple[Any, ...]]:
        backend, seen = attention.build(SMALL | {"segment_lengths": [2, 4, 8]}), []
        bind(backend, shard)
        backend.watch = lambda *inputs: seen.append(inputs)
        parts = [x if shard is None else x.chunk(shard.size, 1)[shard.rank] for x in (q, k, v, mask)]
        backend(*parts[:3], False, parts[3])
        backend.watch = None
        backend(*parts[:3])
        ((q_, k_, causal, mask_),) = seen
        assert q_ is parts[0] and k_ is parts[1] and causal is False and mask_ is parts[3]
        return seen

    work(None)
    threads.run(2, work)


def test_a_watch_is_no_part_of_the_module() -> None:
    backend = attention.build(SMALL)
    assert backend.watch is None and copy.deepcopy(backend).watch is None
    backend.watch = print
    assert not backend.state_dict() and not list(backend.modules())[1:]
    assert attention.build(SMALL).watch is None, "one backend's watch is not another's"


def test_a_watch_is_not_called_for_inputs_that_are_refused() -> None:
    backend, seen = attention.build(SMALL), []
    backend.watch = lambda *inputs: seen.append(inputs)
    q = torch.randn(1, 8, 2, 4)
    with pytest.raises(ValueError, match="k has shape"):
        backend(q, q[:, :4], q)
    assert not seen
