"""How well a stream was predicted, overall and by how far into it a token stands."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longnet_kit.report import table

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass
class Decade:
    """Predictions of the tokens from position 10^d on, up to the next power of ten."""

    nats: float = 0.0
    text_bytes: float = 0.0
    tokens: int = 0

    def add(self, nats: Floats, text_bytes: Floats) -> None:
        """Add predictions: -log p, and the bytes of text, of each token."""
        self.nats += float(nats.sum())
        self.text_bytes += float(text_bytes.sum())
        self.tokens += len(nats)

    @property
    def bits_per_byte(self) -> float:
        """NaN where there is no text."""
        return self.nats / math.log(2) / self.text_bytes if self.text_bytes else math.nan


@dataclass
class Score:
    """Predictions by decade of position; the token at position 0, which nothing comes before, is none of them."""

    decades: list[Decade] = field(default_factory=list)

    def add(self, first: int, nats: Floats, text_bytes: Floats) -> None:
        """Add the predictions of the tokens from position `first` on, which is at least 1."""
        for decade, part in _decades(first, len(nats)):
            while len(self.decades) <= decade:
                self.decades.append(Decade())
            self.decades[decade].add(nats[part], text_bytes[part])

    @property
    def total(self) -> Decade:
        """Over all positions."""
        return Decade(
            math.fsum(d.nats for d in self.decades),
            math.fsum(d.text_bytes for d in self.decades),
            sum(d.tokens for d in self.decades),
        )

    def state_dict(self) -> list[list[float]]:
        """Plain values."""
        return [[d.nats, d.text_bytes, d.tokens] for d in self.decades]

    @classmethod
    def of_state(cls, state: list[list[float]]) -> Score:
        """What `state_dict` gave."""
        return cls([Decade(nats, text_bytes, int(tokens)) for nats, text_bytes, tokens in state])

    def lines(self) -> list[str]:
        """A table, a decade to a line."""
        ranges = [f"{10**i:,} to {10 ** (i + 1) - 1:,}" for i in range(len(self.decades))]
        tokens = [d.tokens for d in self.decades]
        bits = [d.bits_per_byte for d in self.decades]
        columns = [
            table.Column("position", "position", ranges, ranges),
            table.Column("tokens", "tokens", tokens, [f"{n:,}" for n in tokens]),
            table.Column("bits per byte", "bits_per_byte", bits, [f"{b:.4f}" for b in bits]),
        ]
        return table.text(columns).splitlines()


def _decades(first: int, count: int) -> Iterator[tuple[int, slice]]:
    """Which of so many tokens, the first at position `first`, stand in which decade."""
    start = 0
    while start < count:
        decade = len(str(first + start)) - 1
        stop = min(count, 10 ** (decade + 1) - first)
        yield decade, slice(start, stop)
        start = stop
