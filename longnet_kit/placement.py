"""Where a recipe runs: its precision, its devices, and the strategy that spreads it over them."""

from __future__ import annotations

import os
from datetime import timedelta

import torch
from lightning.pytorch.strategies import Strategy

from longnet_kit import parallel
from longnet_kit.errors import UserError
from longnet_kit.recipe import Recipe


def precision(r: Recipe) -> str:
    """The Trainer's precision, such as `bf16-mixed`."""
    return str(r.trainer.get("precision", "32-true"))


def devices(r: Recipe) -> int:
    """How many devices the run has in all."""
    given = r.trainer.get("devices", "auto")
    if isinstance(given, list):
        given = len(given)
    elif given == "auto":
        accelerator = r.trainer.get("accelerator", "auto")
        given = max(1, torch.cuda.device_count()) if accelerator in ("auto", "gpu", "cuda") else 1
    return given * r.trainer.get("num_nodes", 1)


def on_accelerator(r: Recipe) -> bool:
    """Whether the run is on something other than the CPU."""
    accelerator = r.trainer.get("accelerator", "auto")
    return accelerator != "cpu" and (accelerator != "auto" or torch.accelerator.is_available())


def strategy(r: Recipe) -> Strategy | str:
    """The recipe's strategy: on several devices always one whose processes can agree on where they run."""
    name, size = r.strategy.name, 1
    if name == "auto" and devices(r) == 1:
        return "auto"
    if name.startswith("sequence_parallel"):
        size = r.strategy.sequence_parallel_size
    kind = parallel.SequenceParallelFSDPStrategy if name.endswith("fsdp") else parallel.SequenceParallelStrategy
    return kind(size, timeout=timedelta(seconds=r.strategy.timeout))


def check_world(r: Recipe) -> None:
    """Refuse to be one of more or fewer processes than the recipe has devices: they would be runs of their own.

    Raises:
        UserError: this process was started as one of another number.
    """
    world, wanted = os.environ.get("WORLD_SIZE", ""), devices(r)
    if "LOCAL_RANK" in os.environ and world.isdigit() and int(world) != wanted:
        raise UserError(
            f"trainer.devices: the recipe is for {wanted} devices in all (devices x num_nodes), and this job has "
            f"{world} processes; set trainer.devices to those of a node and trainer.num_nodes, or start as many"
        )
