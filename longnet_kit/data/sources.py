"""Where text comes from: the interface of a source, how documents are split, and the interpreter's own library.

A plug-in source writes `documents` and `fingerprint`, and is registered under a name. Its constructor's keyword
arguments are its recipe keys. Tokenizing and storing are the cache's business.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from longnet_kit import durable
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


class PythonFiles(Source):
    """Python source on this machine, split by a hash of each file's name.

    A file that is not UTF-8 is left out, unless the tokenizer takes bytes.

    Args:
        files: by their names.
    """

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = files

    def documents(self, as_bytes: bool) -> Iterator[Document]:
        for name, path in self.files.items():
            try:
                raw = durable.read(path)
                yield Document(name, raw if as_bytes else raw.decode())
            except (OSError, UnicodeDecodeError):
                continue

    def fingerprint(self) -> Any:
        return [sys.version, [[name, *stamp(path)] for name, path in self.files.items()]]


@registry.register("python_stdlib")
class PythonStdlib(PythonFiles):
    """The running interpreter's own library: some 9 MB of real Python source, found on every machine.

    Left out: installed packages, tests, and what distributions ship in packages of their own or generate, so that the
    corpus is alike wherever Python is of the same version. A file that is not UTF-8 is left out too, unless the
    tokenizer takes bytes. Files are split by a hash of their path.

    Raises:
        DataError: the interpreter comes without the sources of its library.
    """

    label = "python_stdlib"

    def __init__(self) -> None:
        root = Path(sysconfig.get_path("stdlib"))
        left_out = _PACKAGES | _TESTS | _SHIPPED_APART
        super().__init__({path.relative_to(root).as_posix(): path for path in _python_files(root, left_out)})
        if not self.files:
            raise DataError(
                f"data.source python_stdlib: {sys.executable} has no library sources in {root}; "
                "use an ordinary Python installation, or source: files with paths of your own"
            )


@registry.register("installed_packages")
class InstalledPackages(PythonFiles):
    """The Python source of installed packages, torch by default: 46 MB in version 2.13, wherever this kit runs.

    It is alike wherever the packages are of the same versions. Files are split by a hash of their path.

    Args:
        packages: names as in `import`.

    Raises:
        DataError: a package is not installed, or has no Python source.
    """

    label = "installed_packages"

    def __init__(self, packages: Sequence[str] = ("torch",)) -> None:
        if not packages:
            raise DataError("data.packages is empty; name at least one installed package, like torch")
        found = {package: _folder_of(package) for package in packages}
        if missing := [package for package, folder in found.items() if folder is None]:
            raise DataError(
                f"data.packages: {', '.join(missing)}: no package of this name with Python source is installed in "
                f"{sys.prefix}; install it, or name others"
            )
        folders = [folder for folder in found.values() if folder is not None]
        files = ((folder.parent, path) for folder in folders for path in _python_files(folder, {"__pycache__"}))
        super().__init__({path.relative_to(parent).as_posix(): path for parent, path in files})


def _folder_of(package: str) -> Path | None:
    """Where a top-level package lies; None unless it is installed and holds Python source."""
    try:
        spec = importlib.util.find_spec(package) if package.isidentifier() else None
    except (ImportError, ValueError):
        return None
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    return next((folder for folder in folders if any(folder.rglob("*.py"))), None)


def _python_files(root: Path, left_out: Set[str]) -> Iterator[Path]:
    """The files of a folder and of those in it, sorted, but not of those called like one of `left_out`."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(set(folders) - left_out)
        for file in sorted(files):
            if file.endswith(".py") and not file.startswith("_sysconfigdata"):
                yield Path(folder, file)


def stamp(path: Path) -> tuple[int, int]:
    """Size in bytes and time of the last change in nanoseconds: both zero for a file that cannot be read."""
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_size, status.st_mtime_ns
