"""Atomic, durable file writes, and reading that takes regular files of a plausible size only. No torch here."""

from __future__ import annotations

import errno
import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

SMALL = 64 << 20
"""The most bytes that a file of settings or results may have."""
_KINDS = {
    stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFCHR: "a device", stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}  # fmt: skip


def opened(path: str | Path, at_most: int | None = None) -> io.BufferedReader:
    """Open a regular file for reading bytes; a pipe does not block, and a device is not touched.

    Args:
        at_most: the most bytes that it may have; None: any number.

    Raises:
        OSError: it cannot be opened, is no regular file, or is larger; `strerror` says which.
    """
    _check(os.stat(path), path, at_most)
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0))
    try:
        _check(os.fstat(descriptor), path, at_most)  # of the file that was opened
        return os.fdopen(descriptor, "rb")
    except OSError:
        os.close(descriptor)
        raise


def read(path: str | Path, at_most: int = SMALL) -> bytes:
    """Read a regular file as a whole; see `opened` for what is raised."""
    with opened(path, at_most) as file:
        content = file.read(at_most + 1)
        if len(content) > at_most:  # it grows, or has no size of its own, as in /proc
            raise OSError(errno.EFBIG, f"it has more than {at_most:,} bytes", str(path))
        return content


def check_regular(path: str | Path) -> None:
    """Raise an OSError unless the path is a regular file that can be read, for libraries that open it by name."""
    opened(path).close()


def _check(status: os.stat_result, path: str | Path, at_most: int | None) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind != stat.S_IFREG:
        number = errno.EISDIR if kind == stat.S_IFDIR else errno.EINVAL
        raise OSError(number, f"it is {_KINDS.get(kind, 'something else')}, not a regular file", str(path))
    if at_most is not None and status.st_size > at_most:
        raise OSError(errno.EFBIG, f"it has {status.st_size:,} bytes, more than {at_most:,}", str(path))


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a place beside a file; what was written there has its name in the end, or, after an error, is removed.

    Whoever looks at the target, also after a kill or a power cut, finds what was there before or the whole new file.
    """
    beside = staged(target)
    try:
        beside.unlink(missing_ok=True)  # whatever is there: opening a pipe would wait
        yield beside
        with beside.open("r+b") as file:
            os.fsync(file.fileno())
        os.replace(beside, target)
    except BaseException:
        with suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    sync_folder(target.parent)


def staged(target: Path) -> Path:
    """Where a file is until it is whole."""
    return target.with_name(f".{target.name}")


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut, where the system can."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
