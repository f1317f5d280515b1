"""The folder of a stream: its state, its curve and its results, kept so that a kill at any time leaves them whole.

`state.pt` is what the stream goes on from; `curve.csv` and TensorBoard's events have a point per interval, over tokens
read; `summary.json` the results; `stream.json` says what is read with which weights.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from longnet_kit import callbacks, checkpoint_io, run_lock, runs, terminal
from longnet_kit.errors import UserError

STATE, CURVE, IDENTITY = "state.pt", "curve.csv", "stream.json"
_DECADES = ".decades"
"""Ending of the event file with the results by decade, which the next ones replace."""
_ANEW = "delete it to read from the beginning"


class StreamFiles:
    """A stream's folder, held by this process; `claim` makes it.

    Attributes:
        directory: the folder.
        state: what was saved last; None where nothing was.
    """

    def __init__(self, directory: Path, state: dict[str, Any] | None) -> None:
        self.directory = directory
        self.state = state
        position = 0 if state is None else int(state["position"])
        earlier = runs.rows_until(directory / CURVE, position, lambda note: terminal.say(f"note: {note}"))
        self._table = callbacks.MetricsTable(directory / CURVE, earlier)
        has_events = any(directory.glob("events.out.*"))
        points = [point._replace(tag=f"stream/{point.tag}") for point in callbacks.points(earlier)]
        self._board = callbacks.Board(directory.absolute(), position + 1 if has_events else None, points)

    @classmethod
    @contextmanager
    def claim(cls, directory: Path, identity: Mapping[str, Any]) -> Iterator[StreamFiles]:
        """Make or open the folder and hold it. What cannot be written later is told of, and reading goes on.

        Args:
            identity: plain values that say what is read with which weights.

        Raises:
            UserError: it cannot be written, another process is there, or it is of another stream.
        """
        with ExitStack() as held:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                if note := held.enter_context(run_lock.hold(directory)):
                    terminal.say(f"note: {note}")
                _check_identity(directory, identity)
                files = cls(directory, _read_state(directory / STATE))
            except OSError as error:
                reason = error.strerror or error
                raise UserError(
                    f"{directory}: cannot be written ({reason}); name another folder with --output"
                ) from error
            held.callback(files._close)
            yield files

    def begin(self) -> None:
        """Reading begins: results that are there are old."""
        with self._telling(runs.SUMMARY):
            (self.directory / runs.SUMMARY).unlink(missing_ok=True)

    def save(self, state: dict[str, Any]) -> float:
        """Put a state in the place of the last one, if it can be written.

        Returns:
            Seconds that it took.
        """
        began = time.monotonic()
        with self._telling(STATE):
            checkpoint_io.write(state, self.directory / STATE)
        return time.monotonic() - began

    def point(self, position: int, scalars: Mapping[str, float]) -> None:
        """Add a point to the curve."""
        for logger, prefix in ((self._table, ""), (self._board, "stream/")):
            logger.log_metrics({f"{prefix}{tag}": value for tag, value in scalars.items()}, position)
            logger.save()

    def finish(self, summary: Mapping[str, Any], decades: Mapping[int, float], text: str) -> None:
        """Write the results, also those of each decade, by its first position."""
        self._board.save()
        with self._telling("TensorBoard's events"):
            for earlier in self.directory.glob(f"*{_DECADES}"):  # of a stream that was shorter then
                earlier.unlink()
            if self._board.is_writable():
                self._board.experiment.add_text("stream", text)
                with SummaryWriter(str(self.directory), filename_suffix=_DECADES) as writer:
                    for position, bits_per_byte in decades.items():
                        writer.add_scalar("stream/bits_per_byte_from_position", bits_per_byte, position)
        with self._telling(runs.SUMMARY):
            runs.write_values(self.directory / runs.SUMMARY, summary)

    def _close(self) -> None:
        self._table.save()
        self._board.finalize("success")

    @contextmanager
    def _telling(self, what: str) -> Iterator[None]:
        """Say that something cannot be written, and go on."""
        try:
            yield
        except (OSError, RuntimeError) as error:  # torch.save raises the latter
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            terminal.say(f"note: {self.directory}: {what} cannot be written ({reason}); reading goes on")


def _check_identity(directory: Path, identity: Mapping[str, Any]) -> None:
    path = directory / IDENTITY
    if os.path.lexists(path):
        there = runs.read_object(path, [])
        differing = [key for key in identity if there.get(key) != identity[key]]
        if differing:
            raise UserError(
                f"{directory} holds a stream of other {' and '.join(differing)}; name another folder with --output, or "
                "delete this one"
            )
        return
    runs.write_values(path, identity)


def _read_state(path: Path) -> dict[str, Any] | None:
    if not os.path.lexists(path):
        return None
    if wrong := checkpoint_io.damage(path):
        raise UserError(f"{path} is damaged ({wrong}); {_ANEW}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        assert state["position"] >= 0
        return state
    except Exception as error:  # a broken file can fail in any way that unpickling can
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} is damaged ({reason}); {_ANEW}") from error
