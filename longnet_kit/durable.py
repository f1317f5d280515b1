"""What it takes that a file is on the disk, whole, and not only in the system's memory. Nothing here imports torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Give a place beside a file; what was written there has its name in the end, or, after an error, is removed.

    Whoever looks at the target, also after a kill or a power cut, finds what was there before or the whole new file.
    """
    beside = staged(target)
    try:
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
