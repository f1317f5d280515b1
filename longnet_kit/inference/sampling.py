"""From logits to a token: temperature, top-k and top-p."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longnet_kit.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn. Temperature comes first, then top-k, then top-p on what is left.

    Args:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: only so many of the likeliest tokens; None: all.
        top_p: only the likeliest tokens that together have at least this probability (arXiv 1904.09751); 1: all.

    Raises:
        UserError: a number is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}, expected a number of at least 0")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}, expected at least 1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}, expected a number above 0, up to 1")

    def probabilities(self, logits: Tensor) -> Tensor:
        """The distribution that is drawn from: (..., V) to (..., V), float64.

        Of tokens that are equally likely the first counts as likelier.
        """
        logits = logits.double()
        if self.temperature == 0:
            best = logits.argmax(-1, keepdim=True)
            return torch.zeros_like(logits).scatter_(-1, best, 1.0)
        logits = logits - logits.amax(-1, keepdim=True)  # at most 0: no temperature is too low
        ordered, order = (logits / self.temperature).sort(dim=-1, descending=True, stable=True)
        if self.top_k is not None:
            ordered[..., self.top_k :] = -torch.inf
        probabilities = ordered.softmax(-1)
        likelier = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(likelier >= self.top_p, 0)
        probabilities[..., 0].clamp_(min=torch.finfo(torch.float64).tiny)  # it stays, whatever rounding says
        return torch.zeros_like(logits).scatter_(-1, order, probabilities / probabilities.sum(-1, keepdim=True))

    def draw(self, logits: Tensor, generators: Sequence[torch.Generator]) -> list[int]:
        """A token for each row of logits, (B, V), by the row's own CPU generator.

        Raises:
            UserError: logits are not finite.
        """
        logits = logits.double().cpu()
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite; its weights may be spoilt, or its precision too narrow")
        rows = zip(self.probabilities(logits), generators, strict=True)
        return [int(torch.multinomial(row, 1, generator=generator)) for row, generator in rows]
