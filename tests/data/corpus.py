"""Small sources and caches that the tests of the data package share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from longnet_kit.data import Document, LanguageModelingData, Source


class Given(Source):
    """The documents it is given; `calls` counts how often they were read."""

    label = "given"

    def __init__(self, documents: Sequence[Document], version: Any = 0) -> None:
        self.given = list(documents)
        self.version = version
        self.calls = 0

    def documents(self, as_bytes: bool) -> Iterator[Document]:
        self.calls += 1
        yield from self.given

    def fingerprint(self) -> Any:
        return [[d.name, len(d.content)] for d in self.given] + [self.version]


def counted(tokens: dict[str, int]) -> Given:
    """One document for each split, of so many bytes that count up modulo 251 (a prime: no window repeats)."""
    return Given([Document(s, bytes(i % 251 for i in range(n)), s) for s, n in tokens.items()])  # type: ignore[arg-type]


def module(cache_dir: Path, windows: int = 50, seq_len: int = 16, **options: Any) -> LanguageModelingData:
    """A data module over that many windows of training text, and 11 each to validate and test on; built, and open."""
    source = counted({"train": windows * seq_len, "val": 11 * seq_len, "test": 11 * seq_len})
    made = LanguageModelingData(
        source, "bytes", cache_dir=cache_dir, **{"seq_len": seq_len, "batch_size": 4, **options}
    )
    made.prepare_data()
    made.setup()
    return made
