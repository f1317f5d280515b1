"""A logger that remembers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from lightning.pytorch.loggers import Logger


class LastValues(Logger):
    """Keeps the last value of every scalar by its tag, on every rank, for the summary of a run. It writes no files.

    Args:
        earlier: rows of metrics.csv, oldest first, that a resumed run goes on from.
    """

    def __init__(self, earlier: Iterable[Mapping[str, str]] = ()) -> None:
        super().__init__()
        self.values: dict[str, float] = {}
        for row in earlier:
            self.log_metrics({tag: float(value) for tag, value in row.items() if tag != "step"})

    @property
    def name(self) -> str:
        return "last_values"

    @property
    def version(self) -> str:
        return ""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Remember these; `epoch`, which Lightning adds of its own, is no scalar of a run."""
        self.values.update({tag: float(value) for tag, value in metrics.items() if tag != "epoch"})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to remember."""
