"""How much memory this machine has for a process, and how much of it is free; as far as the system says."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def total(processes: int = 1) -> float:
    """Bytes that one of so many processes may have at most; infinite where unknown."""
    return min(min(_physical(), _number(_CGROUP / "memory.max")) / processes, _limit())


def free() -> float:
    """Bytes that could be had now without swapping; infinite where unknown."""
    try:
        lines = _MEMINFO.read_text().splitlines()
        there = float(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) * 1024
    except (OSError, StopIteration):
        there = _physical()
    group = _number(_CGROUP / "memory.max")
    if math.isfinite(group):
        used = _number(_CGROUP / "memory.current")
        group -= used if math.isfinite(used) else 0
    return min(there, group, _limit())


def _physical() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):  # no such call, or no such number, as on Windows
        return math.inf


def _limit() -> float:
    """What the process was limited to."""
    try:
        import resource
    except ImportError:  # on Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit < 0 else float(limit)


def _number(path: Path) -> float:
    """Of a file of the container's limits; infinite where it has none."""
    try:
        return float(path.read_text())
    except (OSError, ValueError):
        return math.inf
