"""Text from the user's own files: text and source code as it is, and JSON lines.

Files are read in parts, so that neither a large file nor a large folder has to fit in memory.
"""

from __future__ import annotations

import codecs
import glob
import json
import os
from collections.abc import Iterator, Sequence
from itertools import islice, takewhile
from pathlib import Path
from typing import Any, BinaryIO, Literal

from longnet_kit import durable
from longnet_kit.data.errors import DataError
from longnet_kit.data.sources import HELD_OUT, SPLITS, Document, Source, Split, registry, split_of, stamp

PART = 4 << 20
"""Bytes read at a time."""
LINE = 1 << 16
"""How far to look for the end of a line where a file is divided, in bytes."""
HEAD = 512
"""Bytes from which `kind_of` recognizes a file that is not text."""
RECORD = 64 << 20
"""The most bytes of one JSON record."""
MOST_TOLD = 5
"""How many files of one kind of problem an error names."""
MANY = 200
"""From so many text files on, whole files go to a split; below, each file is divided."""


@registry.register("files")
class Files(Source):
    """Text files, source code and JSON lines (`.jsonl`, `.ndjson`, `.json`: one record per line).

    Compressed files, archives and tables are refused. A byte-order mark is not part of the text.

    Splits: a split with paths of its own takes exactly those. The rest is shared out 90 : 5 : 5. JSON records go by a
    hash of file name and line number. Text files go as wholes by a hash of their name where there are 200 or more;
    where there are fewer, each file is divided at line ends: first part `train`, then `val`, then `test`. A name is the
    path from the folder where its pattern's wildcards begin.

    Args:
        paths: files or patterns (`~/code/**/*.py`), from the working directory.
        val_paths, test_paths: the same, for validation and test. A file named there is left out of `paths`.
        field: the key that holds the text in JSON records.
        errors: text that is not UTF-8: `strict` raises, `replace` puts the replacement character in its place, `skip`
            leaves out the file or record. A tokenizer that takes bytes gets text files as they are.

    Raises:
        DataError: a path does not exist, matches nothing, or is a folder; all such paths are told together.
    """

    def __init__(
        self,
        paths: Sequence[str],
        val_paths: Sequence[str] = (),
        test_paths: Sequence[str] = (),
        field: str = "text",
        errors: Literal["strict", "replace", "skip"] = "strict",
    ) -> None:
        problems: list[str] = [] if paths else ["data.paths is empty; name at least one file or pattern"]
        given = {"test": ("test_paths", test_paths), "val": ("val_paths", val_paths), "train": ("paths", paths)}
        seen: set[str] = set()
        self._files: dict[str, list[tuple[str, Path]]] = {}
        for split, (key, patterns) in given.items():
            self._files[split] = [found for p in patterns for found in expand(p, key, problems)]
            self._files[split] = [(name, path) for name, path in self._files[split] if _first(path, seen)]
        if not problems and not self._files["train"]:
            problems.append("data.paths: all are named in val_paths or test_paths too; nothing is left to train on")
        problems += [f"data.{given[s][0]}: {wrong}" for s, found in self._files.items() for wrong in _unreadable(found)]
        if problems:
            raise DataError("\n".join(problems))
        self._own: frozenset[Split] = frozenset(split for split in SPLITS[1:] if self._files[split])
        self._divided = sum(not is_json(path) for _, path in self._files["train"]) < MANY
        self._field = field
        self._errors = errors
        self.label = self._files["train"][0][1].stem

    def documents(self, as_bytes: bool) -> Iterator[Document]:
        """See `Source.documents`.

        Raises:
            DataError: a file cannot be read or is not UTF-8, or a JSON record has no such text.
        """
        for split in SPLITS:
            whole = None if split == "train" else split
            for name, path in self._files[split]:
                try:
                    yield from self._read(name, path, whole, as_bytes)
                except OSError as error:
                    raise DataError(f"{path} cannot be read: {error.strerror or error}") from error

    def fingerprint(self) -> Any:
        files = {split: [[name, *stamp(path)] for name, path in found] for split, found in self._files.items()}
        values = {"files": files, "field": self._field, "errors": self._errors}
        paths = [path for found in self._files.values() for _, path in found]
        if any(path.suffix.lower() == ".json" for path in paths):
            values["json"] = "lines"  # earlier versions read them as text
        if any(map(_has_mark, paths)):
            values["marks"] = "left out"  # earlier versions read them as text
        return values

    def _read(self, name: str, path: Path, split: Split | None, as_bytes: bool) -> Iterator[Document]:
        if is_json(path):
            yield from self._records(name, path, split)
            return
        if self._errors == "skip" and not as_bytes and not _is_utf8(path):
            return
        with durable.opened(path) as file:
            first = mark_of(file)
            for part_of, start, stop in self._ranges(name, file, split):
                for offset, raw in _parts(file, max(start, first), max(stop, first)):
                    content = raw if as_bytes else self._decode(raw, str(path), offset)
                    yield Document(str(path), content, part_of, ends=offset + len(raw) == stop)

    def _ranges(self, name: str, file: BinaryIO, split: Split | None) -> Iterator[tuple[Split, int, int]]:
        """Which bytes of a text file go to which split: all of it, or a run each."""
        size = file.seek(0, os.SEEK_END)
        if split is not None or not self._divided:
            yield split or split_of(name, self._own), 0, size
            return
        taken: list[Split] = [s for s in SPLITS if s not in self._own]
        held_out = len(taken) - 1
        bounds = [_boundary(file, int(size * (1 - HELD_OUT * (held_out - i)))) for i in range(held_out)]
        yield from zip(taken, [0, *bounds], [*bounds, size], strict=True)

    def _records(self, name: str, path: Path, split: Split | None) -> Iterator[Document]:
        with durable.opened(path) as file:
            offset = file.seek(mark_of(file))
            for number, line in enumerate(iter(lambda: file.readline(RECORD + 1), b""), start=1):
                where = f"{path}, line {number}"
                if len(line) > RECORD:
                    raise DataError(f"{where} has more than {RECORD:,} bytes; divide the record, or leave the file out")
                if line.strip() and not (self._errors == "skip" and not _decodes(line)):
                    text = self._text(self._decode(line, where, offset), where)
                    if text is not None:
                        yield Document(where, text, split or split_of(f"{name}:{number}", self._own))
                offset += len(line)

    def _text(self, line: str, where: str) -> str | None:
        """The text of one JSON record; None where it is to be skipped."""
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:  # ValueError: of a number with thousands of digits, too
            raise DataError(f"{where} is not JSON ({error}); mend or remove the line") from error
        if not isinstance(record, dict):
            raise DataError(f"{where} is no JSON object; expected {{{json.dumps(self._field)}: ...}}")
        if self._field not in record:
            keys = ", ".join([*map(repr, islice(record, 20)), *(["..."] if len(record) > 20 else [])]) or "none"
            raise DataError(f"{where} has no key {self._field!r} (it has: {keys}); set data.field to the right one")
        text = record[self._field]
        if not isinstance(text, str):
            raise DataError(f"{where}: {self._field!r} is {_start(text)}, expected text; set data.field")
        try:
            text.encode()
        except UnicodeEncodeError as error:  # half of a surrogate pair
            if self._errors == "skip":
                return None
            if self._errors == "strict":
                raise DataError(
                    f"{where}: {self._field!r} has {text[error.start]!a}, half a character; {_ADVICE}"
                ) from None
            return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
        return text

    def _decode(self, raw: bytes, where: str, offset: int) -> str:
        try:
            return raw.decode("utf-8", "replace" if self._errors == "replace" else "strict")
        except UnicodeDecodeError as error:
            byte = offset + error.start
            raise DataError(f"{where}: byte {byte} (0x{raw[error.start]:02x}) is not UTF-8; {_ADVICE}") from error


