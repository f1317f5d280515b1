"""How a checkpoint gets onto the disk: whole, or not under its name at all; with a checksum beside it, by which damage
is found before anything is loaded. Which checkpoints there are and which stay is the business of callbacks.Saving.
"""

from __future__ import annotations

import hashlib
import os
import stat
import zipfile
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from longnet_kit import durable
from longnet_kit.errors import UserError

CHECKSUM = ".sha256"
"""What the name of a checkpoint's checksum ends in; `sha256sum --check` reads the file."""

DAMAGED = ".damaged"
"""What the name of a checkpoint ends in once it was found damaged."""


class StagedCheckpointIO(TorchCheckpointIO):
    """Writes beside the target under a hidden name, waits for the disk, and renames; the checksum first.

    Lightning's own writing stages in the temporary directory; from another filesystem, its last act is a copy that a
    kill can cut off.

    Attributes:
        problem: why the latest write failed, in words; empty where it did not. It is not raised, since the other ranks
            of a job would wait for the one that writes.
    """

    problem: str = ""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        self.problem = ""
        try:
            target.parent.mkdir(exist_ok=True)  # but no run directory: one that was removed stays so
            write(checkpoint, target)
        except OSError as error:
            self.problem = error.strerror or str(error)


def checksum_file(checkpoint: Path) -> Path:
    """Where the checksum of a checkpoint is."""
    return checkpoint.with_name(checkpoint.name + CHECKSUM)


def checksum(checkpoint: Path) -> str:
    """Return the SHA-256 of a checkpoint: the stored one, or that of the file if none is stored.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    try:
        file = checkpoint.resolve(strict=True)
        return _stored_checksum(file) if checksum_file(file).exists() else _checksum_of(file)
    except OSError as error:
        raise UserError(f"{checkpoint} cannot be read ({error.strerror or error})") from error


def remove(checkpoint: Path) -> None:
    """Remove a checkpoint and its checksum."""
    checkpoint.unlink(missing_ok=True)
    checksum_file(checkpoint).unlink(missing_ok=True)


def set_aside(checkpoint: Path) -> Path:
    """Rename a damaged checkpoint and its checksum, so that nothing takes it for one; returns where it is now."""
    aside = checkpoint.with_name(checkpoint.name + DAMAGED)
    if checksum_file(checkpoint).exists():
        os.replace(checksum_file(checkpoint), checksum_file(aside))
    os.replace(checkpoint, aside)
    return aside


def point(link: Path, target: Path) -> bool:
    """Make a symbolic link to a file beside it, in place of an earlier one; says whether that went."""
    made = link.with_name(f".{link.name}.link")
    try:
        made.unlink(missing_ok=True)
        made.symlink_to(target.name)
        os.replace(made, link)
    except (OSError, NotImplementedError):
        return False
    return True


def remove_staged(folder: Path) -> None:
    """Remove what a write that was cut off has left in a folder."""
    for left_over in (*folder.glob(".*.ckpt"), *folder.glob(f".*{CHECKSUM}"), *folder.glob(".*.link")):
        left_over.unlink()
    for checksum in folder.glob(f"*{CHECKSUM}"):
        if not checksum.with_name(checksum.name.removesuffix(CHECKSUM)).exists():
            checksum.unlink()


def damage(checkpoint: Path) -> str:
    """What is wrong with the bytes of a checkpoint, in words; empty where nothing is.

    They are held against the checksum beside the file, or, where there is none, against those inside it.

    Raises:
        UserError: it cannot be read now, which says nothing about it.
    """
    try:
        file = checkpoint.resolve(strict=True)
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):
            return "it is no regular file"
        return _damage(file, status.st_size, status.st_mtime_ns)
    except FileNotFoundError:
        return "there is no such file"
    except OSError as error:
        raise UserError(
            f"{checkpoint} cannot be read ({error.strerror or error}); mend the disk or the permissions, then try again"
        ) from error


@lru_cache(maxsize=64)
def _damage(file: Path, size: int, changed: int) -> str:
    """See `damage`; size and time only say when to look again."""
    if checksum_file(file).exists():
        is_sound = _checksum_of(file) == _stored_checksum(file)
        return "" if is_sound else f"it is not the file that {checksum_file(file).name} was written for"
    try:
        with zipfile.ZipFile(file) as archive:
            if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
                return "it is a compressed archive, which no checkpoint is"
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError) as error:
        return f"it is cut off or no checkpoint at all: {error}"
    return f"the checksum of its part {damaged} is wrong" if damaged else ""


def _stored_checksum(file: Path) -> str:
    return durable.read(checksum_file(file), 4096).decode("ascii", "replace").split(" ")[0].strip()


def _checksum_of(file: Path) -> str:
    with durable.opened(file) as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write(content: dict[str, Any], target: Path) -> None:
    """Write what `torch.save` takes, with a checksum file; a kill at any time leaves the old file or the new one.

    Raises:
        OSError: it cannot be written. As after any error, nothing of it is left.
    """
    try:
        _write(content, target)
    except BaseException:
        for left_over in (durable.staged(target), durable.staged(checksum_file(target))):
            with suppress(OSError):
                left_over.unlink(missing_ok=True)
        raise


def _write(checkpoint: dict[str, Any], target: Path) -> None:
    checksum = checksum_file(target)
    for left_over in (durable.staged(target), durable.staged(checksum)):
        left_over.unlink(missing_ok=True)  # opening a pipe would wait
    with durable.staged(target).open("wb") as file:
        hashing = _Hashing(file)
        try:
            torch.save(checkpoint, hashing)  # type: ignore[arg-type]  (what it needs of a file is write and flush)
        except RuntimeError as error:
            raise hashing.failure or error from error
        file.flush()
        os.fsync(file.fileno())
    with durable.staged(checksum).open("w", encoding="ascii", newline="\n") as file:
        file.write(f"{hashing.digest()}  {target.name}\n")
        file.flush()
        os.fsync(file.fileno())
    new = [target, checksum] if target.exists() else [checksum, target]
    if new[0] == target:
        checksum.unlink(missing_ok=True)  # never a checksum next to a file that it was not written for
    for file in new:
        os.replace(durable.staged(file), file)
    durable.sync_folder(target.parent)


class _Hashing:
    """A file that takes the checksum of what passes, and keeps the error of a write that fails: torch hides it."""

    def __init__(self, file: BinaryIO) -> None:
        self.failure: OSError | None = None
        self._file = file
        self._hash = hashlib.sha256()

    def write(self, content: bytes) -> int:
        try:
            self._file.write(content)
        except OSError as error:
            self.failure = self.failure or error
            raise
        self._hash.update(content)
        return len(content)

    def flush(self) -> None:
        self._file.flush()

    def digest(self) -> str:
        return self._hash.hexdigest()
