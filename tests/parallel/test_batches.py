"""Cutting batches along their sequences, and the guard that a group holds one batch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.parallel import batches, threads
from longnet_kit.parallel.threads import ThreadShard


def test_what_has_a_sequence_is_cut_and_the_rest_is_not() -> None:
    batch = {
        "tokens": torch.arange(24).view(2, 12),
        "alone": torch.arange(12).view(1, 12),
        "values": torch.randn(2, 12, 3),
        "index": torch.tensor([5, 6]),
        "names": ["a", "b"],
        "nested": (torch.ones(2, 12, dtype=torch.bool), [torch.tensor(1.0)]),
    }
    parts = threads.run(3, lambda shard: batches.cut(batch, shard))
    assert all(part["index"] is batch["index"] and part["names"] == batch["names"] for part in parts)
    assert all(part["nested"][1][0] == 1 for part in parts)
    for key in ("tokens", "alone", "values"):
        assert all(part[key].is_contiguous() and part[key].shape[1] == 4 for part in parts)
        assert all(part[key].untyped_storage().nbytes() == part[key].nbytes for part in parts), "the rest is let go"
        assert torch.equal(torch.cat([part[key] for part in parts], 1), batch[key])  # type: ignore[arg-type]
    assert torch.cat([part["nested"][0] for part in parts], 1).shape == (2, 12)


def test_a_lone_rank_keeps_everything() -> None:
    batch = [torch.ones(2, 3), torch.ones(2, 5)]
    assert threads.run(1, lambda shard: batches.cut(batch, shard))[0] is batch


def refusal(batch: object, size: int) -> str:
    def work(shard: ThreadShard) -> str:
        with pytest.raises(ValueError, match=r"\w") as caught:
            batches.cut(batch, shard)
        return str(caught.value)

    (message,) = set(threads.run(size, work))
    return message


def test_a_sequence_that_does_not_divide_is_refused_with_lengths_that_do() -> None:
    assert "13 tokens does not divide among 4 ranks; use a length like 12 or 16" in refusal(torch.ones(1, 13), 4)
    assert "use a length like 4" in refusal(torch.ones(1, 3), 4)


def test_an_unclear_sequence_is_refused() -> None:
    assert "second dimensions are [4, 8]" in refusal([torch.ones(2, 8), torch.ones(2, 4)], 2)
    assert "shard_batch" in refusal([torch.ones(2, 8), torch.ones(2, 4)], 2)


@given(size=st.integers(1, 9), seq_len=st.integers(1, 100))
def test_the_named_lengths_divide(size: int, seq_len: int) -> None:
    problem = batches.indivisible(seq_len, size)
    assert bool(problem) == (seq_len % size > 0)
    if problem:
        lengths = [int(word.replace(",", "")) for word in problem.rpartition("like ")[2].split(" or ")]
        assert lengths and not any(batches.indivisible(length, size) for length in lengths)


def same(make: object, size: int = 3) -> list[str]:
    """What each rank says of the batch that `make` gives it; empty for nothing."""

    def work(shard: ThreadShard) -> str:
        try:
            batches.check_same(make(shard.rank), shard, torch.device("cpu"))  # type: ignore[operator]
        except ValueError as error:
            return str(error)
        return ""

    return threads.run(size, work)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bfloat16, torch.bool, torch.float64])
def test_one_batch_passes(dtype: torch.dtype) -> None:
    batch = {"tokens": torch.ones(2, 5).to(dtype), "scalar": torch.zeros(()), "none": torch.zeros(0)}
    assert same(lambda rank: batch) == [""] * 3


@pytest.mark.parametrize(
    "make",
    [
        lambda rank: torch.arange(6).roll(int(rank == 1)),  # the same elements in another order
        lambda rank: torch.zeros(6).view(2, 3) if rank else torch.zeros(6).view(3, 2),
        lambda rank: torch.zeros(6, dtype=torch.int32 if rank == 2 else torch.float32),
        lambda rank: [torch.zeros(2)] * (1 + (rank == 1)),
        lambda rank: torch.tensor([1.0, -0.0 if rank else 0.0]),
    ],
)
def test_another_batch_is_seen_by_all(make: object) -> None:
    messages = same(make)
    assert all("different batches" in message and "distributed_sampler_kwargs" in message for message in messages)
    assert len(set(messages)) == 1
