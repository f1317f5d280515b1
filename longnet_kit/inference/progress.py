"""How far reading is: a bar where there is a terminal, lines where output goes to a file."""

from __future__ import annotations

import math
import sys
import time
from types import TracebackType
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from longnet_kit import terminal
from longnet_kit.report import table


class Reading:
    """Tells of tokens that are read.

    Args:
        total: how many there will be; None where that is not known.
        done: how many were read before.
        file: where to tell of them.
        seconds: the least time between two lines.
    """

    def __init__(self, total: int | None, done: int = 0, file: TextIO | None = None, seconds: float = 10.0) -> None:
        self._total = total
        self._first = done
        self._file = sys.stdout if file is None else file
        self._seconds = seconds
        self._began = self._told = time.monotonic()
        self._bar: Progress | None = None
        if self._file.isatty():
            columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[words]}", markup=False)
            self._bar = Progress(
                *columns, console=Console(file=self._file), refresh_per_second=4, transient=True,
                redirect_stdout=False, redirect_stderr=False,
            )  # fmt: skip
            self._task = self._bar.add_task("read", total=total, completed=done, words="")

    def __enter__(self) -> Reading:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()

    def close(self) -> None:
        """Take the bar away for good: it is read, or the place is needed for something else."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
            self._seconds = math.inf

    def update(self, done: int, words: str = "") -> None:
        """So many were read; `words` says more."""
        now = time.monotonic()
        if self._bar is None and now - self._told < self._seconds:
            return
        of = "" if self._total is None else f" of {self._total:,}"
        told = "  ".join(filter(None, (f"{done:,}{of} tokens", words, self._left(done, now))))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, words=told)
        else:
            self._told = now
            print(terminal.printable(told), file=self._file, flush=True)

    def _left(self, done: int, now: float) -> str:
        if self._total is None or done <= self._first:
            return ""
        seconds = (now - self._began) / (done - self._first) * (self._total - done)
        return f"{table.duration(seconds)} left"
