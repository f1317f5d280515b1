"""How a run is spread over devices, and what `devices=N` makes of a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lightning.pytorch.strategies import Strategy

from longnet_kit import parallel, placement, recipe
from longnet_kit.errors import UserError
from longnet_kit.recipe import Recipe

NODE = 8
"""Devices on a node where the recipe does not say."""


@dataclass(frozen=True)
class Spread:
    """How many devices there are and what each of them holds."""

    devices: int
    per_node: int
    shards: int
    """Devices that share a sequence."""
    strategy: Strategy | None
    """As the run would have it; None on a device alone."""

    @property
    def data_ranks(self) -> int:
        """How many batches are trained on at once."""
        return self.devices // self.shards

    @property
    def is_fsdp(self) -> bool:
        """Whether parameters, gradients and optimizer state are divided among all devices."""
        return isinstance(self.strategy, parallel.SequenceParallelFSDPStrategy)

    @property
    def has_buckets(self) -> bool:
        """Whether DDP holds the gradients a second time."""
        if not isinstance(self.strategy, parallel.SequenceParallelStrategy):
            return False
        return not self.strategy._ddp_kwargs.get("gradient_as_bucket_view", False)


def of(r: Recipe) -> Spread:
    """The spread of a recipe."""
    devices = placement.devices(r)
    strategy = placement.strategy(r)
    divides = r.strategy.name.startswith("sequence_parallel")
    return Spread(
        devices=devices,
        per_node=devices // r.trainer.get("num_nodes", 1),
        shards=r.strategy.sequence_parallel_size if divides else 1,
        strategy=strategy if isinstance(strategy, Strategy) else None,
    )


def load(path: str | Path, overrides: Sequence[str], devices: int | None) -> tuple[Recipe, str]:
    """Read a recipe for a number of devices in all.

    What the overrides say of the strategy holds. Else the recipe's holds, if it divides sequences or has so many
    devices already; its groups become as large as the job where their size is 1 or does not fit. Else sequences are
    divided among all devices, if they and the attention can be, with FSDP where the recipe has it.

    Returns:
        The recipe, and what was assumed.

    Raises:
        UserError: as `recipe.load`; or `devices` beside trainer.devices or trainer.num_nodes.
    """
    keys = {item.partition("=")[0] for item in overrides}
    if devices is None:
        return recipe.load(path, overrides), ""
    twice = sorted(keys & {"trainer.devices", "trainer.num_nodes", "trainer"})
    if twice:
        raise UserError(f"devices={devices} and {twice[0]} both say how many devices there are; leave one of them out")
    placed = [*overrides, *on_nodes(devices)]
    size = "strategy.sequence_parallel_size"
    if any(key.startswith("strategy") for key in keys):
        own = recipe.load(path, placed)
        unsaid = own.strategy.name.startswith("sequence_parallel") and own.strategy.sequence_parallel_size == 1
        if not unsaid or devices == 1 or keys & {size, "strategy"}:
            return own, ""
        return recipe.load(path, [*placed, f"{size}={devices}"]), f"all {devices} devices share a sequence"
    alone = recipe.load(path, [*placed, f"{size}=1"])  # what is wrong with the rest is told here
    name = alone.strategy.name
    if name.startswith("sequence_parallel"):
        own = _try(path, placed)
        if own is not None and own.strategy.sequence_parallel_size > 1:
            return own, f"groups of {own.strategy.sequence_parallel_size} devices, as in the recipe"
        return recipe.load(path, [*placed, f"{size}={devices}"]), f"all {devices} devices share a sequence"
    if devices == 1 or _same_devices(path, overrides, devices):
        return alone, f"strategy {name}, as in the recipe"
    divided = "sequence_parallel_fsdp" if name == "fsdp" else "sequence_parallel"
    try:
        shared = recipe.load(path, [*placed, f"strategy.name={divided}", f"{size}={devices}"])
    except recipe.RecipeError as error:
        why = str(error.problems[0].message)
        return alone, f"strategy {name}, data-parallel, since sequences cannot be divided: {why}"
    return shared, f"strategy {divided}: all {devices} devices share a sequence"


def on_nodes(devices: int) -> list[str]:
    """Overrides that give a run so many devices in all, on nodes of at most `NODE`."""
    per_node = next(d for d in range(min(NODE, devices), 0, -1) if devices % d == 0)
    return [f"trainer.devices={per_node}", f"trainer.num_nodes={devices // per_node}"]


def _try(path: str | Path, overrides: Sequence[str]) -> Recipe | None:
    try:
        return recipe.load(path, overrides)
    except recipe.RecipeError:
        return None


def _same_devices(path: str | Path, overrides: Sequence[str], devices: int) -> bool:
    own = _try(path, overrides)
    return own is not None and placement.devices(own) == devices
