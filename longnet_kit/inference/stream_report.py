"""What a stream says of itself: what is read with which network, and what came of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longnet_kit.inference.corpus import Corpus
from longnet_kit.inference.network import Trained
from longnet_kit.inference.score import Score
from longnet_kit.model.cache import StreamCache
from longnet_kit.report import table


def opening(trained: Trained, corpus: Corpus, chunk: int, cache: StreamCache, directory: Path) -> str:
    """The lines before reading begins."""
    names = corpus.names if len(corpus.names) <= 3 else [*corpus.names[:2], f"{len(corpus.names) - 2:,} more"]
    lines = [
        f"stream      {trained.weights}, step {trained.step}",
        f"            {trained.reach()}",
        f"reads       {', '.join(names)} ({corpus.size:,} bytes) as one sequence",
        f"            {chunk:,} tokens at a time, into a cache {_size(cache)}",
        f"results in  {directory}",
    ]
    return "\n".join([*lines, f"goes on     after {cache.position:,} tokens"] if cache.position else lines)


def _size(cache: StreamCache) -> str:
    if cache.max_tokens is None:
        return f"of {table.size(cache.nbytes)}"
    return f"that keeps every token, {cache.max_tokens:,} at most"


@dataclass
class Summary:
    """What came of a stream."""

    is_stopped: bool
    """Whether it was asked to end before it was through."""
    tokens: int
    wanted: int | None
    """Tokens that were asked for."""
    readings: int
    """How often the files were read, the last time perhaps in part."""
    score: Score
    seconds: float
    memory: int
    """Bytes, at the most."""
    cache: int
    """Bytes."""
    added: list[tuple[int, int]]
    """Branches that the network was not trained with."""

    @property
    def status(self) -> str:
        """In a word."""
        return "stopped" if self.is_stopped else "finished"

    @property
    def decades(self) -> dict[int, float]:
        """Bits per byte by the first position of each decade.

        A last decade of fewer tokens than the one before is left out: its mean is noisier, and reads like a change.
        """
        of_all = self.score.decades
        return {
            10**i: decade.bits_per_byte
            for i, decade in enumerate(of_all)
            if i == 0 or decade.tokens >= of_all[i - 1].tokens
        }

    def as_dict(self) -> dict[str, Any]:
        """Plain values, flat."""
        total = self.score.total
        return {
            "status": self.status,
            "tokens": self.tokens,
            "text_bytes": round(total.text_bytes),
            "bits_per_byte": total.bits_per_byte,
            "tokens_per_second": self.tokens / self.seconds,
            "seconds": self.seconds,
            "memory": self.memory,
            "cache": self.cache,
            "readings": self.readings,
            "added_branches": [list(branch) for branch in self.added],
            **{f"bits_per_byte_from_{first}": bits for first, bits in self.decades.items()},
        }

    def text(self) -> str:
        """The lines at the end."""
        told = ""
        if self.readings > 1:
            told = f"; the files were read {self.readings} times, the last time perhaps in part"
        elif not self.is_stopped and self.wanted is not None and self.tokens < self.wanted:
            told = f"; there the files end, {self.wanted:,} were asked for: --repeat reads them again"
        rate, bits = self.tokens / self.seconds, self.score.total.bits_per_byte
        lines = [
            f"{self.status:<11} {self.tokens:,} tokens as one sequence{told}",
            f"            {f'{bits:.4f}' if bits == bits else 'no'} bits per byte, {rate:,.0f} tokens per second, "
            f"{table.duration(self.seconds)}, {table.size(self.memory)} of memory",
            *(f"            {line}" for line in self.score.lines()),
        ]
        return "\n".join([*lines, "            the same command goes on from here"] if self.is_stopped else lines)
