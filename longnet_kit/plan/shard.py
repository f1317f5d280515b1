"""A rank of a sequence group that is not there: transfers have their sizes, and what would come is counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention.sharding import Pending, SequenceShard


class Transfer(NamedTuple):
    """A kind of transfer, as it is counted."""

    work: str
    """What was going on: `forward`, `backward` or `recomputed`."""
    name: str
    """`all_gather`, `reduce_scatter` or `all_to_all`."""
    within_node: bool
    """Whether all ranks that take part are on one node."""


class PlannedShard(SequenceShard):
    """One rank of a group, alone. What comes from other ranks is uninitialised memory.

    Args:
        rank, size: as of any SequenceShard.
        node: ranks on a node; the group begins at the first of one.
        work: asked at every transfer what is going on.

    Attributes:
        elements, received: elements and bytes that would have come from other ranks so far, subgroups included.
    """

    def __init__(self, rank: int, size: int, node: int = 1, work: Callable[[], str] = lambda: "") -> None:
        self.rank = rank
        self.size = size
        self.elements: Counter[Transfer] = Counter()
        self.received: Counter[Transfer] = Counter()
        self._first = 0
        self._node = node
        self._work = work

    def all_gather(self, x: Tensor) -> Pending:
        x = x.contiguous()
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return self._transfer("all_gather", out, (self.size - 1) * x.numel())

    def reduce_scatter(self, x: Tensor) -> Pending:
        x = x.contiguous()
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        return self._transfer("reduce_scatter", out, (self.size - 1) * out.numel())

    def all_to_all(self, x: Tensor) -> Tensor:
        x = x.contiguous()
        return self._transfer("all_to_all", torch.empty_like(x), x.numel() // self.size * (self.size - 1))()

    def subgroup(self, size: int) -> PlannedShard:
        first = self.rank // size * size
        sub = PlannedShard(self.rank - first, min(size, self.size - first), self._node, self._work)
        sub.elements, sub.received, sub._first = self.elements, self.received, self._first + first
        return sub

    def _transfer(self, name: str, out: Tensor, elements: int) -> Pending:
        last = self._first + self.size - 1
        transfer = Transfer(self._work(), name, self._first // self._node == last // self._node)
        self.elements[transfer] += elements
        self.received[transfer] += elements * out.element_size()
        return lambda: out
