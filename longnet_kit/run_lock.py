"""The lock on a run directory: who trains there holds it, so that two runs never write in one place.

It is flock on a hidden file, which the kernel lets go of when the process ends, kill -9 included. flock, not lockf:
that one is lost with any descriptor of the file, and a second claim in the same process would get it. Windows has no
flock; there nothing is held.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from longnet_kit import durable
from longnet_kit.errors import UserError

if sys.platform != "win32":
    import fcntl

LOCK = ".lock"
_NONBLOCK = getattr(os, "O_NONBLOCK", 0)  # a pipe of that name must not make anybody wait
_PATIENCE = 0.5
"""Seconds for which a lock must be refused: another process may only be asking whether it is held."""


@contextmanager
def hold(directory: Path) -> Iterator[str]:
    """Hold a run directory as long as the context lasts.

    Yields:
        A note for the user where the filesystem refuses locks; empty where it does not.

    Raises:
        UserError: another run holds it.
    """
    path, descriptor, note = directory / LOCK, None, ""
    try:
        descriptor = _locked(path)
    except BlockingIOError:
        raise UserError(_refusal(directory, _words(path))) from None
    except OSError as error:
        reason = error.strerror or str(error)
        note = f"{directory} cannot be locked ({reason}); see to it yourself that no other run goes on there"
    try:
        yield note
    finally:
        if descriptor is not None:
            _let_go(descriptor, path)


def holder(directory: Path) -> str:
    """Who holds a run directory now, in words; empty where nobody does."""
    path = directory / LOCK
    try:
        descriptor = os.open(path, os.O_RDONLY | _NONBLOCK)
    except FileNotFoundError:
        return ""
    except OSError:  # another user's, who may be there
        return "another user"
    try:
        return "" if try_lock(descriptor) else _words(path)
    except OSError:  # no locks here
        return ""
    finally:
        os.close(descriptor)


def is_held(directory: Path) -> bool | None:
    """Whether somebody holds a run directory; None where that cannot be told from this machine."""
    if holder(directory):
        return True
    left_behind = _words(directory / LOCK).endswith(f" on {socket.gethostname()}")
    return False if left_behind else None


def check_free(directory: Path) -> None:
    """Refuse a run directory that somebody holds.

    Raises:
        UserError: a run goes on there.
    """
    if words := holder(directory):
        raise UserError(_refusal(directory, words))


def try_lock(descriptor: int) -> bool:
    """Lock an open file, and say whether that went; it stays locked until its last copy is closed.

    Raises:
        OSError: the filesystem has no locks.
    """
    if sys.platform == "win32":
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


_open: set[int] = set()
"""The descriptors of the locks that this process holds."""


def _locked(path: Path) -> int:
    """A descriptor of the file, locked; BlockingIOError when another has it."""
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | _NONBLOCK, 0o666)
        except PermissionError:  # another user's: it can be locked all the same
            descriptor = os.open(path, os.O_RDONLY | _NONBLOCK)
        try:
            is_ours = try_lock(descriptor) and is_at(descriptor, path)  # not a file that its holder has removed since
        except OSError:
            os.close(descriptor)
            raise
        if is_ours:
            _open.add(descriptor)
            with suppress(OSError):
                os.ftruncate(descriptor, 0)
                os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
            return descriptor
        os.close(descriptor)
        if time.monotonic() > deadline:
            raise BlockingIOError(errno.EWOULDBLOCK, "held by another process")
        time.sleep(0.05)


def _let_go(descriptor: int, path: Path) -> None:
    """Unlock the file, and remove it where it is still ours, so that nobody else holds it."""
    if is_at(descriptor, path):
        with suppress(OSError):
            path.unlink()
    _open.discard(descriptor)
    os.close(descriptor)


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is still the one of that path."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _words(path: Path) -> str:
    with suppress(OSError, UnicodeDecodeError):
        return durable.read(path, 4096).decode().strip() or "another process"
    return "another process"


def _refusal(directory: Path, words: str) -> str:
    return (
        f"{directory}: a run goes on there ({words}); wait until it has ended, or give this one another name, name=..."
    )


def _close_in_child() -> None:
    """A forked data loader must not keep the lock when the process that trains is gone."""
    for descriptor in _open:
        with suppress(OSError):
            os.close(descriptor)
    _open.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
