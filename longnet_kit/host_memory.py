"""How much memory this machine has for a process, and how much of it is free; as far as the system says."""

from __future__ import annotations

import math
import os
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_STATM = Path("/proc/self/statm")
_STATUS = Path("/proc/self/status")
_GROUPS = Path("/sys/fs/cgroup")
_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
)
"""Of a container's limit, in versions 2 and 1: itself, what is in use, and what of that is cache that gives way."""


def total(processes: int = 1) -> float:
    """Bytes that one of so many processes may have at most; infinite where unknown."""
    return min(min(_physical(), *(_number(names[0]) for names in _FILES)) / processes, _limit())


def free() -> float:
    """Bytes that could be had now without swapping; infinite where unknown."""
    try:
        there = _field(_MEMINFO, "MemAvailable:") * 1024
    except (OSError, LookupError):
        there = _physical()
    limits = [_number(names[0]) - _in_use(*names[1:]) for names in _FILES]
    return max(0.0, min(there, *limits, _limit() - _addressed()))


def anonymous() -> int | None:
    """Bytes that this process holds in memory beside what it has mapped of files; None where unknown."""
    try:
        return int(_field(_STATUS, "RssAnon:")) * 1024
    except (OSError, LookupError):
        return None


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


def _addressed() -> float:
    """What counts against the process's limit by now."""
    try:
        return float(_STATM.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0.0


def _in_use(usage: str, stat: str, cache: str) -> float:
    """What counts against a container's limit and would not give way."""
    used = _number(usage)
    try:
        reclaimable = _field(_GROUPS / stat, cache)
    except (OSError, LookupError):
        reclaimable = 0.0
    return max(0.0, used - reclaimable) if math.isfinite(used) else 0.0


def _number(name: str) -> float:
    """Of a file of the container's limits; infinite where it has none."""
    try:
        return float((_GROUPS / name).read_text())
    except (OSError, ValueError):
        return math.inf


def _field(path: Path, name: str) -> float:
    """The number behind a name, one of each to a line; LookupError where it is not there."""
    for line in path.read_text().splitlines():
        words = line.split()
        if words[:1] == [name]:
            return float(words[1])
    raise LookupError(name)
