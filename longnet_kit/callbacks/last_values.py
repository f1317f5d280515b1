"""A logger that remembers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger


class LastValues(Logger):
    """Keeps the last value of every scalar by its tag, for the summary of a run. It writes no files."""

    def __init__(self) -> None:
        super().__init__()
        self.values: dict[str, float] = {}

    @property
    def name(self) -> str:
        return "last_values"

    @property
    def version(self) -> str:
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Remember these; `epoch`, which Lightning adds of its own, is no scalar of a run."""
        self.values.update({tag: float(value) for tag, value in metrics.items() if tag != "epoch"})

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to remember."""
