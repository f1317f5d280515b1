"""Signals that ask a run to end.

SIGTERM, SIGINT (Ctrl-C), SIGHUP (the terminal is gone), and SIGUSR1, which schedulers send ahead of a time limit.

They are noted, and the run ends by itself where it can save. A thread notes them, through the descriptor that the
interpreter's C handler writes to: Python's own handlers wait until the main thread comes back from what may be a step
of minutes, or a transfer that never ends, and a second SIGINT must end the process at once.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

NAMES = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")
"""Which signals are noted, as far as the system has them."""

PATIENCE = 60.0
"""Seconds that SLURM has to answer."""

AT_ONCE = 130
"""The exit code of a process that a second SIGINT ends."""


class Interrupted(Exception):
    """A run that ends because a signal asked it to, on all ranks at the same step.

    Args:
        signum: the signal's number.
        step: optimizer steps that the run has done.
    """

    def __init__(self, signum: int, step: int) -> None:
        super().__init__(signum, step)
        self.signum = signum
        self.step = step
        self.checkpoint: Path | None = None
        """Where it goes on; None where nothing is saved."""

    def __str__(self) -> str:
        told = f"{signal.Signals(self.signum).name} ended the run after step {self.step}"
        if self.checkpoint is None:
            return f"{told}; nothing of it is saved"
        return f"{told}; resume=auto goes on from {self.checkpoint}"


class Listener:
    """Which signal has come since `listening` began.

    Attributes:
        received: the number of the last one; 0 for none.
    """

    def __init__(self) -> None:
        self.received = 0
        self._interrupts = 0

    @contextmanager
    def listening(self) -> Iterator[Listener]:
        """Note signals as long as the context lasts, then put the handlers back that were there.

        Outside of the main thread, which alone can have handlers, nothing is noted.
        """
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        ours, theirs = socket.socketpair()
        for end in (ours, theirs):
            end.setblocking(False)
        before = {number: signal.getsignal(number) for number in _numbers()}
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as under nohup: to be ignored
                signal.signal(number, _nothing)
        ours.setblocking(True)
        threading.Thread(target=self._read, args=(ours,), daemon=True, name="signals").start()
        try:
            yield self
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            theirs.close()  # ends the thread

    def _read(self, ours: socket.socket) -> None:
        with ours:
            while numbers := _received(ours):
                for number in numbers:
                    if number in _numbers() and signal.getsignal(number) is _nothing:
                        self._note(number)

    def _note(self, number: int) -> None:
        self.received = number
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                _say("\ninterrupted twice: ends at once")
                for loader in multiprocessing.active_children():
                    loader.kill()
                os._exit(AT_ONCE)
            _say("\ninterrupted: the run saves after this step and ends; once more ends it at once")


def ignore(*_: Any) -> None:
    """Let this process ignore the signals: a data loader's must outlive the step in which its parent is to save."""
    for number in _numbers():
        signal.signal(number, signal.SIG_IGN)


def requeue(say: Callable[[str], Any], goes_on: bool) -> None:
    """Ask SLURM to put this job into its queue again; nothing happens outside of SLURM.

    Args:
        say: takes what there is to tell.
        goes_on: whether the same command goes on with the run; if not, it is not to be given again.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        job = f"{array}_{os.environ.get('SLURM_ARRAY_TASK_ID')}"
    if not job or shutil.which("scontrol") is None:
        return
    if not goes_on:
        say(f"SLURM job {job} is not requeued: without resume=auto it would start from scratch")
        return
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=PATIENCE)
        reason = f": {done.stderr.strip()}" if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        reason = f": {error}"
    say(f"SLURM job {job} {'could not be requeued' if reason else 'is requeued'}{reason}")


def _numbers() -> list[int]:
    return [int(getattr(signal, name)) for name in NAMES if hasattr(signal, name)]


def _nothing(number: int, frame: Any) -> None:
    """What Python's handler does: the thread has noted the signal already."""


def _received(ours: socket.socket) -> bytes:
    try:
        return ours.recv(64)
    except OSError:
        return b""


def _say(text: str) -> None:
    with suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _forget_in_child() -> None:
    """A forked data loader must not tell its parent of signals of its own."""
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(-1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
