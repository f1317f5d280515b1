"""Optimizers and schedules."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from longnet_kit.tasks import optimization
from tests.tasks.tiny import network, options


def factors(steps: int, warmup: int, schedule: str) -> list[float]:
    """lr of each optimizer step, of a base of 1."""
    section = options(lr=1.0, warmup_steps=warmup, schedule=schedule)
    optimizer = optimization.build(section, network())
    scheduler = optimization.schedule(section, optimizer, steps)
    used = []
    for _ in range(steps):
        used.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return used


def test_schedules_step_by_step() -> None:
    assert factors(6, 2, "constant") == [0.5, 1, 1, 1, 1, 1]
    assert factors(6, 2, "linear") == pytest.approx([0.5, 1, 1, 0.75, 0.5, 0.25])
    cosine = [(1 + math.cos(math.pi * i / 4)) / 2 for i in range(4)]
    assert factors(6, 2, "cosine") == pytest.approx([0.5, 1, *cosine])
    assert factors(3, 0, "linear") == pytest.approx([1, 2 / 3, 1 / 3])
    assert factors(3, 3, "linear") == pytest.approx([1 / 3, 2 / 3, 1])


def test_only_matrices_decay() -> None:
    net = network()
    groups = optimization.build(options(name="adamw", weight_decay=0.3), net).param_groups
    decayed = {id(p) for p in groups[0]["params"]}
    assert groups[0]["weight_decay"] == 0.3 and groups[1]["weight_decay"] == 0
    for name, p in net.named_parameters():
        assert (id(p) in decayed) is (name.endswith("weight") and "norm" not in name), name
    assert len(groups[0]["params"]) + len(groups[1]["params"]) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)]
)
def test_each_name_is_torchs_optimizer(name: str, kind: type) -> None:
    optimizer = optimization.build(options(name=name, lr=0.25, betas=(0.8, 0.9)), network())
    assert type(optimizer) is kind
    assert optimizer.param_groups[0]["lr"] == 0.25
    if name == "sgd":
        assert optimizer.param_groups[0]["momentum"] == 0
    else:
        assert optimizer.param_groups[1]["betas"] == (0.8, 0.9)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'lion'"):
        optimization.build(options(name="lion"), network())
    optimizer = optimization.build(options(), network())
    with pytest.raises(ValueError, match="'step'"):
        optimization.schedule(options(schedule="step"), optimizer, 5)


def test_eps_is_that_of_the_section() -> None:
    """One step of Adam from scratch moves a weight by lr * g / (|g| + eps)."""
    for name in ("adam", "adamw"):
        weight = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        before = weight.weight.item()
        optimizer = optimization.build(options(name=name, lr=0.5, eps=0.25), weight)
        weight.weight.grad = torch.full((1, 1), 0.75, dtype=torch.float64)
        optimizer.step()
        assert before - weight.weight.item() == pytest.approx(0.5 * 0.75 / (0.75 + 0.25), abs=1e-12)


def test_an_eps_that_is_0_in_the_dtype_of_the_weights_is_refused() -> None:
    half = network().half()
    for name in ("adam", "adamw"):
        with pytest.raises(ValueError, match=r"optimizer.eps: got 1e-08, which is 0 in the weights' float16.*eps=1e-4"):
            optimization.build(options(name=name), half)
        optimization.build(options(name=name, eps=1e-4), half)
        optimization.build(options(name=name), network().bfloat16())
    optimization.build(options(name="sgd"), half)


def test_a_decay_is_lost_exactly_where_no_weight_changes() -> None:
    for dtype, lost in ((torch.float16, 2e-4), (torch.bfloat16, 1.9e-3), (torch.float32, 2e-8)):
        weights = torch.linspace(0.5, 2, 1000).to(dtype)
        for factor in (lost, 4 * lost):
            section = options(name="adamw", lr=1.0, weight_decay=factor)
            parameter = torch.nn.Parameter(weights.clone().view(1, -1))
            parameter.grad = torch.zeros_like(parameter)
            optimization.build(SimpleNamespace(**vars(section) | {"eps": 1e-4}), _Holder(parameter)).step()
            is_unchanged = torch.equal(parameter.view(-1), weights)
            assert optimization.decay_vanishes(section, dtype) is is_unchanged is (factor == lost), (dtype, factor)


class _Holder(torch.nn.Module):
    def __init__(self, parameter: torch.nn.Parameter) -> None:
        super().__init__()
        self.parameter = parameter


def test_an_eps_below_the_normal_numbers_of_the_weights_is_refused() -> None:
    half = _Holder(torch.nn.Parameter(torch.ones(2, dtype=torch.float16)))
    with pytest.raises(ValueError, match=r"got 1e-07, which is below the normal numbers in the weights' float16"):
        optimization.build(options(name="adamw", eps=1e-7), half)