def _start(value: Any) -> str:
    """The first characters of a JSON value."""
    pieces = json.JSONEncoder().iterencode(value)
    return "".join(islice(pieces, 60))[:60]


_ADVICE = (
    "set data.errors to replace (puts the replacement character there) or skip (leaves the file or record out), "
    "or train on text files as they are with data.tokenizer: bytes"
)


def expand(pattern: str, key: str, problems: list[str]) -> list[tuple[str, Path]]:
    """The files of one path or pattern with their names, sorted; what is wrong with it goes to `problems`."""
    if not _is_path(pattern):
        problems.append(f"data.{key}: {pattern!a} holds a character that no path can; correct it")
        return []
    expanded = os.path.expanduser(pattern)
    folders = f"give its files, as in {os.path.join(pattern.rstrip(os.sep), '**', '*.py')}"
    if os.path.isdir(expanded):
        problems.append(f"data.{key}: {pattern} is a folder; {folders}")
        return []
    if os.path.exists(expanded):
        if not os.path.isfile(expanded):
            problems.append(
                f"data.{key}: {pattern} is no regular file, and it is read more than once; write what comes from "
                "there into a file first"
            )
            return []
        return [(os.path.basename(expanded), Path(expanded))]
    if not glob.has_magic(expanded):
        problems.append(f"data.{key}: {pattern} does not exist (looked from {os.getcwd()}); correct the path")
        return []
    root = Path(*takewhile(lambda part: not glob.has_magic(part), Path(expanded).parts))
    matches = [path for path in map(Path, glob.glob(expanded, recursive=True)) if not path.is_dir()]
    found = sorted(path for path in matches if path.is_file())
    odd = sorted(str(path) for path in matches if path.exists() and not path.is_file())
    if odd:
        problems.append(f"data.{key}: {pattern} matches {', '.join(odd[:MOST_TOLD])}: no regular file; move it away")
        return []
    if not found:
        problems.append(f"data.{key}: no file matches {pattern} (looked from {os.getcwd()}); correct the pattern")
    return [(path.relative_to(root).as_posix(), path) for path in found]


