"""Metrics of language modelling: mean losses per token, over all ranks. Sums are float64 and counts integers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class MeanLoss(Metric):
    """Mean loss per token, in nats; NaN where there was no token, or where a loss was NaN."""

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, counted: Tensor) -> None:
        """Add tokens: their losses, 0 where one does not count, and whether each counts, of the same shape."""
        self.total += losses.sum(dtype=torch.float64)
        self.count += counted.sum()

    def compute(self) -> Tensor:
        """The mean so far."""
        return self.total / self.count


class Losses(NamedTuple):
    """What `LossByPosition` measured, in nats; NaN where there was no token."""

    mean: Tensor
    """Over all tokens: scalar."""
    by_position: Tensor
    """(length,), or fewer of a context beyond 2^20 positions."""
    tokens: Tensor
    """How many tokens each of these is the mean of: int64."""


MAX_PLACES = 2**20
"""Sums that `LossByPosition` keeps at most; in a longer context neighbours share one."""


class LossByPosition(Metric):
    """Mean loss per token, over everything and at each position of the context.

    Args:
        length: positions in a context. Beyond 2^20, so many neighbours share a mean that there are at most 2^20.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length = length
        self.width = -(-length // MAX_PLACES)
        places = -(-length // self.width)
        self.add_state("total", torch.zeros(places, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(places, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, counted: Tensor, first: int = 0) -> None:
        """Add windows, or the same part of each.

        Args:
            losses: (B, N) with first + N at most `length`; 0 where a token does not count.
            counted: (B, N) bool.
            first: the position of the first of the N tokens.
        """
        places = torch.arange(first, first + losses.shape[1], device=losses.device) // self.width
        self.total.index_add_(0, places, losses.sum(0, dtype=torch.float64))
        self.count.index_add_(0, places, counted.sum(0))

    def compute(self) -> Losses:
        """The means so far."""
        return Losses(self.total.sum() / self.count.sum(), self.total / self.count, self.count)
