"""Where a recipe runs: its precision, its devices, and the strategy that spreads it over them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path, PurePath
from typing import Any

import torch
from lightning import Trainer
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import Strategy

from longnet_kit import checkpoint_io, parallel, recipe
from longnet_kit.data import LanguageModelingData
from longnet_kit.dotted import leaves
from longnet_kit.errors import UserError
from longnet_kit.recipe import Recipe

FREE_AMONG_RANKS = (
    "description",
    "extends",
    "init_from",
    "resume",
    "data.num_workers",
    "data.tokenizer",
    "trainer.devices",
    "trainer.enable_progress_bar",
)
"""Keys that ranks may have different values of. What is read through a path is compared by its content; the first rank
alone decides where a run resumes; the number of processes is checked by `check_world`."""

_SAME_COMMAND = "start every rank with the same recipe and keys"


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
        UserError: this process was started as one of another number, or with an address that cannot be one.
    """
    wanted = devices(r)
    world = rank = ""
    highest = wanted
    if "LOCAL_RANK" in os.environ:
        world, rank = os.environ.get("WORLD_SIZE", ""), os.environ["LOCAL_RANK"]
        highest = wanted // r.trainer.get("num_nodes", 1)
    elif "SLURM_PROCID" in os.environ:
        rank = os.environ["SLURM_PROCID"]
        world = os.environ.get("SLURM_STEP_NUM_TASKS", "") if SLURMEnvironment.detect() else ""
    if (world.isdigit() and int(world) != wanted) or (rank.isdigit() and int(rank) >= highest):
        raise UserError(
            f"trainer.devices: the recipe is for {wanted} devices in all (devices x num_nodes), and this job has "
            f"{world or 'more'} processes; set trainer.devices to those of a node and trainer.num_nodes, or start as "
            "many"
        )
    port = os.environ.get("MASTER_PORT", "0")
    if wanted > 1 and not (port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise UserError(f"the environment variable MASTER_PORT is {port!r}, expected a free port, like 29500")


def check_recipes(trainer: Trainer, r: Recipe, **more: Any) -> None:
    """Refuse ranks that were started with different recipes; `more` must be the same on all of them too.

    Raises:
        UserError: another rank has other values than the first one.
    """
    values = dict(leaves(recipe.to_dict(r)))
    own = [key for key in values if key.startswith("data.") and key.removeprefix("data.") in r.data.options]
    compared = {key: value for key, value in values.items() if key not in (*FREE_AMONG_RANKS, *own)}
    compared["imports"] = [PurePath(entry).name for entry in r.imports]
    compared["init_from"] = None if r.init_from is None else "given"
    parallel.check_same(trainer, compared | more, _SAME_COMMAND)


def check_checkpoint(trainer: Trainer, checkpoint: Path) -> None:
    """Refuse ranks that read checkpoints of one name but different content, as on machines with disks of their own.

    Raises:
        UserError: a rank cannot read its checkpoint, or has another one than the first rank.
    """
    if trainer.world_size == 1:
        return
    found = parallel.together(trainer, lambda: checkpoint_io.checksum(checkpoint))
    same = {f"the SHA-256 of {checkpoint.name}": found}
    parallel.check_same(trainer, same, f"copy {checkpoint.parent} of one machine to all others")


@dataclass(frozen=True)
class _Data:
    """What the data of a rank is: equal where the content is, wherever it was read from."""

    identity: str
    source: dict[str, Any] = field(compare=False)

    def __repr__(self) -> str:
        return f"{self.identity} (of {', '.join(f'{key}: {value!r}' for key, value in self.source.items())})"


def check_data(trainer: Trainer, r: Recipe, datamodule: LanguageModelingData, stage: str) -> None:
    """Prepare and open the data on all ranks, and refuse ranks whose data differs in content.

    Raises:
        UserError: data cannot be used on a rank, or is not that of the first one.
    """
    if trainer.world_size == 1:
        return
    builds = trainer.local_rank == 0  # the others of its node find the cache that it has built
    parallel.together(trainer, datamodule.prepare_data if builds else lambda: None)
    parallel.together(trainer, lambda: (datamodule.prepare_data(), datamodule.setup(stage)))
    source = {"source": r.data.source, **r.data.options}
    content = parallel.together(trainer, lambda: _Data(datamodule.content(), source))
    same = {"the data": content, "data.tokenizer": datamodule.tokenizer.fingerprint}
    parallel.check_same(trainer, same, "give every rank the same files")
