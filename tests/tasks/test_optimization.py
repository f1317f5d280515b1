"""Optimizers and schedules."""

from __future__ import annotations

import math

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
