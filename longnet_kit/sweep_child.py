"""One run of a sweep as a process of its own: its log, its signals, its end.

The log says who is at work: the process that writes it has it locked, from before its first line until the last of its
descendants is gone. That holds for what a killed sweep leaves behind too.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from longnet_kit import durable, run_lock
from longnet_kit.errors import UserError

GRACE = 60.0
"""Seconds that a run gets to end after a signal, before it is killed."""
LEFTOVER_GRACE = 2.0
"""Seconds that processes of a run get to end after the first of them has."""
PAUSE = 0.1
_ENOUGH = 1 << 16
"""Bytes in which the last lines of a log are."""

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1")
"""What ends a sweep, after the run that is under way."""


class Ended(KeyboardInterrupt):
    """A sweep that a signal ends.

    Args:
        signum: the signal's number.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


class Signals:
    """Keeps `SIGNALS` for `pause` while the context lasts: no child is started and then forgotten."""

    def __init__(self) -> None:
        self.received: list[int] = []

    def __enter__(self) -> Signals:
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        is_main = threading.current_thread() is threading.main_thread()  # others cannot have handlers
        heeded = [n for n in numbers if is_main and signal.getsignal(n) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._keep) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def pause(self) -> None:
        """Sleep a moment; raise `Ended` when a signal was received."""
        if not self.received:
            time.sleep(PAUSE)
        if self.received:
            raise Ended(self.received[0])

    def _keep(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)


class Child:
    """A command that runs with its output in a log, in a process group of its own.

    The terminal's Ctrl-C does not reach it, so that it gets each signal once, from `end`.
    """

    def __init__(self, command: Sequence[str], log: BinaryIO) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, process_group=0
        )

    def exit_code(self) -> int | None:
        """Its exit code; None as long as it runs."""
        return self._process.poll()

    def end(self, signals: Signals, grace: float = GRACE) -> None:
        """End all its processes: pass a signal on, wait, and kill what is left; kill at once on a second SIGINT.

        A second SIGHUP is none: the system and the shell each send one when a terminal is closed.
        """
        if self.exit_code() is None:
            self._send(signals.received[-1] if signals.received else signal.SIGTERM)
        else:
            grace = min(grace, LEFTOVER_GRACE)
        seen, deadline = len(signals.received), time.monotonic() + grace
        while self._is_there() and time.monotonic() < deadline and signal.SIGINT not in signals.received[seen:]:
            time.sleep(PAUSE / 2)
        self._send(getattr(signal, "SIGKILL", signal.SIGTERM))
        self._process.wait()

    def _is_there(self) -> bool:
        """Whether any of its processes is."""
        if self.exit_code() is None:
            return True
        return self._send(0)

    def _send(self, number: int) -> bool:
        """Send a signal to all its processes; whether there are any."""
        if sys.platform == "win32":
            if self.exit_code() is None:
                self._process.terminate()
            return False
        try:
            os.killpg(self._process.pid, number)
        except (ProcessLookupError, PermissionError):
            return False
        return True


def open_log(path: Path) -> BinaryIO | None:
    """A log to add to, locked as long as any process has it open; None while another has it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if os.path.exists(path):
            durable.check_regular(path)
        log = path.open("ab")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror}); rename what is in its way, or start from a working "
            "directory where runs/ can be written"
        ) from error
    try:
        if run_lock.try_lock(log.fileno()) and run_lock.is_at(log.fileno(), path):
            return log
    except OSError:  # no locks here: the run directory's says the same
        return log
    log.close()
    return None


class Tail:
    """The lines that are added to a log from now on."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._start = self._read_to = path.stat().st_size if path.exists() else 0
        self._rest = b""
        self.latest = ""
        """The last line that is not empty."""

    def read(self) -> None:
        """Take in what is new."""
        new = self._bytes(self._read_to)
        self._read_to += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        self.latest = next(reversed(_words(lines)), self.latest)

    def last_lines(self, count: int) -> list[str]:
        """The last lines since the start that are not empty."""
        return _words(self._bytes(self._start)[-_ENOUGH:].split(b"\n"))[-count:]

    def _bytes(self, start: int) -> bytes:
        """What follows in the log; nothing where somebody has removed it."""
        try:
            with durable.opened(self._path) as file:
                file.seek(start)
                return file.read()
        except FileNotFoundError:
            return b""


def _words(lines: Sequence[bytes]) -> list[str]:
    decoded = (line.decode(errors="replace").rpartition("\r")[2].rstrip() for line in lines)
    return [line for line in decoded if line.strip()]
