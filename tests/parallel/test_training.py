"""Training with sequences divided among processes equals training on one, through the Trainer, in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parallel import scenarios
from tests.parallel.scenarios import Outcome

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*callbacks used to create"),
    pytest.mark.timeout(600),
]
EXACT = 1e-12
Many = dict[tuple[str, str], Any]

strategies = pytest.mark.parametrize("strategy", scenarios.STRATEGIES)


def largest_gradient_error(found: Outcome, expected: Outcome) -> float:
    """Over the raw gradients of every parameter."""
    assert found.gradients.keys() == expected.gradients.keys()
    return max(
        (found.gradients[step][name] - gradient).abs().max().item()
        for step, known in expected.gradients.items()
        for name, gradient in known.items()
    )


def assert_same(found: Outcome, expected: Outcome, exact: float = EXACT) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=0, abs=EXACT)
    assert largest_gradient_error(found, expected) < EXACT
    assert found.norms == pytest.approx(expected.norms, rel=EXACT)
    assert found.weights.keys() == expected.weights.keys()
    for name, weight in expected.weights.items():
        assert (found.weights[name] - weight).abs().max() < exact, name
    assert found.evaluated == pytest.approx(expected.evaluated, rel=EXACT)


@strategies
@pytest.mark.parametrize("scenario", scenarios.SCENARIOS)
def test_many_processes_equal_one(scenario: str, strategy: str, on_one: dict[str, Outcome], on_many: Many) -> None:
    """Losses, gradients, norms, weights and every validation metric; weights under Adam, which amplifies rounding."""
    assert_same(on_many[strategy, scenario], on_one[scenario], 1e-10 if scenario == "adam" else EXACT)


@strategies
@pytest.mark.parametrize("mutation", scenarios.MUTATIONS)
def test_what_would_be_wrong_is_seen(mutation: str, strategy: str, on_one: dict[str, Outcome], on_many: Many) -> None:
    assert largest_gradient_error(on_many[strategy, mutation], on_one["plain"]) > 1e-3


def test_ranks_of_a_sequence_with_different_batches_are_refused(on_many: Many) -> None:
    """As a sampler by world rank would give them."""
    assert "given different batches" in on_many["ddp", "sampled by world rank"]
    assert "distributed_sampler_kwargs" in on_many["ddp", "sampled by world rank"]


def test_the_scenarios_are_as_uneven_as_they_mean_to_be(on_one: dict[str, Outcome], on_many: Many, layout: str) -> None:
    ignored = on_many["ddp", "plain"].ignored_by_rank
    assert sum(ignored) == sum(on_one["plain"].ignored_by_rank)
    assert max(ignored) > 2 * min(ignored)
    plain = on_one["plain"]
    unlike = set(scenarios.SCENARIOS) - {"plain", "activation checkpointing", "naive", "clipped", "adam"}
    for scenario in unlike:
        assert abs(on_one[scenario].losses[0] - plain.losses[0]) > 1e-6 or scenario == "dropout under checkpointing"
    clipped = on_one["clipped"].weights
    assert all((weight - clipped[name]).abs().max() > 1e-4 for name, weight in plain.weights.items())


def going_on(outcome: Outcome) -> Outcome:
    """The part after the checkpoint."""
    after = scenarios.SAVED_AT
    last = {step: known for step, known in outcome.gradients.items() if step > after}
    return outcome._replace(losses=outcome.losses[after:], gradients=last, norms=outcome.norms[after:])


@strategies
@pytest.mark.parametrize("name", ["resumed", "resumed from the other"])
def test_any_layout_goes_on_from_a_checkpoint_of_any(
    name: str, strategy: str, on_one: dict[str, Outcome], on_many: Many
) -> None:
    """From one process, and from the same layout under the other strategy."""
    assert_same(on_many[strategy, name], going_on(on_one["adam"]), 1e-10)


@strategies
def test_one_process_goes_on_from_a_checkpoint_of_many(
    strategy: str, layout: str, on_one: dict[str, Outcome], on_many: Many, written: Path
) -> None:
    ckpt = written / f"{layout}_{strategy}.ckpt"
    found = scenarios.train(written, "1", "auto", optimizer="adam", ckpt_path=ckpt)
    assert_same(found, going_on(on_one["adam"]), 1e-10)


@strategies
def test_a_checkpoint_does_not_show_how_many_wrote_it(
    strategy: str, layout: str, on_one: dict[str, Outcome], on_many: Many, written: Path
) -> None:
    mine, known = (torch.load(written / f"{name}.ckpt", weights_only=True) for name in (f"{layout}_{strategy}", "1"))
    assert_alike(mine, known, "checkpoint")


def assert_alike(mine: Any, known: Any, place: str) -> None:
    """The same nesting of the same keys in the same order, and the same values but for rounding."""
    assert type(mine) is type(known), place
    if isinstance(known, dict):
        assert list(mine) == list(known), place
        for key in known:
            assert_alike(mine[key], known[key], f"{place}.{key}")
    elif isinstance(known, (list, tuple)):
        assert len(mine) == len(known), place
        for i, (x, y) in enumerate(zip(mine, known, strict=True)):
            assert_alike(x, y, f"{place}[{i}]")
    elif isinstance(known, torch.Tensor):
        assert mine.device == known.device and mine.dtype == known.dtype, place
        torch.testing.assert_close(mine, known, rtol=0, atol=1e-10, msg=place)
    else:
        assert mine == known, place
