"""Start the processes of a run, and let them agree on what they run, on errors and on what the first one decides."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning import Trainer

from longnet_kit.errors import UserError
from longnet_kit.parallel import refusals
from longnet_kit.parallel.strategies import SequenceParallel, was_started_by_a_rank

T = TypeVar("T")

LISTED = 3
"""The most ranks whose differences an error lists."""


def connect(trainer: Trainer) -> None:
    """Start and connect the processes, if the trainer has several; nothing happens the second time.

    Raises:
        UserError: the port of the first rank is in use.
    """
    strategy = trainer.strategy
    if not isinstance(strategy, SequenceParallel) or dist.is_initialized():
        return
    with _ending_all(strategy):
        try:
            if strategy.launcher is not None:
                strategy.launcher.launch(strategy.join, trainer=trainer)
            else:  # a process that was started by others
                with refusals.heeded(strategy.cluster_environment):  # type: ignore[attr-defined]
                    strategy.join()
        except RuntimeError as error:
            if "EADDRINUSE" not in str(error):
                raise
            raise UserError(
                f"port {os.environ.get('MASTER_PORT')} is in use by another process of this machine; set the "
                "environment variable MASTER_PORT to a free one, the same for all ranks"
            ) from error


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
    connect(trainer)
    outcome: tuple[Any, bool] = (None, False)
    failure: Exception | None = None
    with _ending_all(strategy):
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


def together(trainer: Trainer, do: Callable[[], T]) -> T:
    """What `do` returns on this rank, once it has returned on all ranks, which must be connected.

    Raises:
        UserError: `do` raised one here, or on another rank. Ranks that the first one started exit with 2, silently.
    """
    result: Any = None
    failure: UserError | None = None
    try:
        result = do()
    except UserError as error:
        failure = error
    failures = _all(trainer, None if failure is None else str(failure))
    _raise_alike([f"rank {rank}: {words}" for rank, words in enumerate(failures) if words is not None], own=failure)
    return result


def check_same(trainer: Trainer, values: Mapping[str, Any], hint: str) -> None:
    """Refuse ranks that disagree. All of them must ask, and must be connected.

    Args:
        values: what this rank has, by the names that an error gives them.
        hint: what to do about a difference.

    Raises:
        UserError: another rank has other values than the first one. Ranks that the first one started exit with 2,
            silently.
    """
    first, *others = _all(trainer, dict(values))
    found: list[str] = []
    for rank, own in enumerate(others, start=1):
        names = [name for name in dict.fromkeys((*first, *own)) if first.get(name) != own.get(name)]
        different = [
            f"{name} is {_short(own, name)} on rank {rank} and {_short(first, name)} on rank 0" for name in names
        ]
        found += ["; ".join(different)] if different else []
    _raise_alike(found, hint=hint)


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


def _all(trainer: Trainer, own: T) -> list[T]:
    """As `gathered`, outside of Lightning's loops."""
    if not isinstance(trainer.strategy, SequenceParallel):
        return [own]
    with _ending_all(trainer.strategy):
        return gathered(trainer, own)


@contextmanager
def _ending_all(strategy: SequenceParallel) -> Iterator[None]:
    """Report an error of a transfer outside of Lightning's loops as one inside is reported, and end the other ranks."""
    try:
        yield
    except (RuntimeError, UserError) as error:
        strategy.on_exception(error)
        raise


def _raise_alike(problems: Sequence[str], own: UserError | None = None, hint: str = "") -> None:
    """Raise the problems of any ranks on all ranks; this rank's own error where it has one."""
    if not problems:
        return
    if was_started_by_a_rank():
        sys.exit(2)
    if own is not None:
        raise own
    more = [f"{len(problems) - LISTED} more ranks"] if len(problems) > LISTED else []
    raise UserError("\n  ".join([*problems[:LISTED], *more]) + (f"; {hint}" if hint else ""))


def _short(values: Mapping[str, Any], name: str) -> str:
    text = repr(values[name]) if name in values else "missing"
    return text if len(text) <= 200 else f"{text[:197]}..."
