"""Ranks that are threads of one process: sequence-parallel code runs on them as it is, for tests and checks."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from longnet_kit.attention.sharding import Pending, SequenceShard

T = TypeVar("T")
PATIENCE = 60.0
"""Seconds after which a rank that waits for the others gives up: they made other calls, or none."""


def run(size: int, function: Callable[[ThreadShard], T]) -> list[T]:
    """Call `function` once for each of `size` ranks, all at once.

    Returns:
        What each call returned, in the order of the ranks.

    Raises:
        Exception: the first error of a rank; the others are stopped at their next transfer.
    """
    world = _World()
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        try:
            results[rank] = function(ThreadShard(world, range(size), rank))
        except threading.BrokenBarrierError:
            pass  # another rank failed, or this one was left waiting; told of below
        except BaseException as error:
            errors.append(error)
            world.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    if world.aborted:
        raise RuntimeError("the ranks did not make the same transfers in the same order")
    return results


class ThreadShard(SequenceShard):
    """A rank of `run`.

    Attributes:
        received: elements that came from other ranks so far, subgroups included.
    """

    def __init__(self, world: _World, members: Sequence[int], rank: int, parent: ThreadShard | None = None) -> None:
        self._world = world
        self._members = members
        self._received = [0] if parent is None else parent._received
        self.rank = rank
        self.size = len(members)

    @property
    def received(self) -> int:
        """Elements that came from other ranks so far, in subgroups too."""
        return self._received[0]

    def all_gather(self, x: Tensor) -> Pending:
        parts = self._swap(x)
        self._received[0] += (self.size - 1) * x.numel()
        return lambda: torch.cat(parts)

    def reduce_scatter(self, x: Tensor) -> Pending:
        parts = [part.chunk(self.size)[self.rank] for part in self._swap(x)]
        self._received[0] += (self.size - 1) * parts[0].numel()
        return lambda: torch.stack(parts).sum(0)

    def all_to_all(self, x: Tensor) -> Tensor:
        parts = [part.chunk(self.size)[self.rank] for part in self._swap(x)]
        self._received[0] += (self.size - 1) * parts[0].numel()
        return torch.cat(parts)

    def subgroup(self, size: int) -> ThreadShard:
        first = self.rank // size * size
        return ThreadShard(self._world, self._members[first : first + size], self.rank - first, self)

    def _swap(self, x: Tensor) -> list[Tensor]:
        """What each rank of the group passed in this call."""
        return self._world.meet(tuple(self._members), self.rank, x.detach().clone())


class _World:
    """Where the threads meet."""

    def __init__(self) -> None:
        self.aborted = False
        self._lock = threading.Lock()
        self._meetings: dict[tuple[int, ...], tuple[threading.Barrier, list[Any]]] = {}

    def meet(self, members: tuple[int, ...], rank: int, value: Tensor) -> list[Tensor]:
        with self._lock:
            if members not in self._meetings:
                self._meetings[members] = threading.Barrier(len(members), timeout=PATIENCE), [None] * len(members)
            barrier, values = self._meetings[members]
        if self.aborted:
            raise threading.BrokenBarrierError
        values[rank] = value
        try:
            barrier.wait()
            met = list(values)
            barrier.wait()
        except threading.BrokenBarrierError:
            self.aborted = True
            raise
        return met

    def abort(self) -> None:
        self.aborted = True
        with self._lock:
            for barrier, _ in self._meetings.values():
                barrier.abort()
