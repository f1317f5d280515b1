"""Where text comes from: the interface of a source, how documents are split, and the interpreter's own library.

A plug-in source writes `documents` and `fingerprint`, and is registered under a name. Its constructor's keyword
arguments are its recipe keys. Tokenizing and storing are the cache's business.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from longnet_kit.data.errors import DataError
from longnet_kit.registry import Registry

if TYPE_CHECKING:
    from longnet_kit.data.language_modeling import LanguageModelingData

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
HELD_OUT = 0.05
"""The share of documents that goes to `val`, and as much again to `test`."""


class Document(NamedTuple):
    """A text, or a part of one where it is large."""

    name: str
    """What error messages call it; also decides the split where `split` is None."""
    content: str | bytes
    """The text; bytes only when the source was asked for them."""
    split: Split | None = None
    """Where it belongs; None: where the hash of its name says."""
    ends: bool = True
    """Whether the end-of-text token follows. A large document comes in parts, of which only the last one ends."""


class Source:
    """Text, document by document."""

    label: str = ""
    """A readable part of the cache folder's name; the class's name where empty."""
    supplies: Literal["text", "answers", "labels"] = "text"
    """What its batches are to be trained on: every next token, those of answers alone, or a class for each sequence.
    A task names those that it takes."""

    @classmethod
    def data_module(cls) -> type[LanguageModelingData]:
        """The data module that makes batches of it."""
        from longnet_kit.data.language_modeling import LanguageModelingData

        return LanguageModelingData

    def documents(self, as_bytes: bool) -> Iterator[Document]:
        """Every document, in the same order whenever the fingerprint is the same.

        Args:
            as_bytes: the tokenizer takes bytes as they are: whoever has the text as bytes need not decode it.

        Raises:
            DataError: a document cannot be used.
        """
        raise NotImplementedError(f"{type(self).__name__} must write documents(as_bytes)")

    def fingerprint(self) -> Any:
        """Plain values (as in JSON) that change when the documents would: names, sizes, times, options."""
        raise NotImplementedError(f"{type(self).__name__} must write fingerprint()")


registry: Registry[Source] = Registry("data source", "source", group="longnet_kit.data")


def split_of(name: str, own: frozenset[Split] = frozenset()) -> Split:
    """The split of a document by its name alone: the same on every machine, whatever other documents there are.

    Args:
        own: splits that have documents of their own; they get none of the others.
    """
    position = int.from_bytes(hashlib.blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()) / 2**64
    split: Split = "test" if position < HELD_OUT else "val" if position < 2 * HELD_OUT else "train"
    return "train" if split in own else split


_PACKAGES = {"site-packages", "dist-packages", "__pycache__"}
_TESTS = {"test", "tests", "idle_test"}
_SHIPPED_APART = {"distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "tkinter", "turtledemo"}


@registry.register("python_stdlib")
class PythonStdlib(Source):
    """The running interpreter's own library: some 9 MB of real Python source, found on every machine.

    Left out: installed packages, tests, and what distributions ship in packages of their own or generate, so that the
    corpus is alike wherever Python is of the same version. A file that is not UTF-8 is left out too, unless the
    tokenizer takes bytes. Files are split by a hash of their path.

    Raises:
        DataError: the interpreter comes without the sources of its library.
    """

    label = "python_stdlib"

    def __init__(self) -> None:
        self._root = Path(sysconfig.get_path("stdlib"))
        self._files = list(self._find())
        if not self._files:
            raise DataError(
                f"data.source python_stdlib: {sys.executable} has no library sources in {self._root}; "
                "use an ordinary Python installation, or source: files with paths of your own"
            )

    def documents(self, as_bytes: bool) -> Iterator[Document]:
        for path in self._files:
            try:
                raw = path.read_bytes()
                yield Document(self._name(path), raw if as_bytes else raw.decode())
            except (OSError, UnicodeDecodeError):
                continue

    def fingerprint(self) -> Any:
        return [sys.version, [[self._name(path), *stamp(path)] for path in self._files]]

    def _find(self) -> Iterator[Path]:
        for folder, folders, files in os.walk(self._root):
            folders[:] = sorted(set(folders) - _PACKAGES - _TESTS - _SHIPPED_APART)
            for file in sorted(files):
                if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                    yield Path(folder, file)

    def _name(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: both zero for a file that cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
