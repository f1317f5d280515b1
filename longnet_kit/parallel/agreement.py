"""Starting the processes of a run, letting the first of them decide for all, and finding out what any of them knows."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning import Trainer

from longnet_kit.parallel.strategies import SequenceParallel

T = TypeVar("T")


def agree(trainer: Trainer, decide: Callable[[], T]) -> T:
    """What `decide` returns on the first rank, on all ranks.

    Starts and connects the processes, if the trainer has several: whichever starts them, none may look at a run
    directory that another is changing.

    Raises:
        Exception: what `decide` raised, on the first rank. The others exit with 2, silently.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SequenceParallel):
        return decide()
    try:
        return _decided_by_the_first(trainer, strategy, decide)
    except RuntimeError as error:
        strategy.on_exception(error)
        raise


def _decided_by_the_first(trainer: Trainer, strategy: SequenceParallel, decide: Callable[[], T]) -> T:
    if strategy.launcher is not None:
        strategy.launcher.launch(strategy.join, trainer=trainer)
    else:  # a process that was started by others
        strategy.join()
    outcome: tuple[Any, bool] = (None, False)
    failure: Exception | None = None
    if strategy.is_global_zero:
        try:
            outcome = (decide(), True)
        except Exception as error:
            failure = error
    decided, is_decided = strategy.broadcast(outcome)
    if failure is not None:
        raise failure
    if not is_decided:
        sys.exit(2)
    return decided  # type: ignore[return-value]


def greatest(trainer: Trainer, *values: int) -> list[int]:
    """The greatest of each value over all ranks, which must all ask; no device waits for its work to be done."""
    if trainer.world_size == 1:
        return list(values)
    strategy = trainer.strategy
    assert isinstance(strategy, SequenceParallel)
    greatest = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(greatest, dist.ReduceOp.MAX, group=strategy.control)
    return greatest.tolist()


def gathered(trainer: Trainer, own: T) -> list[T]:
    """What each rank has, by rank; all of them must ask."""
    if trainer.world_size == 1:
        return [own]
    strategy = trainer.strategy
    assert isinstance(strategy, SequenceParallel)
    found: list[Any] = [None] * trainer.world_size
    dist.all_gather_object(found, own, group=strategy.control)
    return found
