"""The token cache: a source is tokenized once, into a folder of shards with a manifest.

A folder is written beside its place and renamed into it when whole, so it is there entirely or not at all. Its name
carries a hash of source, tokenizer and format: when one of them changes, another folder is made. The manifest is
written last and holds counts, dtype and checksums, its own among them.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np

from longnet_kit import durable, terminal, typed
from longnet_kit.data.encoding import encode
from longnet_kit.data.errors import DataError
from longnet_kit.data.shards import Reader, Writer
from longnet_kit.data.sources import SPLITS, Source, Split, split_of
from longnet_kit.data.tokenizers import Tokenizer

FORMAT = 1
"""Raised when the same source would be stored differently."""
MANIFEST = "manifest.json"
_BUILDING = ".building-"
_Natural = Annotated[int, typed.Range(at_least=0)]


class TokenCache:
    """A cache folder, opened: `splits` holds a `Reader` for each of train, val and test.

    Raises:
        DataError: the manifest or a shard is missing or damaged.
    """

    def __init__(self, folder: Path) -> None:
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist: the data was not prepared, or has changed since; start again")
        manifest = _read_manifest(folder)
        self.folder = folder
        self.splits: dict[Split, Reader] = {
            split: Reader(folder, manifest["splits"][split], manifest["dtype"]) for split in SPLITS
        }
        self.identity = f"{_checksum(manifest['splits']):08x}"
        """Equal where all tokens are equal, whatever files they came from."""


def directory() -> Path:
    """Where caches live: `LONGNET_CACHE`, else the user's cache directory (`XDG_CACHE_HOME`, or `~/.cache`)."""
    if own := os.environ.get("LONGNET_CACHE"):
        return Path(os.path.expanduser(own))
    return Path(os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache"), "longnet_kit")


def folder_of(source: Source, tokenizer: Tokenizer, parent: Path | None = None) -> Path:
    """The folder of this source under this tokenizer, there or not; `parent` defaults to `directory()`."""
    kind = f"{type(source).__module__}.{type(source).__qualname__}"
    try:
        identity = json.dumps([FORMAT, kind, source.fingerprint(), tokenizer.fingerprint, tokenizer.vocab_size])
    except TypeError as error:
        raise DataError(f"the fingerprint of {kind} must hold plain values, as in JSON ({error})") from error
    digest = hashlib.blake2b(identity.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    names = (source.label or type(source).__name__, Path(tokenizer.name).stem, digest)
    # In bytes, since file systems count those.
    short = (re.sub(r"[^\w.]+", "_", name).encode()[:40].decode(errors="ignore") for name in names)
    return (parent or directory()) / "-".join(short)


def build(source: Source, tokenizer: Tokenizer, parent: Path | None = None) -> Path:
    """Tokenize the source into its cache folder unless that is there; returns the folder.

    Of two processes at once, one builds and the other waits for it (where the file system has locks; else both build,
    and the later one's work is dropped). What an interrupted build left is removed.

    Raises:
        DataError: a document cannot be used, the source changes meanwhile, or the cache cannot be written.
    """
    folder = folder_of(source, tokenizer, parent)
    try:
        if folder.is_dir():
            return folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as alone:
            if folder.is_dir():
                return folder
            for leftover in folder.parent.glob(f"{folder.name}{_BUILDING}*") if alone else []:
                shutil.rmtree(leftover, ignore_errors=True)
            _build(source, tokenizer, folder)
    except OSError as error:
        raise DataError(
            f"the token cache {folder} cannot be written ({error}); free space there or allow writing, "
            "or set the environment variable LONGNET_CACHE to another folder"
        ) from error
    return folder


def _build(source: Source, tokenizer: Tokenizer, folder: Path) -> None:
    stage = folder.with_name(f"{folder.name}{_BUILDING}{os.getpid()}-{secrets.token_hex(4)}")
    stage.mkdir()
    try:
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        writers: dict[Split, Writer] = {split: Writer(stage, split, dtype) for split in SPLITS}
        try:
            _tokenize(source, tokenizer, writers)
        finally:
            splits = {split: writer.close() for split, writer in writers.items()}
        if folder_of(source, tokenizer, folder.parent) != folder:
            raise DataError(f"the data of {folder.name} changed while it was read; start when nothing writes to it")
        manifest = {"format": FORMAT, "tokenizer": tokenizer.name, "dtype": dtype, "splits": splits}
        with (stage / MANIFEST).open("w") as file:
            json.dump({"crc32": _checksum(manifest), **manifest}, file)
            file.flush()
            os.fsync(file.fileno())
        try:
            stage.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was first, with the same content
                raise
        durable.sync_folder(folder.parent)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _tokenize(source: Source, tokenizer: Tokenizer, writers: dict[Split, Writer]) -> None:
    """Write every document, each with the end-of-text token behind it."""
    progress = _Progress(source.label or type(source).__name__)
    eos = np.array([tokenizer.eos])
    unfinished: set[Split] = set()
    for document, ids, text_bytes in encode(source, tokenizer):
        split = document.split or split_of(document.name)
        writer = writers[split]
        if text_bytes:
            writer.append(ids)
            writer.text_bytes += text_bytes
            unfinished.add(split)
        if document.ends and split in unfinished:
            writer.append(eos)
            writer.documents += 1
            unfinished.discard(split)
        progress.show(sum(w.tokens for w in writers.values()))
    progress.close()


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    anew = f"delete the folder {folder}, and the next start builds it anew"
    try:
        manifest = json.loads(durable.read(path))
        sound = manifest.pop("crc32") == _checksum(manifest)
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); {anew}") from error
    if not sound:
        raise DataError(f"{path} was changed or damaged; {anew}")
    if wrong := typed.argument_problems(_Manifest, manifest):
        raise DataError(f"{path} is none that this version writes ({wrong[0]}); {anew}")
    return manifest


@dataclass
class _Shard:
    """A file of tokens, as the manifest has it."""

    file: str
    tokens: _Natural
    crc32: str


@dataclass
class _Split:
    """A split, as the manifest has it: what `shards.Writer.close` returns."""

    tokens: _Natural
    bytes: _Natural
    documents: _Natural
    shards: list[_Shard]


@dataclass
class _Splits:
    """Every split."""

    train: _Split
    val: _Split
    test: _Split


@dataclass
class _Manifest:
    """The manifest but for its checksum."""

    format: int
    tokenizer: str
    dtype: Literal["<u2", "<u4"]
    splits: _Splits


def _checksum(values: Any) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


@contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold the folder's lock, waiting for it; yields False where the system has none. It ends with the process."""
    path = folder.with_name(f"{folder.name}.lock")
    with os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b") as file:  # never waits, whatever is there
        locked = False
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
            locked = True
        yield locked


class _Progress:
    """A line on stderr once a build takes more than two seconds."""

    def __init__(self, label: str) -> None:
        self._label = terminal.printable(label, keep="")
        self._started = time.monotonic()
        self._next = self._started + 2
        self._shown = False

    def show(self, tokens: int) -> None:
        now = time.monotonic()
        if now < self._next:
            return
        live = sys.stderr.isatty()
        rate = tokens / (now - self._started)
        line = f"tokenizing {self._label}: {tokens / 1e6:,.1f} million tokens, {rate / 1e6:.2f} million a second"
        print(f"\r{line}" if live else line, end="" if live else "\n", file=sys.stderr, flush=True)
        self._shown, self._next = live, now + (0.5 if live else 10)

    def close(self) -> None:
        if self._shown:
            print(file=sys.stderr)
