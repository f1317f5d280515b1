"""Metrics of language modelling."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric


class Losses(NamedTuple):
    """What `LossByPosition` measured, in nats, float64; NaN where there was no token."""

    mean: Tensor
    """Over all tokens: scalar."""
    by_position: Tensor
    """(length,)."""


class LossByPosition(Metric):
    """Mean loss per token, over everything and at each position of the context, over all ranks.

    Args:
        length: positions in a context.
    """

    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.length = length
        self.add_state("total", torch.zeros(length, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(length, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, counted: Tensor) -> None:
        """Add windows.

        Args:
            losses: (B, N) with N at most `length`; 0 where a token does not count.
            counted: (B, N) bool.
        """
        seq_len = losses.shape[1]
        self.total[:seq_len] += losses.sum(0, dtype=torch.float64)
        self.count[:seq_len] += counted.sum(0)

    def compute(self) -> Losses:
        """The means so far."""
        return Losses(self.total.sum() / self.count.sum(), self.total / self.count)
