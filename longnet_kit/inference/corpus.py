"""Files as one stream of tokens, from any place on."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np

from longnet_kit import durable
from longnet_kit.data.encoding import encode
from longnet_kit.data.errors import DataError
from longnet_kit.data.files import Files, is_json, mark_of
from longnet_kit.data.sources import Split
from longnet_kit.data.tokenizers import Ids, Tokenizer

Errors = Literal["strict", "replace", "skip"]


class Tokens(NamedTuple):
    """Some tokens, in order."""

    ids: np.ndarray[Any, np.dtype[np.int64]]
    text_bytes: np.ndarray[Any, np.dtype[np.float64]]
    """How much text each is: exact for bytes, the mean over its document for other tokens, 0 for end of text."""

    @classmethod
    def of(cls, ids: Sequence[int] = (), text_bytes: Sequence[float] = ()) -> Tokens:
        """From plain values."""
        return cls(np.array(ids, dtype=np.int64), np.array(text_bytes, dtype=np.float64))

    @property
    def count(self) -> int:
        return len(self.ids)

    def part(self, chosen: slice) -> Tokens:
        """Some of them."""
        return Tokens(self.ids[chosen], self.text_bytes[chosen])


def joined(parts: Sequence[Tokens]) -> Tokens:
    """Several runs of tokens as one."""
    return Tokens(*(np.concatenate(arrays) for arrays in zip(Tokens.of(), *parts, strict=True)))


class Place(NamedTuple):
    """Where a stream stands."""

    reading: int = 0
    """How often the files were read to their end."""
    document: int = 0
    """Documents, or parts of one, that are behind it in this reading."""
    token: int = 0
    """Tokens of the next one that are behind it."""


class Corpus:
    """Text files, source code and JSON lines one after the other, an end-of-text token behind each document.

    Args:
        paths: files or patterns.
        tokenizer: what makes tokens of them.
        errors: what to do with text that is not UTF-8, see `data.files.Files`.
        repeat: begin again where they end.

    Raises:
        DataError: a path is wrong. Reading raises it for what cannot be read, or is empty.
    """

    def __init__(
        self, paths: Sequence[str], tokenizer: Tokenizer, errors: Errors = "strict", repeat: bool = False
    ) -> None:
        with _words_of_the_command():
            self._files = _WholeFiles(paths, errors=errors)
        self._paths = [path for _, path in self._files._files["train"]]
        self._tokenizer = tokenizer
        self._errors = errors
        self.repeat = repeat
        self.label = self._files.label

    @property
    def names(self) -> list[str]:
        """The files, in order."""
        return [str(path) for path in self._paths]

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(path.stat().st_size for path in self._paths)

    @property
    def tokens(self) -> int | None:
        """How many tokens one reading has, where that is known without it: bytes of plain files."""
        if not self._tokenizer.takes_bytes or any(is_json(path) for path in self._paths):
            return None
        sizes = [path.stat().st_size - _mark(path) for path in self._paths]
        return sum(sizes) + sum(size > 0 for size in sizes)

    @property
    def most_tokens(self) -> int:
        """No fewer than one reading has; a replaced byte is three, and a record has an end besides its text."""
        if self.tokens is not None:
            return self.tokens
        return (3 if self._errors == "replace" else 1) * self.size + self.size // 2 + len(self._paths)

    def fingerprint(self) -> Any:
        """Plain values that change when what is read would."""
        return [self._files.fingerprint(), self._tokenizer.fingerprint]

    def reader(self, place: Place) -> Reader:
        """Read on from a place."""
        return Reader(self, place)

    def pieces(self, place: Place) -> Iterator[tuple[Place, Tokens]]:
        """Each document, or part of one, from a place on, and where its first token stands."""
        while True:
            is_empty = place == Place(place.reading)
            with _words_of_the_command():
                for document, ids, text_bytes in encode(self._files, self._tokenizer, place.document):
                    tokens = self._tokens(ids, text_bytes, document.ends)
                    is_empty = is_empty and not tokens.count
                    yield place, tokens.part(slice(place.token, None))
                    place = Place(place.reading, place.document + 1)
            if not self.repeat:
                return
            if is_empty:
                raise DataError(f"{', '.join(self.names)}: there is no text in it, so it cannot be repeated")
            place = Place(place.reading + 1)

    def _tokens(self, ids: Ids, text_bytes: int, ends: bool) -> Tokens:
        """With the end-of-text token, unless there is no text or it goes on."""
        marks = [self._tokenizer.eos] if ends and text_bytes else []
        of_each = np.full(len(ids), text_bytes / max(1, len(ids)))
        of_marks = np.full(len(marks), 0.0 if len(ids) else text_bytes)  # text that no token is made of
        return Tokens(np.concatenate((ids, marks)).astype(np.int64), np.append(of_each, of_marks))


class Reader:
    """Takes tokens from a corpus.

    Attributes:
        place: where the next one stands.
    """

    def __init__(self, corpus: Corpus, place: Place) -> None:
        self.place = place
        self._pieces = corpus.pieces(place)
        self._piece = Tokens.of()

    def take(self, count: int) -> Tokens:
        """The next tokens, fewer where the files end."""
        taken: list[Tokens] = []
        while count:
            if not self._piece.count:
                following = next(self._pieces, None)
                if following is None:
                    break
                self.place, self._piece = following
            part, self._piece = self._piece.part(slice(count)), self._piece.part(slice(count, None))
            self.place = self.place._replace(token=self.place.token + part.count)
            count -= part.count
            taken.append(part)
        return joined(taken)


def _mark(path: Path) -> int:
    with durable.opened(path) as file:
        return mark_of(file)


class _WholeFiles(Files):
    """Files that are not divided among splits."""

    def _ranges(self, name: str, file: BinaryIO, split: Split | None) -> Iterator[tuple[Split, int, int]]:
        yield "train", 0, file.seek(0, os.SEEK_END)


@contextmanager
def _words_of_the_command() -> Iterator[None]:
    """Tell what is wrong in the words of the command line, not of a recipe."""
    try:
        yield
    except DataError as error:
        words = str(error).replace("data.paths", "FILES").replace("set data.errors to", "use --errors")
        raise DataError(words.replace("with data.tokenizer: bytes", "with tokenizer: bytes")) from error
