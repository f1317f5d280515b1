"""The metric of answers: the share that is right in whole, of all of them and by group, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric


class Accuracy(NamedTuple):
    """What `AnswerAccuracy` measured; NaN where there was no answer."""

    of_all: Tensor
    """Scalar, float64."""
    of_groups: Tensor
    """(G,), float64."""


class AnswerAccuracy(Metric):
    """The share of answers of which every token is right. An answer is a run of tokens that have a group.

    Args:
        groups: the G groups to report; answers of others count among all of them.
    """

    full_state_update = False
    right: Tensor
    count: Tensor

    def __init__(self, groups: Sequence[int], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.groups = list(groups)
        for name in ("right", "count"):  # of each group, and last of all answers
            self.add_state(name, torch.zeros(len(self.groups) + 1, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, wrong: Tensor, groups: Tensor) -> None:
        """Add whole sequences.

        Args:
            wrong: (B, N) bool, whether a token is predicted wrongly.
            groups: (B, N) int64, -1 where a token belongs to no answer.
        """
        inside = groups >= 0
        begins = inside & ~F.pad(inside, (1, -1))
        answer = begins.flatten().cumsum(0) - 1  # which one a token belongs to, the batch being counted through
        of_answers = groups[begins]
        mistakes = torch.zeros_like(of_answers).index_add_(0, answer[inside.flatten()], wrong[inside].long())
        for i, group in enumerate(self.groups):
            member = of_answers == group
            self.right[i] += (member & (mistakes == 0)).sum()
            self.count[i] += member.sum()
        self.right[-1] += (mistakes == 0).sum()
        self.count[-1] += len(of_answers)

    def compute(self) -> Accuracy:
        """The shares so far."""
        shares = self.right.double() / self.count
        return Accuracy(shares[-1], shares[:-1])
