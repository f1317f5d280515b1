"""Labelled examples out of files, the user's own or Python's: which class a file belongs to, told by a piece of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from longnet_kit import durable
from longnet_kit.data import copies
from longnet_kit.data.errors import DataError
from longnet_kit.data.files import HEAD, MOST_TOLD, expand, kind_of, not_text
from longnet_kit.data.labels import Labelled, LabelledSource
from longnet_kit.data.sources import SPLITS, PythonStdlib, Split, registry, stamp
from longnet_kit.typed import Range

HELD_OUT = 0.1
"""The share of each class's bytes that goes to `val` at most, and as much again to `test`; but at least a file each."""

Count = Annotated[int, Range(at_least=1)]


class File(NamedTuple):
    """A file of some class."""

    name: str
    """By which it is put in order: the same wherever the files lie."""
    path: Path
    size: int
    """In bytes."""


class Piece(NamedTuple):
    """Part of a file: bytes `start` to `stop` - 1."""

    path: Path
    start: int
    stop: int
    label: int


class Pieces(LabelledSource):
    """Files of several classes, each cut into pieces of about equal length, which are the examples.

    Files are shared out as wholes, class by class: no file has pieces in two splits, and each class has some in each.
    `val` and `test` get up to a tenth of a class's bytes each, `train` the rest.

    Args:
        files: of each class, empty files left out.
        keys: of each class, what the user must change where it has too few files.
        piece_bytes: the most bytes of a piece.
        class_bytes: take files of a class, in the order of a hash of their names, only as long as they make up so many
            bytes; None: all.

    Raises:
        DataError: a class has fewer than three files.
    """

    def __init__(
        self, files: Mapping[str, Sequence[File]], keys: Mapping[str, str], piece_bytes: int, class_bytes: int | None
    ) -> None:
        self.classes = tuple(files)
        chosen = {name: _within(of_class, class_bytes) for name, of_class in files.items()}
        few = [
            f"{keys[name]}: {len(of_class)} file{'s' if len(of_class) != 1 else ''} with something in it"
            f"{'' if class_bytes is None else f' and no more than data.class_bytes {class_bytes:,} together'}, and "
            "train, val and test need one each; name more files, or divide some"
            for name, of_class in chosen.items()
            if len(of_class) < len(SPLITS)
        ]
        if few:
            raise DataError("\n".join(few))
        self._pieces: dict[Split, list[Piece]] = {split: [] for split in SPLITS}
        self._stamps: list[list[Any]] = []
        for label, of_class in enumerate(chosen.values()):
            for split, found in shared_out(of_class).items():
                self._pieces[split] += [piece for file in found for piece in _cut(file, piece_bytes, label)]
                self._stamps += [[split, label, file.name, *stamp(file.path)] for file in found]
        self._piece_bytes = piece_bytes

    def size(self, split: Split) -> int:
        return len(self._pieces[split])

    def example(self, split: Split, index: int) -> Labelled:
        piece = self._pieces[split][index]
        (content,) = _read([piece])
        return Labelled(content, piece.label)

    def content(self) -> str:
        """Return a digest of the bytes and labels of all examples, in order; it reads every file once."""
        digest = hashlib.blake2b(repr(self.classes).encode(errors="surrogatepass"), digest_size=16)
        for split in SPLITS:
            digest.update(f"{split} {self.size(split)} ".encode())
            for _, of_file in groupby(self._pieces[split], key=lambda piece: piece.path):
                pieces = list(of_file)
                for piece, content in zip(pieces, _read(pieces), strict=True):
                    digest.update(f"{piece.label} {len(content)} ".encode() + content)
        return digest.hexdigest()

    def fingerprint(self) -> Any:
        return [list(self.classes), self._piece_bytes, self._stamps]


