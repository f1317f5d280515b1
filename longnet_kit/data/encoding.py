"""A source's documents as token ids, one after the other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from longnet_kit.data.errors import DataError
from longnet_kit.data.sources import Document, Source
from longnet_kit.data.tokenizers import Ids, Tokenizer


class Encoded(NamedTuple):
    """A document, or a part of one, as tokens."""

    document: Document
    ids: Ids
    """Without the end-of-text token."""
    text_bytes: int


def encode(source: Source, tokenizer: Tokenizer, skip: int = 0) -> Iterator[Encoded]:
    """Every document of a source, those that are empty too.

    Args:
        skip: how many of them to pass over, without encoding them.

    Raises:
        DataError: a document cannot be read, is no valid text, or becomes a token that the tokenizer should not have.
    """
    for number, document in enumerate(_documents(source, tokenizer.takes_bytes)):
        if number < skip:
            continue
        raw, content = _text(document, tokenizer.takes_bytes)
        ids = tokenizer.encode(content)
        if len(ids) and int(ids.max()) >= tokenizer.vocab_size:
            raise DataError(f"{tokenizer.name} gave the id {ids.max()}, beyond its {tokenizer.vocab_size} tokens")
        yield Encoded(document, ids, len(raw))


def _documents(source: Source, as_bytes: bool) -> Iterator[Document]:
    try:
        yield from source.documents(as_bytes)
    except OSError as error:
        raise DataError(f"the data of {source.label or type(source).__name__} cannot be read: {error}") from error


def _text(document: Document, takes_bytes: bool) -> tuple[bytes, str | bytes]:
    """The document as bytes, for counting them, and as what the tokenizer takes."""
    try:
        if isinstance(document.content, str):
            raw = document.content.encode()
            return raw, raw if takes_bytes else document.content
        return document.content, document.content if takes_bytes else document.content.decode()
    except UnicodeError as error:
        raise DataError(f"{document.name} is no valid text ({error}); mend it or leave it out") from error
