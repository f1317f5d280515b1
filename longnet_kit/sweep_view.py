"""How far a sweep is, for the eye: a live view where there is a terminal, lines where output goes to a file."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from types import TracebackType

from rich.console import Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text

from longnet_kit import terminal


def view(total: int) -> Lines:
    """A live view if standard output is a terminal, else lines."""
    return Bar(total) if sys.stdout.isatty() else Lines(total)


class Lines:
    """A line per event, and now and then the latest line of the current run.

    Args:
        total: how many runs the sweep has.
        seconds: the least time between two lines about a run that goes on.
    """

    def __init__(self, total: int, seconds: float = 10.0) -> None:
        self.total = total
        self._seconds = seconds
        self._last_time, self._last_line = time.monotonic(), ""

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        pass

    def say(self, text: str) -> None:
        """Tell of an event."""
        terminal.say(text)

    def begin(self, number: int) -> None:
        """The run of that number is the current one."""
        self._number = number
        self._last_time, self._last_line = time.monotonic(), ""

    def update(self, label: str, line: str, left: float | None) -> None:
        """Show the latest line of the current run, and the seconds that the sweep will need as far as is known."""
        now = time.monotonic()
        is_new = line.startswith("step ") and line != self._last_line
        if is_new and now - self._last_time >= self._seconds:
            self._last_time, self._last_line = now, line
            self.say(f"[{self._number}/{self.total}] {'; '.join(filter(None, (line, _words(left))))}")


class Bar(Lines):
    """A bar over the runs, and under it the current one with its latest line."""

    def __init__(self, total: int) -> None:
        super().__init__(total)
        columns = (
            BarColumn(),
            TextColumn("{task.completed:.0f}/{task.total:.0f} runs", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
        )
        self._progress = Progress(*columns)
        self._task = self._progress.add_task("runs", total=total, left="")
        self._live = Live(self._progress, refresh_per_second=4)

    def __enter__(self) -> Lines:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is None:
            self._progress.update(self._task, completed=self.total, left="")
        self._live.update(self._progress)
        self._live.stop()

    def say(self, text: str) -> None:
        self._live.console.print(terminal.printable(text), highlight=False, markup=False)

    def begin(self, number: int) -> None:
        super().begin(number)
        self._progress.update(self._task, completed=number - 1)
        self._live.update(self._progress)

    def update(self, label: str, line: str, left: float | None) -> None:
        self._progress.update(self._task, left=_words(left))
        if line.startswith((" ", "next ")):  # what a run says of itself after its end
            line = ""
        current = Text(terminal.printable(f"{label}  {line}", keep=""), no_wrap=True, overflow="ellipsis")
        self._live.update(Group(self._progress, current))


def _words(left: float | None) -> str:
    return "" if left is None else f"the sweep has {timedelta(seconds=round(left))} left"