def shared_out(files: Sequence[File]) -> dict[Split, list[File]]:
    """Share three files of a class or more out among the splits, by a hash of their names."""
    left = sorted(files, key=_place)
    most = HELD_OUT * sum(file.size for file in files)
    found: dict[Split, list[File]] = {}
    held_out: tuple[Split, ...] = ("val", "test")
    for split, kept in zip(held_out, (2, 1), strict=True):
        taken = _first(left[:-kept], most) or [min(left, key=lambda file: (file.size, _place(file)))]
        chosen = set(taken)
        left = [file for file in left if file not in chosen]
        found[split] = taken
    found["train"] = left
    return found


def _within(files: Sequence[File], most: int | None) -> list[File]:
    """The first files, in the order of the hash of their names, that make up no more bytes than `most`."""
    return list(files) if most is None else _first(sorted(files, key=_place), most)


def _first(files: Sequence[File], most: float) -> list[File]:
    """Files from the first on, those left out with which they would make up more bytes than `most`."""
    taken: list[File] = []
    total = 0
    for file in files:
        if total + file.size <= most:
            taken.append(file)
            total += file.size
    return taken


def _place(file: File) -> bytes:
    return hashlib.blake2b(file.name.encode(errors="surrogatepass"), digest_size=8).digest()


def _read(pieces: Sequence[Piece]) -> Iterator[bytes]:
    """Yield the bytes of pieces of one file."""
    path = pieces[0].path
    try:
        with durable.opened(path) as file:
            for piece in pieces:
                file.seek(piece.start)
                content = file.read(piece.stop - piece.start)
                if len(content) < piece.stop - piece.start:
                    raise DataError(f"{path} became shorter while it was in use; start again when nothing writes to it")
                yield content
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error