def _is_path(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half a character
        return False


def _first(path: Path, seen: set[str]) -> bool:
    """Whether a file is met for the first time, under whichever name."""
    real = os.path.realpath(path)
    return not (real in seen or seen.add(real))


def is_json(path: Path) -> bool:
    """Whether a file holds JSON records by its name, one per line."""
    return path.suffix.lower() in (".jsonl", ".ndjson", ".json")


def kind_of(path: Path, head: bytes) -> str:
    """Return what a file is that is not text: `table`, `UTF-16` or the name of a packed format; empty for text.

    Args:
        path: the file; its suffix decides where `head` does not.
        head: its first `HEAD` bytes or more.
    """
    found = (name for (at, magic), name in _MAGIC.items() if head.startswith(magic, at))
    return next(found, _SUFFIXES.get(path.suffix.lower(), ""))


def not_text(path: Path, head: bytes) -> str:
    """Why a file cannot be read as text by its name or its first bytes, and what to do; empty where it can.

    Args:
        path: the file.
        head: its first `HEAD` bytes or more.
    """
    kind = kind_of(path, head)
    if kind == "table":
        return f"is a table ({path.suffix}), not text; write its text column into a .jsonl file, one record per line"
    if kind == "UTF-16":
        return "is UTF-16 or UTF-32 text by its byte-order mark; save it as UTF-8"
    return kind and f"is packed ({kind}), so its bytes are not its text; unpack it and give the files that were in it"


_SUFFIXES = {
    ".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".lzma": "xz", ".zst": "zstd", ".lz4": "lz4",
    ".br": "brotli", ".zip": "zip", ".7z": "7-Zip", ".tar": "tar", ".csv": "table", ".tsv": "table",
    ".parquet": "table", ".arrow": "table", ".feather": "table",
}  # fmt: skip
_MAGIC = {
    (0, b"\x1f\x8b"): "gzip", (4, b"1AY&SY"): "bzip2", (0, b"\xfd7zXZ\x00"): "xz", (0, b"\x28\xb5\x2f\xfd"): "zstd",
    (0, b"\x04\x22\x4d\x18"): "lz4", (0, b"PK\x03\x04"): "zip", (0, b"7z\xbc\xaf\x27\x1c"): "7-Zip",
    (257, b"ustar"): "tar", (0, b"PAR1\x15"): "table", (0, b"ARROW1\0\0"): "table",
    (0, codecs.BOM_UTF16_LE): "UTF-16", (0, codecs.BOM_UTF16_BE): "UTF-16", (0, codecs.BOM_UTF32_BE): "UTF-16",
}  # fmt: skip
"""By the first byte that tells, and the bytes there."""


def mark_of(file: BinaryIO) -> int:
    """The bytes of a file's UTF-8 byte-order mark: 3, or 0 where it has none."""
    file.seek(0)
    return len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0


def _has_mark(path: Path) -> bool:
    try:
        with durable.opened(path) as file:
            return mark_of(file) > 0
    except OSError:  # reported where the file is read
        return False


def _unreadable(found: Sequence[tuple[str, Path]]) -> list[str]:
    """What is wrong with the first of some files that hold no text; a file that cannot be opened fails when read."""
    problems: list[str] = []
    for _, path in found:
        try:
            with durable.opened(path) as file:
                wrong = not_text(path, file.read(HEAD))
                if not wrong and path.suffix.lower() == ".json":
                    wrong = _not_lines(file)
        except OSError:
            continue
        if wrong:
            problems.append(f"{path} {wrong}")
            if len(problems) == MOST_TOLD:
                break
    return problems


def _not_lines(file: BinaryIO) -> str:
    """Why a .json file is not JSON lines, by its first line that is not empty; empty where it is."""
    file.seek(mark_of(file))
    first = next((line for line in iter(lambda: file.readline(RECORD), b"") if line.strip()), b"{}")
    try:
        if isinstance(json.loads(first.decode(errors="replace")), dict):
            return ""
    except (ValueError, RecursionError):
        pass
    return (
        "is one JSON document, and JSON lines are expected: an object on each line, which holds the text. Write its "
        "records so into a .jsonl file; to train on the document as it is, give a copy of it the suffix .txt"
    )


def _decodes(raw: bytes) -> bool:
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


def _is_utf8(path: Path) -> bool:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        with durable.opened(path) as file:
            while raw := file.read(PART):
                decoder.decode(raw)
        decoder.decode(b"", final=True)
    except UnicodeDecodeError:
        return False
    return True


def _boundary(file: BinaryIO, target: int) -> int:
    """The first place at or after byte `target` where a line starts, or a character where no line ends nearby."""
    file.seek(max(0, target - 1))
    ahead = file.read(LINE)
    newline = ahead.find(b"\n")
    if newline >= 0:
        return max(0, target - 1) + newline + 1
    file.seek(target)
    following = file.read(3)  # a character has at most three bytes after its first
    return target + next((i for i, byte in enumerate(following) if byte & 0xC0 != 0x80), len(following))


def _parts(file: BinaryIO, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
    """Bytes `start` to `stop` with their offsets, divided at line ends, or else between characters."""
    file.seek(start)
    kept = b""
    while raw := file.read(min(PART, stop - start - len(kept))):
        kept += raw
        end = len(kept) if start + len(kept) == stop else _cut(kept)
        yield start, kept[:end]
        start, kept = start + end, kept[end:]


def _cut(raw: bytes) -> int:
    """After the last line end; where there is none, before the character that is cut off, if one is."""
    newline = raw.rfind(b"\n")
    if newline >= 0:
        return newline + 1
    for back in (1, 2, 3):
        byte = raw[-back]
        if byte >= 0xC0:  # the first byte of a character of 2 to 4 bytes
            length = 2 if byte < 0xE0 else 3 if byte < 0xF0 else 4
            return len(raw) - back if length > back else len(raw)
        if byte < 0x80:
            break
    return len(raw)
