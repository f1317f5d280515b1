"""The order of windows: a permutation that seed and place decide alone, shared out to ranks without rest."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.data.sampling import (
    PADDING,
    EvaluationSampler,
    Position,
    TrainingSampler,
    evaluation_window,
    permuted,
    training_window,
)


def training(windows: int, start: Position = Position(0, 0), **options: int) -> list[int]:  # noqa: B008
    """The windows of one rank."""
    arguments = {"batch_size": 2, "replicas": 1, "rank": 0, "seed": 0, "total": 10, **options}
    return list(TrainingSampler(range(windows), position=lambda: start, **arguments))  # type: ignore[arg-type]


@given(size=st.integers(1, 600), key=st.integers(0, 2**64 - 1))
def test_a_permutation_takes_every_place_once(size: int, key: int) -> None:
    assert sorted(permuted(i, size, key) for i in range(size)) == list(range(size))


@given(size=st.integers(1, 2**50), key=st.integers(0, 2**64 - 1), index=st.integers(0, 2**50))
def test_any_place_of_any_size_is_reached(size: int, key: int, index: int) -> None:
    assert 0 <= permuted(index % size, size, key) < size


def test_the_order_is_the_same_forever() -> None:
    """Numbers that a resumed run relies on: they must never change."""
    assert [training_window(i, 1000, seed=1234) for i in (0, 1, 2, 999, 1000, 123_456)] == [462, 55, 918, 138, 241, 212]
    assert [evaluation_window(i, 1000) for i in range(5)] == [400, 386, 712, 868, 813]


def test_every_epoch_and_seed_has_an_order_of_its_own() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        return [training_window(number * 100 + i, 100, seed) for i in range(100)]

    orders = [epoch(0, 1), epoch(1, 1), epoch(0, 2), epoch(11, 1), epoch(1, 11), list(range(100))]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)


def test_the_order_looks_random() -> None:
    size = 64
    firsts = Counter(training_window(0, size, seed) for seed in range(6400))
    assert sum((firsts[i] - 100) ** 2 / 100 for i in range(size)) < 110, "chi-squared, 63 degrees of freedom, p = 2e-4"
    order = [training_window(i, 10_000, 3) for i in range(10_000)]
    steps = Counter((b - a) % 10_000 for a, b in pairwise(order))
    assert max(steps.values()) < 10
    mean = sum(order[:1000]) / 1000
    assert 4600 < mean < 5400, "the first tenth comes from everywhere"


@given(
    windows=st.integers(1, 60),
    replicas=st.sampled_from([1, 2, 3, 4]),
    batch_size=st.integers(1, 5),
    total=st.integers(1, 12),
    seed=st.integers(0, 3),
)
def test_ranks_share_the_order_out_without_rest(
    windows: int, replicas: int, batch_size: int, total: int, seed: int
) -> None:
    options = {"batch_size": batch_size, "total": total, "seed": seed, "replicas": replicas}
    ranks = [training(windows, rank=rank, **options) for rank in range(replicas)]
    assert {len(rank) for rank in ranks} == {total * batch_size}
    for step in range(total):
        seen = [w for rank in ranks for w in rank[step * batch_size : (step + 1) * batch_size]]
        places = range(step * batch_size * replicas, (step + 1) * batch_size * replicas)
        assert seen == [training_window(p, windows, seed) for p in places]


def test_a_step_depends_on_the_global_batch_size_alone() -> None:
    def steps(replicas: int) -> list[list[int]]:
        size = 12 // replicas
        ranks = [training(50, replicas=replicas, rank=r, batch_size=size, seed=5) for r in range(replicas)]
        return [sorted(w for rank in ranks for w in rank[s * size : (s + 1) * size]) for s in range(10)]

    assert steps(1) == steps(2) == steps(3) == steps(6)


@given(done=st.integers(0, 9), replicas=st.integers(1, 3))
def test_a_resumed_sampler_goes_on_where_it_was(done: int, replicas: int) -> None:
    for rank in range(replicas):
        whole = training(30, replicas=replicas, rank=rank)
        assert training(30, Position(done, done * 2 * replicas), replicas=replicas, rank=rank) == whole[done * 2 :]


def test_with_other_ranks_no_window_is_skipped_or_repeated() -> None:
    before = [w for rank in range(4) for w in training(100, replicas=4, rank=rank, total=6)[: 3 * 2]]
    after = [w for rank in range(2) for w in training(100, Position(3, 24), replicas=2, rank=rank, total=6)]
    assert Counter(before + after) == Counter(training_window(p, 100, 0) for p in range(24 + 12))


@given(windows=st.integers(1, 60), replicas=st.integers(1, 5))
def test_evaluation_deals_out_every_window_once(windows: int, replicas: int) -> None:
    samplers = [EvaluationSampler(range(windows), replicas=replicas, rank=r) for r in range(replicas)]  # type: ignore[arg-type]
    dealt = [list(sampler) for sampler in samplers]
    assert {len(d) for d in dealt} == {len(s) for s in samplers} == {-(-windows // replicas)}
    assert sorted(w for d in dealt for w in d if w != PADDING) == list(range(windows))
    assert sum(d.count(PADDING) for d in dealt) == -windows % replicas
    assert all(w != PADDING for d in dealt for w in d[:-1]), "padding comes last"


@pytest.mark.parametrize("size", [1, 2, 3])
def test_the_smallest_sizes_work(size: int) -> None:
    assert sorted(training_window(i, size, 0) for i in range(size)) == list(range(size))