def _cut(file: File, most: int, label: int) -> list[Piece]:
    count = -(-file.size // most)
    bounds = [file.size * i // count for i in range(count + 1)]
    return [Piece(file.path, start, stop, label) for start, stop in pairwise(bounds)]


@registry.register("labelled_files")
class LabelledFiles(Pieces):
    """The user's own files: text, code, or bytes that are no text; compressed files, archives and tables are refused.

    Of files with the same bytes one is taken, so that no split is tested on what another was trained on; none of those
    that are in two classes, whose bytes do not tell which. Empty files are left out.

    Args:
        paths: of each class, files or patterns (`{spam: [mail/spam/*.txt], ham: [mail/ham/*.txt]}`), from the working
            directory; `~` is expanded.
        folder: instead, a folder in which each sub-folder is a class, of all files in it and below that are not
            hidden.
        piece_bytes, class_bytes: see `Pieces`.

    Raises:
        DataError: neither or both of `paths` and `folder`, fewer than two classes, a path that does not exist or
            matches nothing, a file in two classes, or too few files of a class; all such are told together. A file that
            cannot be read.
    """

    def __init__(
        self,
        paths: Mapping[str, Sequence[str]] | None = None,
        folder: str | None = None,
        piece_bytes: Count = 1024,
        class_bytes: Count | None = None,
    ) -> None:
        if (paths is None) == (folder is None):
            given = "both paths and folder are" if paths is not None else "neither paths nor folder is"
            raise DataError(
                f"data.source labelled_files: {given} given; give paths: {{class: [files or patterns]}}, or a folder "
                "with a sub-folder for each class"
            )
        problems: list[str] = []
        if folder is not None:
            keys, found = _of_folder(folder, problems)
        else:
            assert paths is not None
            keys = {name: f"data.paths.{name}" for name in paths}
            found = {name: [f for p in paths[name] for f in expand(p, f"paths.{name}", problems)] for name in paths}
            problems += [
                f"{keys[name]} is empty; name at least one file or pattern" for name in paths if not paths[name]
            ]
        if len(found) < 2 and not problems:
            given = f"got {', '.join(found) or 'none'}"
            problems.append(f"data.{'paths' if folder is None else 'folder'}: {given}; give at least two classes")
        files = {str(name): _files(of_class) for name, of_class in found.items()}
        problems += _twice(files)
        problems += _not_text(files)
        if problems:
            raise DataError("\n".join(problems))
        kept = copies.without({name: [file.path for file in of_class] for name, of_class in files.items()})
        files = {name: [file for file in of_class if file.path in kept] for name, of_class in files.items()}
        super().__init__(files, {str(name): key for name, key in keys.items()}, piece_bytes, class_bytes)
        self.label = "-".join(self.classes[:3])


def _of_folder(folder: str, problems: list[str]) -> tuple[dict[str, str], dict[str, list[tuple[str, Path]]]]:
    """The sub-folders of a folder: what to call each, and its files."""
    root = Path(folder).expanduser()
    if not root.is_dir():
        problems.append(f"data.folder: {folder} is no folder (looked from {Path.cwd()}); correct it")
        return {}, {}
    classes = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    found = {path.name: sorted(_visible(path)) for path in classes}
    return {path.name: f"data.folder: {path}" for path in classes}, found


def _visible(folder: Path) -> Iterable[tuple[str, Path]]:
    """The names and paths of what is in a folder and below, but for hidden ones, as patterns leave them out too."""
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), path


def _files(found: Sequence[tuple[str, Path]]) -> list[File]:
    """Each file once, without empty ones."""
    once = {path.resolve(): File(name, path, path.stat().st_size) for name, path in found if path.is_file()}
    return [file for file in once.values() if file.size]


def _not_text(files: Mapping[str, Sequence[File]]) -> list[str]:
    """Problems of packed files and tables; UTF-16 is as good as any other bytes here."""
    found: list[str] = []
    for file in (file for of_class in files.values() for file in of_class):
        try:
            with durable.opened(file.path) as content:
                head = content.read(HEAD)
            wrong = "" if kind_of(file.path, head) == "UTF-16" else not_text(file.path, head)
        except OSError:  # reported where the file is read
            continue
        if wrong:
            found.append(f"data.source labelled_files: {file.path} {wrong}")
    return found[:MOST_TOLD]


def _twice(files: Mapping[str, Sequence[File]]) -> list[str]:
    """Problems of files that are in two classes."""
    seen: dict[Path, str] = {}
    found: list[str] = []
    for name, of_class in files.items():
        for file in of_class:
            other = seen.setdefault(file.path.resolve(), name)
            if other != name:
                found.append(f"data.paths.{name}: {file.path} is in {other} too; a file has one class")
    return found


_TABLES = {"encodings"}
"""Packages of generated files that are all alike: pieces of one split would be found again in another."""


@registry.register("labelled_library")
class LabelledLibrary(Pieces):
    """Which package of the interpreter's own library a piece of source is from.

    The classes are the packages that have most bytes of source, of those that `python_stdlib` reads but `encodings`,
    whose files are one table in many versions; they differ a little between versions of Python.

    Args:
        packages: how many classes there are.
        piece_bytes, class_bytes: see `Pieces`.

    Raises:
        DataError: there are not so many packages, or the interpreter comes without its library's sources.
    """

    label = "labelled_library"

    def __init__(
        self,
        packages: Annotated[int, Range(at_least=2)] = 7,
        piece_bytes: Count = 1024,
        class_bytes: Count | None = None,
    ) -> None:
        library = PythonStdlib()
        found: dict[str, list[File]] = {}
        for name, path in library.files.items():
            package, _, rest = name.partition("/")
            if rest and package not in _TABLES and (size := stamp(path)[0]):
                found.setdefault(package, []).append(File(name, path, size))
        able = {name: files for name, files in found.items() if len(_within(files, class_bytes)) >= len(SPLITS)}
        largest = sorted(able, key=lambda name: sum(file.size for file in able[name]), reverse=True)[:packages]
        if len(largest) < packages:
            raise DataError(
                f"data.packages is {packages}, but only {len(able)} packages of this Python's library have files for "
                "train, val and test; lower it, or raise data.class_bytes"
            )
        super().__init__(
            {name: able[name] for name in sorted(largest)},
            dict.fromkeys(largest, "data.packages"),
            piece_bytes,
            class_bytes,
        )
