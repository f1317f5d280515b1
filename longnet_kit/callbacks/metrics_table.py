"""The logger of metrics.csv: a table that a kill or a full disk leaves readable."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_warn

from longnet_kit import durable, runs

STEP = "step"


class MetricsTable(Logger):
    """Appends a row to a CSV file for each dictionary of scalars; the first column is the step, then tags by name.

    Lightning's CSVLogger removes the file of a run that goes on until it has something new, and writes a file with a
    new column over the old one. Here what is on the disk is replaced by renaming, or added to. What cannot be written
    is told of once, kept, and tried again with the next rows.

    Args:
        path: the file.
        earlier: rows of a run that goes on, which are all that stays of the file.
    """

    def __init__(self, path: Path, earlier: Sequence[Mapping[str, Any]] = ()) -> None:
        super().__init__()
        self._path = path
        self._columns: list[str] = []
        self._waiting: list[Mapping[str, Any]] = []
        self._is_failing = False
        if rank_zero_only.rank == 0 and (earlier or path.exists()):
            self._replace(earlier)

    @property
    def name(self) -> str:
        return self._path.parent.parent.name

    @property
    def version(self) -> str:
        return self._path.parent.name

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Note a row; `save` writes it."""
        self._waiting.append({STEP: 0 if step is None else step, **{tag: float(x) for tag, x in metrics.items()}})

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that were noted, if they can be written."""
        if not self._waiting:
            return
        try:
            if {tag for row in self._waiting for tag in row} <= {*self._columns}:
                self._append(self._waiting)
            else:
                self._replace([*runs.rows_until(self._path, math.inf, rank_zero_warn), *self._waiting])
        except OSError as error:
            if not self._is_failing:
                rank_zero_warn(f"{self._path} cannot be written ({error.strerror}); its rows are kept until it can be")
            self._is_failing = True
            return
        self._waiting, self._is_failing = [], False

    def finalize(self, status: str) -> None:
        self.save()

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """They are no metrics."""

    def _append(self, rows: Iterable[Mapping[str, Any]]) -> None:
        before = self._path.stat().st_size
        try:
            with self._path.open("a", newline="") as file:
                file.write(_lines(rows, self._columns))
        except OSError:
            with suppress(OSError):
                os.truncate(self._path, before)  # no half row, and none that comes again
            raise

    def _replace(self, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = [STEP, *sorted({tag for row in rows for tag in row} - {STEP})]
        with durable.replacing(self._path) as staged:
            staged.write_text(_lines([dict(zip(columns, columns, strict=True)), *rows], columns), newline="")
        self._columns = columns


def _lines(rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> str:
    text = io.StringIO()
    csv.DictWriter(text, columns, lineterminator="\n").writerows(rows)
    return text.getvalue()
