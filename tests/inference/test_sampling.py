"""Which tokens can be drawn, and how often each is."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.inference.sampling import Sampling

PROBABILITIES = torch.tensor([0.1, 0.4, 0.05, 0.25, 0.2], dtype=torch.float64)
LOGITS = PROBABILITIES.log() + 3


def distribution(**options: float | int) -> list[float]:
    return Sampling(**options).probabilities(LOGITS).tolist()  # type: ignore[arg-type]


def test_by_default_it_is_the_model_s_own_distribution() -> None:
    assert distribution() == pytest.approx(PROBABILITIES.tolist())


@pytest.mark.parametrize("temperature", [0.1, 0.7, 2.0, 100.0])
def test_temperature_divides_the_logits(temperature: float) -> None:
    powers = PROBABILITIES ** (1 / temperature)
    assert distribution(temperature=temperature) == pytest.approx((powers / powers.sum()).tolist())


def test_temperature_0_takes_the_first_of_the_likeliest() -> None:
    assert distribution(temperature=0) == [0, 1, 0, 0, 0]
    tied = Sampling(0).probabilities(torch.tensor([1.0, 2.0, 2.0]))
    assert tied.tolist() == [0, 1, 0]
    assert Sampling(0, top_k=1, top_p=0.1).probabilities(LOGITS).argmax() == 1


@pytest.mark.parametrize(
    ("top_k", "kept"), [(1, [1]), (2, [1, 3]), (3, [1, 3, 4]), (5, [0, 1, 2, 3, 4]), (99, [0, 1, 2, 3, 4])]
)
def test_top_k_keeps_the_likeliest(top_k: int, kept: list[int]) -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = PROBABILITIES[kept]
    assert distribution(top_k=top_k) == pytest.approx((expected / expected.sum()).tolist())


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [
        (1e-9, [1]), (0.39, [1]), (0.41, [1, 3]), (0.64, [1, 3]), (0.66, [1, 3, 4]), (0.94, [0, 1, 3, 4]),
        (1.0, [0, 1, 2, 3, 4]),
    ],
)  # fmt: skip
def test_top_p_keeps_the_fewest_that_reach_it(top_p: float, kept: list[int]) -> None:
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = PROBABILITIES[kept]
    assert distribution(top_p=top_p) == pytest.approx((expected / expected.sum()).tolist())


def test_top_p_that_is_reached_exactly_takes_no_more() -> None:
    found = Sampling(top_p=0.5).probabilities(torch.tensor([0.25, 0.5, 0.25]).log())
    assert found.tolist() == [0, 1, 0]


def test_top_p_is_of_what_temperature_and_top_k_leave() -> None:
    """0.4, 0.25 and 0.2 remain, as 0.47, 0.29 and 0.24 of the whole."""
    assert [p > 0 for p in distribution(top_k=3, top_p=0.75)] == [False, True, False, True, False]
    assert [p > 0 for p in distribution(top_k=3, top_p=0.77)] == [False, True, False, True, True]
    assert [p > 0 for p in distribution(temperature=0.2, top_p=0.8)] == [False, True, False, False, False]


@given(
    logits=st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=30),
    temperature=st.one_of(st.floats(1e-3, 1e3), st.floats(5e-324, 1e300)),
    top_k=st.one_of(st.none(), st.integers(1, 40)),
    top_p=st.floats(1e-12, 1),
)
def test_something_can_always_be_drawn(logits: list[float], temperature: float, top_k: int | None, top_p: float):
    found = Sampling(temperature, top_k, top_p).probabilities(torch.tensor(logits))
    assert math.isclose(float(found.sum()), 1, rel_tol=1e-9) and bool((found >= 0).all())
    assert found[torch.tensor(logits).argmax()] > 0
    assert top_k is None or int((found > 0).sum()) <= top_k


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = Sampling().draw(LOGITS.expand(20_000, -1), [generator] * 20_000)
    assert torch.bincount(torch.tensor(drawn)).div(20_000).tolist() == pytest.approx(PROBABILITIES.tolist(), abs=0.012)


def test_a_row_draws_by_its_own_generator() -> None:
    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in range(50)]

    together = Sampling().draw(LOGITS.expand(50, -1), generators())
    assert together == [Sampling().draw(LOGITS[None], [generator])[0] for generator in generators()]
    assert len(set(together)) > 1


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_told_of(temperature: float, wrong: float) -> None:
    with pytest.raises(ValueError, match="logits are not finite"):
        Sampling(temperature).draw(torch.tensor([[0.0, wrong]]), [torch.Generator()])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1, expected a number of at least 0"),
        ({"temperature": math.nan}, "temperature is nan"),
        ({"temperature": math.inf}, "temperature is inf"),
        ({"top_k": 0}, "top_k is 0, expected at least 1"),
        ({"top_p": 0.0}, "top_p is 0.0, expected a number above 0, up to 1"),
        ({"top_p": 1.1}, "top_p is 1.1"),
        ({"top_p": math.nan}, "top_p is nan"),
    ],
)
def test_numbers_out_of_range_are_refused(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Sampling(**options)
