"""What the kit writes to the console, which may go away while a run goes on.

Text from recipes, file names, prompts and networks is escaped where it is printed: on a terminal it could act.
"""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from longnet_kit.errors import UserError

_ACTING = re.compile(r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_GONE = (errno.EPIPE, errno.EIO, errno.ENXIO, errno.EBADF)
"""Errors of a pipe without a reader and of a terminal that was closed."""


@contextmanager
def outliving(*names: str) -> Iterator[None]:
    """Let the work in this context go on when its console goes away.

    A write that fails is dropped. After the reader of a pipe or a terminal is gone, its descriptor leads to the null
    device, so that what other code and other processes write there is dropped too.

    Args:
        names: attributes of `sys`; by default `stdout` and `stderr`.
    """
    names = names or ("stdout", "stderr")
    before = {name: getattr(sys, name) for name in names}
    for name, stream in before.items():
        setattr(sys, name, _Outliving(stream))
    try:
        yield
    finally:
        for name, stream in before.items():
            with suppress(AttributeError):
                getattr(sys, name).flush()
            setattr(sys, name, stream)


def open_closed() -> None:
    """Open standard streams that the process was started without, on the null device.

    The next file that the process opens would get such a descriptor, and with it all that is printed.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            with suppress(OSError):
                os.fstat(number)
                continue  # a file has the descriptor by now
            _lead_nowhere(number)
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


def say(text: str, end: str = "\n", is_data: bool = False) -> None:
    """Print to standard output, escaped.

    Args:
        is_data: print the text as it is where standard output is no terminal.
    """
    try:
        print(text if is_data and not sys.stdout.isatty() else _encodable(text, sys.stdout), end=end, flush=True)
    except OSError as error:
        if error.errno in _GONE:
            raise
        with suppress(OSError, ValueError):
            _lead_nowhere(sys.stdout.fileno())  # the rest would fail again at exit
        raise UserError(f"standard output cannot be written ({error.strerror}); make room there") from error


def tell(text: str, end: str = "\n") -> None:
    """Print to standard error, where standard output may be data, escaped."""
    print(_encodable(text, sys.stderr), end=end, file=sys.stderr, flush=True)


def _encodable(text: str, stream: Any) -> str:
    """Printable text; characters that the stream's encoding does not have are escaped too."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def printable(text: str, keep: str = "\n\t") -> str:
    """Write control characters, directions of writing and halves of characters as `\\u001b`.

    Args:
        keep: control characters that stay.
    """
    return _ACTING.sub(lambda match: match[0] if match[0] in keep else f"\\u{ord(match[0]):04x}", text)


class _Outliving:
    """A text stream whose writes never fail."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._has_failed = False

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except OSError as error:
            if error.errno in _GONE:
                with suppress(OSError, ValueError):
                    _lead_nowhere(self._stream.fileno())
            elif not self._has_failed:
                self._has_failed = True
                if self is not sys.stderr:
                    tell(f"note: standard output cannot be written ({error.strerror}); output is lost")
        except UnicodeEncodeError:  # of code that prints by itself
            text, encoding = arguments[0], getattr(self._stream, "encoding", None) or "ascii"
            self._try(call, text.encode(encoding, "backslashreplace").decode(encoding))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _lead_nowhere(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)
