"""Labelled examples: the interface of a source that has them, and the data module that makes padded batches of them.

Nothing is cached: an example is read or made, and tokenized, whenever it is asked for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from longnet_kit.data.sources import Source, Split

if TYPE_CHECKING:
    from longnet_kit.data.labelled_batches import LabelledData


class Labelled(NamedTuple):
    """An example."""

    content: str | bytes
    """At least one token. Of bytes that are no valid UTF-8, a tokenizer that takes text gets replacement characters."""
    label: int
    """Its place among the classes."""


class LabelledSource(Source):
    """Examples by number, each of one class.

    A plug-in writes `classes`, `size`, `example` and `fingerprint`, and is registered like any source.
    """

    supplies: Literal["text", "answers", "labels"] = "labels"
    classes: Sequence[str]
    """The names of the classes, in the order of their labels; known once it is constructed."""
    longest: int | None = None
    """Bytes of the longest example, where a label is only right of the whole: then `seq_len` must hold so many tokens.
    None: of longer examples the beginning is taken."""

    @classmethod
    def data_module(cls) -> type[LabelledData]:
        from longnet_kit.data.labelled_batches import LabelledData

        return LabelledData

    def size(self, split: Split) -> int:
        """How many examples a split has."""
        raise NotImplementedError(f"{type(self).__name__} must write size(split)")

    def content(self) -> str:
        """Return a digest of all examples, which ranks compare; override it where the fingerprint has file times."""
        return hashlib.blake2b(repr(self.fingerprint()).encode(errors="surrogatepass"), digest_size=16).hexdigest()

    def example(self, split: Split, index: int) -> Labelled:
        """An example of a split, the same whenever it is asked for.

        Args:
            index: 0 to size(split) - 1.

        Raises:
            DataError: it cannot be had.
        """
        raise NotImplementedError(f"{type(self).__name__} must write example(split, index)")
