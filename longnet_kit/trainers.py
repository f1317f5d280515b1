"""The Trainer of a recipe, for training and for evaluation, and what its errors and its output are to the user."""

from __future__ import annotations

import errno
import logging
import re
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.profilers import AdvancedProfiler, SimpleProfiler

from longnet_kit import callbacks, checkpoint_io, parallel, placement, recipe_schema, runs, terminal
from longnet_kit.errors import UserError
from longnet_kit.parallel.strategies import SequenceParallel
from longnet_kit.recipe import Recipe
from longnet_kit.signals import Interrupted

_CLEAN_UP = "Please call `iter(combined_loader)` first"
"""What Lightning raises while it cleans up after an error of starting a loader."""
_SHARED_MEMORY = re.compile(
    r"unable to (write to file|mmap|resize|allocate shared memory).*No space left|DataLoader worker .*Bus error",
    re.DOTALL,
)

VALIDATIONS = 5
"""How often a run validates when its recipe does not say."""


def build(r: Recipe, watchers: list[Callback]) -> Trainer:
    """Make the Trainer; from then on each process knows its rank. The step count is fixed: one epoch is the whole run.

    Raises:
        UserError: the recipe's devices are not there, or Lightning refuses an argument.
    """
    arguments = dict(r.trainer)
    batches = arguments["max_steps"] * arguments.get("accumulate_grad_batches", 1)
    arguments["val_check_interval"] = _validation_interval(arguments, batches)
    if isinstance(arguments.get("devices"), list) and not placement.on_accelerator(r):
        raise UserError(f"trainer.devices: {recipe_schema.listed_on_cpu(arguments['devices'])}")
    kinds = {"simple": SimpleProfiler, "advanced": AdvancedProfiler}
    kind = kinds.get(arguments.pop("profiler", None))  # pytorch's is a callback's work, see callbacks.Profile
    placement.check_world(r)
    strategy = placement.strategy(r)
    plugins: list[Any] = [checkpoint_io.StagedCheckpointIO()]
    if isinstance(strategy, parallel.SequenceParallelFSDPStrategy) and arguments.get("precision") == "64-true":
        del arguments["precision"]  # Lightning takes it for a model-parallel strategy as a plugin only
        plugins.append(DoublePrecision())
    with lightning_errors():
        trainer = Trainer(
            **arguments,
            strategy=strategy,
            plugins=plugins,
            callbacks=[callbacks.FastKernels(), *watchers],
            logger=False,
            default_root_dir=str(runs.ROOT / r.name),  # under SLURM, Lightning would go on from what it finds there
            profiler=kind(filename="profile") if kind else None,  # without a name it would write to a log
            use_distributed_sampler=False,
            enable_model_summary=False,
        )
    trainer._signal_connector.register_signal_handlers = lambda: None  # ours stay, see signals.Listener
    if isinstance(trainer.strategy, SequenceParallel):
        trainer.strategy.told_elsewhere = (Interrupted, callbacks.NonFiniteError)
        try:
            _ = trainer.strategy.sequence_parallel_size  # of devices that only the machine knows
        except UserError as error:
            raise UserError(f"strategy.sequence_parallel_size: {error}") from error
    return trainer


def _validation_interval(arguments: Mapping[str, Any], batches: int) -> int:
    """Batches from one validation to the next: as the recipe says, but whole optimizer steps, as checkpoints are.

    Args:
        batches: those of the whole run, of which a fraction is meant.
    """
    accumulated = arguments.get("accumulate_grad_batches", 1)
    given = arguments.get("val_check_interval")
    wanted = batches // VALIDATIONS if given is None else given if isinstance(given, int) else int(given * batches)
    return min(-(-max(1, wanted) // accumulated) * accumulated, batches)


def progress(r: Recipe) -> list[Callback]:
    """The progress bar, unless the recipe wants none."""
    return [] if r.trainer.get("enable_progress_bar") is False else [callbacks.progress_bar()]


@contextmanager
def lightning_errors() -> Iterator[None]:
    """Errors under Lightning as the user should see them; its advertisements are not shown.

    What Lightning finds wrong with a configuration, and too little shared memory for loader processes, are UserErrors.
    An error that Lightning's clean-up has hidden behind one of its own is raised itself.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec", FutureWarning)
            warnings.filterwarnings("ignore", "The number of training batches .* is smaller than the logging interval")
            yield
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error
    except (OSError, RuntimeError) as error:
        hidden = error.__context__ if _CLEAN_UP in str(error) else None
        cause = hidden or error
        if _is_about_shared_memory(cause):
            raise UserError(
                "the data loader's processes ran out of shared memory (/dev/shm); lower data.num_workers, to 0 for "
                "none, or give it more, as with `docker run --shm-size=1g`"
            ) from cause
        if hidden is None:
            raise
        raise hidden from None


def _is_about_shared_memory(error: BaseException) -> bool:
    """Whether loader processes could not be started, or not send their batches, for lack of shared memory."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        return any(name.startswith("multiprocessing.") for name in modules)
    return isinstance(error, RuntimeError) and _SHARED_MEMORY.search(str(error)) is not None


def say(text: str) -> None:
    """Print, on the first rank."""
    if rank_zero_only.rank == 0:
        terminal.say(text)


def si(number: float) -> str:
    """1,234,567 as 1.23M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"
