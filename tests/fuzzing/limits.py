"""The limits under which a reader must end, whatever it is given."""

from __future__ import annotations

import resource
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SECONDS = 5.0
"""Of the processor's time, for one input."""
MEMORY = 1 << 30
"""Bytes that one input may take beside what the process has already."""
slowest: dict[str, tuple[float, str]] = {}
"""Of each target, the input that took longest and the seconds of the processor's time that it took."""


class Hang(BaseException):
    """One input took too long. It is no Exception: what survives all of those does not survive this."""


@contextmanager
def limits(target: str, given: object) -> Iterator[None]:
    """Within, time and memory have an end."""

    def end(*_: Any) -> None:
        raise Hang(f"more than {SECONDS} seconds for {given!r:.2000}")

    before = signal.signal(signal.SIGPROF, end)  # the processor's time: pytest-timeout has the other clock
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_address_space() + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    started = time.process_time()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        took = time.process_time() - started
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, before)
        if took > slowest.get(target, (0.0, ""))[0]:
            slowest[target] = took, f"{given!r:.100}"


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
