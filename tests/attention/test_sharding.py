"""Attention from shards of a sequence equals attention over the whole of it, forward and backward, on every rank."""

from __future__ import annotations

import re
import threading
from itertools import groupby
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longnet_kit import attention
from longnet_kit.attention import dilated_sharded, flash, patterns
from longnet_kit.attention.sharding import Pending, SequenceShard, bind, to_heads, to_sequence
from longnet_kit.parallel import threads
from longnet_kit.parallel.threads import ThreadShard
from longnet_kit.testing import reference
from tests.attention.oracle import EXACT, Problem, masks, problem

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")


def sharded_outcome(given: Problem, config: dict[str, Any], size: int, heads: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Output and gradient of qkv, from `size` ranks, put together again."""

    def work(shard: ThreadShard) -> tuple[Tensor, Tensor]:
        backend = attention.build(config)
        bind(backend, shard)
        qkv = given.qkv.chunk(size, 1)[shard.rank].detach().requires_grad_()
        mask = None if given.mask is None else given.mask.chunk(size, 1)[shard.rank]
        out = backend(*qkv.unbind(2), causal=given.causal, key_padding_mask=mask, **heads)
        (grad,) = torch.autograd.grad(out, qkv, given.grad_out.chunk(size, 1)[shard.rank])
        return out.detach(), grad

    outs, grads = zip(*threads.run(size, work), strict=True)
    return torch.cat(outs, 1), torch.cat(grads, 1)


def assert_equal_to_whole(given: Problem, config: dict[str, Any], pattern: patterns.Pattern, size: int) -> None:
    expected, expected_grad = given.outcome(lambda *inputs: reference(pattern, *inputs))
    out, grad = sharded_outcome(given, config, size, {})
    assert (out - expected).abs().max() < EXACT
    assert (grad - expected_grad).abs().max() < EXACT


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, Problem, dict[str, Any]]:
    """Ranks, inputs and branches whose segments tile or span shards, with any rate."""
    size = draw(st.integers(1, 6))
    n = draw(st.sampled_from([1, 2, 3, 4, 6, 7, 12]))
    torch.manual_seed(draw(st.integers(0, 2**16)))
    tiling = [d for d in range(1, n + 1) if n % d == 0]
    spanning = [n * i for i in range(1, size + 1)] + [n * size + 5]
    w = st.sampled_from(tiling + 2 * spanning)
    branches = draw(st.lists(st.tuples(w, st.integers(1, 9)), min_size=1, max_size=4))
    batch, seq_len = draw(st.integers(1, 3)), n * size
    mask = draw(masks(batch, seq_len))
    given = problem(batch, seq_len, draw(st.integers(1, 7)), draw(st.sampled_from([1, 4])), draw(st.booleans()), mask)
    config = {
        "backend": "dilated",
        "segment_lengths": [w for w, _ in branches],
        "dilation_rates": [r for _, r in branches],
        "head_offsets": draw(st.sampled_from(["interleaved", "grouped", "none"])),
    }
    return size, given, config


@given(case=cases())
def test_dilated_from_shards_equals_the_whole(case: tuple[int, Problem, dict[str, Any]]) -> None:
    size, given, config = case
    assert_equal_to_whole(given, config, attention.build(config).pattern, size)  # type: ignore[arg-type]


OTHERS: list[dict[str, Any]] = [
    {"backend": "sdpa"},
    {"backend": "naive", "pattern": {"kind": "dilated", "segment_lengths": [4, 24], "dilation_rates": [1, 3]}},
    {"backend": "xformers", "block_size": 16, "local_blocks": 1},
]


@pytest.mark.parametrize("config", OTHERS, ids=lambda config: config["backend"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_other_backends_trade_heads_for_the_sequence(config: dict[str, Any], causal: bool, padded: bool) -> None:
    """`naive` here is head-dependent: its heads must be told where they stand."""
    mask = torch.rand(2, 48) < 0.7 if padded else None
    given = problem(2, 48, 6, 4, causal, mask)
    assert_equal_to_whole(given, config, attention.build(config).pattern, 3)  # type: ignore[arg-type]


def test_a_plug_in_that_writes_only_forward_trains_from_shards() -> None:
    class Rotated(attention.AttentionBackend):
        """Mixes positions in a way that no pattern describes, and differently for each head."""

        head_dependent = True

        def forward(self, q, k, v, causal=True, key_padding_mask=None, first_head=0, total_heads=None):  # type: ignore[no-untyped-def]
            turn = torch.arange(first_head, first_head + q.shape[2], dtype=q.dtype)[:, None] / total_heads
            return (q * k).cumsum(1) * v + turn * v.flip(1)

    given = problem(2, 12, 6)
    expected = given.outcome(lambda *inputs: Rotated()(*inputs[:3]))

    def work(shard: ThreadShard) -> tuple[Tensor, Tensor]:
        backend = Rotated()
        bind(backend, shard)
        qkv = given.qkv.chunk(3, 1)[shard.rank].detach().requires_grad_()
        out = backend(*qkv.unbind(2))
        return out.detach(), torch.autograd.grad(out, qkv, given.grad_out.chunk(3, 1)[shard.rank])[0]

    for found, whole in zip(zip(*threads.run(3, work), strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("head_offsets", ["interleaved", "grouped", "none"])
def test_some_heads_of_a_layer_may_be_sharded_too(head_offsets: str) -> None:
    """Heads 2 to 4 of 7, as a tensor-parallel rank would hold them; neither 5 nor 4 divides a shard of 6."""
    config: dict[str, Any] = {"backend": "dilated", "segment_lengths": [3, 12, 24], "dilation_rates": [1, 4, 5]}
    config["head_offsets"] = head_offsets
    given = problem(2, 24, 3)
    whole = attention.build(config)
    heads = {"first_head": 2, "total_heads": 7}
    expected = given.outcome(lambda q, k, v, causal, mask: whole(q, k, v, causal, mask, **heads))
    for found, known in zip(sharded_outcome(given, config, 4, heads), expected, strict=True):
        torch.testing.assert_close(found, known, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("config", "size", "seq_len", "words"),
    [
        ({"backend": "sdpa"}, 3, 12, ["4 heads do not divide among 3 ranks", "sequence_parallel_size of 2", "6 heads"]),
        (
            {"backend": "dilated", "segment_lengths": [5, 12], "dilation_rates": [1, 2]},
            2,
            24,
            ["segment of 5 tokens neither tiles a shard of 12", "24 on 2 ranks", "segment length of 4", "30"],
        ),
        (
            {"backend": "dilated", "segment_lengths": [4, 18], "dilation_rates": [1, 2]},
            3,
            36,
            ["segment of 18 tokens neither tiles a shard of 12", "36 on 3 ranks", "segment length of 12", "54"],
        ),
    ],
)
def test_what_does_not_divide_is_refused_with_sizes_that_do(
    config: dict[str, Any], size: int, seq_len: int, words: list[str]
) -> None:
    q = torch.randn(1, seq_len // size, 4, 4)

    def work(shard: ThreadShard) -> str:
        backend = attention.build(config)
        bind(backend, shard)
        with pytest.raises(ValueError, match="ranks") as caught:
            backend(q, q, q)
        return str(caught.value)

    for message in threads.run(size, work):
        assert all(word in message for word in words), message


@given(n=st.integers(1, 40), shards=st.integers(1, 6), w=st.integers(1, 300))
def test_the_sizes_that_a_refusal_names_work(n: int, shards: int, w: int) -> None:
    refusal = dilated_sharded.supports([(w, 1)], n * shards, shards)
    if refusal:
        assert n % w == 0 or w % n == 0 or w >= n * shards
        return
    lengths = [
        int(number.replace(",", "")) for number in re.findall(r"(?:length|sequence) of ([\d,]+)", refusal.reason)
    ]
    assert dilated_sharded.supports([(lengths[-2], 1)], n * shards, shards)
    assert dilated_sharded.supports([(w, 1)], lengths[-1], shards)


@pytest.mark.parametrize(("size", "n"), [(1, 8), (2, 8), (4, 8), (4, 6), (3, 16)])
@pytest.mark.parametrize("rates", [[1, 2, 4], [1, 3, 5]])
def test_received_elements_are_those_of_the_formula(size: int, n: int, rates: list[int]) -> None:
    """2 n H D times the sum over branches w > n of (min(w, N) / n - 1) / r, r rounded so as to send whole entries."""
    batch, heads, head_dim = 2, 3, 4
    config = {"backend": "dilated", "segment_lengths": [2, 2 * n, size * n], "dilation_rates": rates}
    branches = attention.build(config).pattern.branches  # type: ignore[union-attr]

    def work(shard: ThreadShard) -> tuple[int, int]:
        backend = attention.build(config)
        bind(backend, shard)
        q = torch.randn(batch, n, heads, head_dim, dtype=torch.float64, requires_grad=True)
        out = backend(q, q, q)
        forward = shard.received
        out.sum().backward()
        return forward, shard.received - forward

    for rank, (forward, backward) in enumerate(threads.run(size, work)):
        expected = 0
        for w, r in branches:
            if w > n:
                run = w // n
                sharers = min(run, size - rank // run * run)  # the last segment may be shorter
                expected += 2 * batch * heads * head_dim * -(-n // r) * (sharers - 1)
        assert forward == backward == expected


class Noted(SequenceShard):
    """A shard that notes when a transfer begins and when it is waited for."""

    def __init__(self, shard: SequenceShard, events: list[str]) -> None:
        self.rank, self.size = shard.rank, shard.size
        self._shard, self._events = shard, events

    def all_gather(self, x: Tensor) -> Pending:
        return self._noted("gather", self._shard.all_gather(x))

    def reduce_scatter(self, x: Tensor) -> Pending:
        return self._noted("scatter", self._shard.reduce_scatter(x))

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._shard.all_to_all(x)

    def subgroup(self, size: int) -> SequenceShard:
        return Noted(self._shard.subgroup(size), self._events)

    def _noted(self, name: str, transfer: Pending) -> Pending:
        self._events.append(name)
        return lambda: self._events.append(f"wait for {name}") or transfer()


def test_transfers_run_while_local_branches_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward gathers, does all local work, then waits; backward scatters foreign gradients before the local work."""
    events: dict[int, list[str]] = {0: [], 1: []}
    here = threading.local()
    for name in ("forward", "backward"):
        kernel = getattr(flash, name)

        def spy(*inputs: Any, name: str = name, kernel: Any = kernel) -> Any:
            events[here.rank].append(f"{name} kernel")
            return kernel(*inputs)

        monkeypatch.setattr(flash, name, spy)

    def work(shard: ThreadShard) -> None:
        here.rank = shard.rank
        backend = attention.build({"backend": "dilated", "segment_lengths": [4, 16], "dilation_rates": [1, 4]})
        bind(backend, Noted(shard, events[shard.rank]))
        q = torch.randn(1, 8, 1, 4, requires_grad=True)
        backend(q, q, q).sum().backward()

    threads.run(2, work)
    forward = ["gather", "forward kernel", "wait for gather", "forward kernel"]
    backward = ["backward kernel", "scatter", "backward kernel", "wait for scatter"]
    assert [event for event, _ in groupby(events[1])] == forward + backward


def test_only_inputs_results_and_what_was_gathered_are_saved() -> None:
    def work(shard: ThreadShard) -> list[int]:
        backend = attention.build({"backend": "dilated", "segment_lengths": [4, 16], "dilation_rates": [1, 4]})
        bind(backend, shard)
        q, k, v = (torch.randn(1, 8, 2, 4, requires_grad=True) for _ in range(3))
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
            backend(q, k, v)
        return sorted(saved)

    whole, lse, gathered = 8 * 2 * 4, 8 * 2, 2 * 2 * (8 // 4) * 2 * 4
    assert threads.run(2, work) == [sorted([whole] * 4 + [lse, gathered])] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_is_as_near_as_that_of_the_whole(dtype: torch.dtype) -> None:
    config = {"backend": "dilated", "segment_lengths": [8, 16, 64], "dilation_rates": [1, 2, 3]}
    exact = problem(2, 64, 4, 8)
    low = Problem(exact.qkv.to(dtype), exact.grad_out.to(dtype), True, None)
    whole = low.outcome(lambda *inputs: attention.build(config)(*inputs))
    for found, known, true in zip(
        sharded_outcome(low, config, 4, {}),
        whole,
        exact.outcome(lambda *inputs: attention.build(config)(*inputs)),
        strict=True,
    ):
        assert found.dtype == dtype
        assert (found - true).abs().max() <= 2 * (known - true).abs().max() + torch.finfo(dtype).eps


def test_the_exchange_of_heads_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(shard: ThreadShard) -> None:
        x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5) + 1000 * shard.rank
        heads = to_heads(x, shard)
        assert heads.shape == (2, 6, 2, 5)
        torch.testing.assert_close(heads[:, shard.rank * 3 : shard.rank * 3 + 3], x[:, :, 2 * shard.rank :][:, :, :2])
        torch.testing.assert_close(to_sequence(heads, shard), x)

    threads.run(2, work)


def test_ranks_that_part_ways_are_told() -> None:
    """The simulation itself: a rank that makes no transfer, and one that fails."""

    def leave(shard: ThreadShard) -> None:
        if shard.rank == 0:
            raise KeyError("lost")
        shard.all_gather(torch.zeros(1))

    with pytest.raises(KeyError, match="lost"):
        threads.run(3, leave)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("dtype", "within"),
    [(torch.float64, EXACT), (torch.float32, 1e-4), (torch.bfloat16, 4e-2), (torch.float16, 1e-2)],
)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_shards_on_cuda_equal_the_whole(dtype: torch.dtype, within: float, causal: bool, padded: bool) -> None:
    """Ranks are threads on one device; kernels get rectangles of queries and keys, at any strides."""
    config = {"backend": "dilated", "segment_lengths": [16, 64, 256], "dilation_rates": [1, 3, 8]}
    exact = problem(2, 256, 6, 16, causal, torch.rand(2, 256) < 0.8 if padded else None)
    expected, expected_grad = exact.outcome(lambda *inputs: attention.build(config)(*inputs))
    mask = None if exact.mask is None else exact.mask.cuda()
    given = Problem(exact.qkv.to("cuda", dtype), exact.grad_out.to("cuda", dtype), causal, mask)
    out, grad = sharded_outcome(given, config, 4, {})
    assert (out.cpu().double() - expected).abs().max() < within
    largest = 1 + expected_grad.abs().max()
    assert (grad.cpu().double() - expected_grad).abs().max() / largest < within
