"""Text to token ids and back: raw bytes, a `tokenizers` JSON file, or an encoding of tiktoken by its name.

Vocabulary sizes are known without any download, so that a model can be built before there is a network.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from longnet_kit import durable, typed
from longnet_kit.data.errors import DataError

Ids = np.ndarray[Any, np.dtype[np.uint32]]

TIKTOKEN = {  # name: (vocabulary size, end of text)
    "gpt2": (50257, 50256),
    "r50k_base": (50257, 50256),
    "p50k_base": (50281, 50256),
    "p50k_edit": (50284, 50256),
    "cl100k_base": (100277, 100257),
    "o200k_base": (200019, 199999),
    "o200k_harmony": (201088, 199999),
}
"""The encodings of tiktoken that have an end-of-text token; a test compares them with tiktoken's own definitions."""

SIZE = 1 << 28
"""The most bytes that a tokenizer's file may have."""
END_OF_TEXT = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<EOS>", "[SEP]")
"""Tokens that a JSON tokenizer may mark the end of a document with; the first that it has is taken."""


class Tokenizer:
    """Text to token ids and back.

    What looks like a special token in the text is encoded as ordinary text, so that `eos` stands between documents and
    nowhere else.
    """

    name: str
    """What to call it in a recipe."""
    vocab_size: int
    """One more than the largest id."""
    eos: int
    """The id that ends every document."""
    fingerprint: str
    """Changes when the same text would be encoded differently."""
    takes_bytes: bool = False
    """Whether `encode` accepts bytes that are no valid UTF-8."""

    def encode(self, text: str | bytes) -> Ids:
        """Token ids of a text, (n,) uint32, without `eos`. Bytes are taken for UTF-8 where `takes_bytes` is False."""
        raise NotImplementedError

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, without `eos`; replacement characters stand for what is no valid UTF-8."""
        raise NotImplementedError

    def decoder(self) -> Decoder:
        """Decode tokens one by one."""
        raise NotImplementedError


class Decoder:
    """The text of tokens that come one by one; together its pieces are what `decode` gives.

    Bytes of an unfinished character are held back.

    Args:
        bytes_of: the bytes of a token, none for `eos`.
    """

    def __init__(self, bytes_of: Callable[[int], bytes]) -> None:
        self._bytes_of = bytes_of
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Take a token; the text that is whole now."""
        return self._utf8.decode(self._bytes_of(token))

    def finish(self) -> str:
        """No more tokens come; the text of what was held back."""
        return self._utf8.decode(b"", final=True)


class _DecoderOfText(Decoder):
    """Where tokens have text alone and no bytes: what a token adds to the text of those right before it.

    Tokens of bytes that never become a character are given up after a while, so together the pieces may hold fewer
    or more replacement characters than `decode` gives.
    """

    def __init__(self, tokenizer: JSON) -> None:
        self._decode, self._eos = tokenizer.decode, tokenizer.eos
        self._told: list[int] = []
        """The last tokens whose text is out: some tokens' text depends on the one before."""
        self._held: list[int] = []

    def add(self, token: int) -> str:
        if token != self._eos:
            self._held.append(token)
        piece = self._piece()
        is_cut = piece.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < _LONGEST_CHARACTER
        return "" if is_cut else self._tell(piece)

    def finish(self) -> str:
        return self._tell(self._piece())

    def _piece(self) -> str:
        return self._decode([*self._told, *self._held])[len(self._decode(self._told)) :]

    def _tell(self, piece: str) -> str:
        if piece and self._held:
            self._told, self._held = self._held, []
        return piece


_LONGEST_CHARACTER = 8
"""Tokens that may make up a character: four bytes, and as many again where a tokenizer divides them further."""


class Bytes(Tokenizer):
    """One token per byte, of the byte's value; 256 ends a document."""

    name = "bytes"
    vocab_size = 257
    eos = 256
    fingerprint = "bytes"
    takes_bytes = True

    def encode(self, text: str | bytes) -> Ids:
        raw = text.encode() if isinstance(text, str) else text
        return np.frombuffer(raw, dtype=np.uint8).astype(np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in _checked(ids, self) if i != self.eos).decode(errors="replace")

    def decoder(self) -> Decoder:
        return Decoder(lambda token: bytes(i for i in _checked([token], self) if i != self.eos))


class JSON(Tokenizer):
    """A tokenizer of the `tokenizers` library, from its JSON file.

    Raises:
        DataError: the file is missing or is no such tokenizer, it has no end-of-text token, or the library is missing.
    """

    def __init__(self, path: str) -> None:
        file = os.path.expanduser(path)
        if not os.path.isfile(file):
            there = "is a folder" if os.path.isdir(file) else "is no regular file"
            what = there if os.path.exists(file) else "does not exist"
            raise DataError(f"data.tokenizer: the file {path} {what}; give a tokenizer JSON file, {_CHOICES}")
        try:
            import tokenizers
        except ImportError as error:
            raise DataError(_not_installed(path, "tokenizers")) from error
        with _library_errors(path):
            content = durable.read(file, SIZE)
            self._tokenizer: Any = tokenizers.Tokenizer.from_buffer(content)
        # A file may carry the settings of some training batch: these would cut and fill documents.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        ends = [vocabulary[token] for token in END_OF_TEXT if token in vocabulary]
        if not ends:
            raise DataError(
                f"data.tokenizer: {path} has no token to end a document with; add one of {', '.join(END_OF_TEXT)} "
                "to it with Tokenizer.add_special_tokens"
            )
        self.name = path
        self.eos = ends[0]
        self.vocab_size = max(vocabulary.values()) + 1
        self.fingerprint = "json:" + hashlib.sha256(content).hexdigest()

    def encode(self, text: str | bytes) -> Ids:
        text = text.decode() if isinstance(text, bytes) else text
        with _library_errors(self.name):
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.uint32)

    def decode(self, ids: Iterable[int]) -> str:
        kept = [i for i in _checked(ids, self) if i != self.eos]
        with _library_errors(self.name):
            return self._tokenizer.decode(kept, skip_special_tokens=False)

    def decoder(self) -> Decoder:
        return _DecoderOfText(self)


