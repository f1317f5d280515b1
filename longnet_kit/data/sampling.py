"""Which window comes when: a pure function of the seed and the place in the global order.

A permutation of the windows is computed place by place, so nothing is stored, any place is reached at once, and the
order is the same under every version of every library.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple

from torch.utils.data import Dataset, DistributedSampler

ROUNDS = 8
PADDING = -1
"""In place of a window: a sample without any, which a rank gets when the windows do not divide evenly."""
_WORD = (1 << 64) - 1
_EVALUATION = b"evaluation"


class Position(NamedTuple):
    """How far training has come."""

    batches: int
    """Batches that each rank has trained on."""
    windows: int
    """Windows that all ranks together have trained on."""


def training_window(position: int, windows: int, seed: int) -> int:
    """The window at a place of the endless training order: each epoch is a permutation of its own."""
    epoch, index = divmod(position, windows)
    return permuted(index, windows, _key(f"{seed} {epoch}".encode()))


def evaluation_window(position: int, windows: int) -> int:
    """The window at a place of the order of validation and test, the same for every seed."""
    return permuted(position, windows, _key(_EVALUATION))


def permuted(index: int, size: int, key: int) -> int:
    """Where a keyed pseudo-random permutation of 0 .. size - 1 takes `index`.

    A Feistel network permutes the numbers of 2 b bits; it is walked until it comes back below `size`.
    """
    bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << bits) - 1
    while True:
        left, right = index >> bits, index & mask
        for round_ in range(ROUNDS):
            left, right = right, left ^ (_mixed(right + key + round_ * 0x9E3779B97F4A7C15) & mask)
        index = left << bits | right
        if index < size:
            return index


class TrainingSampler(DistributedSampler[Any]):
    """Windows in training order for one rank: `total` batches, those already served left out.

    Batch g of rank r holds the places (g R + r) B to (g R + r + 1) B - 1 of the order: what one step of all ranks sees
    depends on the global batch size B R alone. Being a DistributedSampler, it is left in place by Lightning.

    Args:
        dataset: the windows; only its length matters.
        batch_size: B.
        replicas, rank: R and r.
        seed: of the order.
        total: batches of the whole training.
        position: asked at the start of every iteration.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        batch_size: int,
        replicas: int,
        rank: int,
        seed: int,
        total: int,
        position: Callable[[], Position],
    ) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=False)
        self._windows = len(dataset)  # type: ignore[arg-type]
        self._batch_size = batch_size
        self._order_seed = seed
        self._total = total
        self._position = position

    def __len__(self) -> int:
        return self._total * self._batch_size

    def __iter__(self) -> Iterator[int]:
        start = self._position()
        remaining = self._total - start.batches % self._total
        step = self.num_replicas * self._batch_size
        first = start.windows + self.rank * self._batch_size
        return (
            training_window(first + batch * step + i, self._windows, self._order_seed)
            for batch in range(remaining)
            for i in range(self._batch_size)
        )


class EvaluationSampler(DistributedSampler[Any]):
    """Each window once, in the order of evaluation, dealt out to the ranks in turn.

    Where the windows do not divide, the ranks that lack one get `PADDING`: all ranks see equally many batches.
    """

    def __init__(self, dataset: Dataset[Any], *, replicas: int, rank: int) -> None:
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=False)
        self._windows = len(dataset)  # type: ignore[arg-type]

    def __len__(self) -> int:
        return -(-self._windows // self.num_replicas)

    def __iter__(self) -> Iterator[int]:
        places = range(self.rank, len(self) * self.num_replicas, self.num_replicas)
        return (evaluation_window(p, self._windows) if p < self._windows else PADDING for p in places)


def _mixed(word: int) -> int:
    """64 bits, each of which depends on all bits of `word` (the finalizer of splitmix64)."""
    word &= _WORD
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _WORD
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _WORD
    return word ^ word >> 31


@lru_cache(maxsize=16)
def _key(name: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest())