@contextmanager
def _library_errors(path: str) -> Iterator[None]:
    """Tell of what goes wrong in the `tokenizers` library as the file's fault.

    It raises plain Exception; its panics are not even that.
    """
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise DataError(
            f"data.tokenizer: {path} is not a JSON file of the `tokenizers` library, or not a sound one ({error}); "
            f"save one with Tokenizer.save, or use {_CHOICES}"
        ) from error


class Tiktoken(Tokenizer):
    """An encoding of tiktoken. Its ranks are fetched when first used, unless tiktoken has them in its own cache.

    Raises:
        DataError: no such encoding. Encoding and decoding raise it when the ranks cannot be fetched, or tiktoken is
            missing.
    """

    def __init__(self, name: str) -> None:
        if name not in TIKTOKEN:
            raise DataError(f"data.tokenizer: unknown tiktoken encoding {name!r}; {typed.suggestion(name, TIKTOKEN)}")
        self.name = name
        self.vocab_size, self.eos = TIKTOKEN[name]
        self.fingerprint = f"tiktoken:{name}"
        self._loaded: Any = None

    def encode(self, text: str | bytes) -> Ids:
        text = text.decode() if isinstance(text, bytes) else text
        return self._encoding().encode_to_numpy(text, disallowed_special=())

    def decode(self, ids: Iterable[int]) -> str:
        return b"".join(map(self._bytes_of, ids)).decode(errors="replace")

    def decoder(self) -> Decoder:
        return Decoder(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        """Of a token; a replacement character where the encoding leaves the id out, which a model may draw."""
        _checked([token], self)
        try:
            return b"" if token == self.eos else self._encoding().decode_single_token_bytes(token)
        except KeyError:
            return "\N{REPLACEMENT CHARACTER}".encode()

    def _encoding(self) -> Any:
        if self._loaded is not None:
            return self._loaded
        try:
            import tiktoken
        except ImportError as error:
            raise DataError(_not_installed(self.name, "tiktoken")) from error
        try:
            self._loaded = tiktoken.get_encoding(self.name)
        except Exception as error:  # network, proxy, disk and checksum errors of several libraries
            raise DataError(
                f"data.tokenizer: the ranks of {self.name!r} could not be fetched ({_first_line(error)}); "
                "connect once, or point TIKTOKEN_CACHE_DIR at a folder that has them, or use tokenizer: bytes"
            ) from error
        return self._loaded

    def __getstate__(self) -> dict[str, Any]:
        """Without the ranks, which a worker process loads again from tiktoken's cache when it needs them."""
        return {**self.__dict__, "_loaded": None}


_CHOICES = f"`bytes`, or one of tiktoken's encodings {', '.join(TIKTOKEN)}"


def build(name: str) -> Tokenizer:
    """The tokenizer that a recipe's `data.tokenizer` names.

    Args:
        name: `bytes`; a path that ends in `.json` (`~` is expanded); or a tiktoken encoding, with or without the prefix
            `tiktoken:`.

    Raises:
        DataError: there is no such tokenizer, or its file cannot be used.
    """
    if not isinstance(name, str) or not name:
        raise DataError(f"data.tokenizer: got {name!r}; expected a path to a tokenizer JSON file, {_CHOICES}")
    if name == "bytes":
        return Bytes()
    if name.startswith("tiktoken:") or name in TIKTOKEN:
        return Tiktoken(name.removeprefix("tiktoken:"))
    if name.endswith(".json") or os.path.isfile(os.path.expanduser(name)):
        return JSON(name)
    hint = typed.suggestion(name, ["bytes", *TIKTOKEN])
    raise DataError(f"data.tokenizer: unknown tokenizer {name!r}; {hint} (or the path of a tokenizer JSON file)")


def _checked(ids: Iterable[int], tokenizer: Tokenizer) -> list[int]:
    numbers = [int(i) for i in ids]
    for i in numbers:
        if not 0 <= i < tokenizer.vocab_size:
            raise DataError(
                f"{i} is no token of {tokenizer.name}, whose ids run from 0 to {tokenizer.vocab_size - 1}; "
                "was the model trained with another tokenizer?"
            )
    return numbers


def _not_installed(name: str, library: str) -> str:
    return (
        f"data.tokenizer: {name} needs the library {library}, which is not installed; "
        f"pip install {library}, or use tokenizer: bytes"
    )


def _first_line(error: Exception) -> str:
    lines = f"{type(error).__name__}: {error}".splitlines()
    return lines[0] if len(lines[0]) <= 200 else lines[0][:197] + "..."
