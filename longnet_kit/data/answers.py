"""Made-up text that asks questions of itself: the interface of such a source. Of it, the answers alone are learnt.

A plug-in source writes `groups` and `example`, and is registered under a name, as any source is. Its constructor's
keyword arguments are its recipe keys. Batches of examples are made in answers_data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from longnet_kit import typed
from longnet_kit.data.sources import Source, Split
from longnet_kit.errors import UserError

if TYPE_CHECKING:
    from longnet_kit.data.language_modeling import LanguageModelingData

Count = Annotated[int, typed.Range(at_least=1, at_most=2**40)]
ENDLESS = 2**32
"""Training examples by default: no run sees one twice."""


class Answer(NamedTuple):
    """Bytes `start` to `end` - 1 of an example's text, which are right only together."""

    start: int
    end: int
    group: int
    """What its accuracy is reported by, 0 or more: a distance in tokens, or a number of examples before it."""


class Example(NamedTuple):
    """A text and where its answers are."""

    text: bytes
    """(seq_len + 1,): the tokens of a sequence and the last target."""
    answers: Sequence[Answer]
    """In order, at least one; none begins the text, and at least one byte lies between two of them."""


class AnswersSource(Source):
    """Examples that are made up when they are asked for, each by its split and its number alone.

    There is no text to read and no token cache: `documents` is not asked for. The tokenizer is `bytes`, so that a
    place in the text is a place in the sequence. An example fills its sequence: nothing is padded.

    Args:
        train_examples, val_examples, test_examples: how many examples each split has.
        examples_seed: other seeds give other examples.
    """

    supplies: Literal["text", "answers", "labels"] = "answers"

    def __init__(
        self,
        *,
        train_examples: Count = ENDLESS,
        val_examples: Count = 256,
        test_examples: Count = 256,
        examples_seed: int = 0,
    ) -> None:
        self._counts: dict[Split, int] = {"train": train_examples, "val": val_examples, "test": test_examples}
        self._seed = examples_seed

    @classmethod
    def data_module(cls) -> type[LanguageModelingData]:
        from longnet_kit.data.answers_data import AnswersData

        return AnswersData

    def groups(self, seq_len: int) -> Sequence[int]:
        """The groups by which accuracy is reported; answers of others count in the accuracy of all answers only.

        Raises:
            UserError: no example fits a sequence of so many tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} must write groups(seq_len)")

    def example(self, index: int, rng: Random, seq_len: int) -> Example:
        """Make up an example.

        Args:
            index: its number in its split, for what is to be dealt out evenly over a split.
            rng: everything random comes from it alone; it is seeded by the source's seed, the split and `index`.
            seq_len: tokens in a sequence; the text has one more.
        """
        raise NotImplementedError(f"{type(self).__name__} must write example(index, rng, seq_len)")

    def fingerprint(self) -> Any:
        """Every attribute, in the order in which they were set; override it where one is no plain value."""
        return [type(self).__name__, vars(self)]

    def size(self, split: Split) -> int:
        """How many examples a split has."""
        return self._counts[split]

    def made(self, split: Split, index: int, seq_len: int) -> Example:
        """Example `index` of a split, the same whenever it is asked for.

        Raises:
            UserError: the source made one that is no example.
        """
        name = f"{self._seed} {split} {index}".encode()
        rng = Random(int.from_bytes(hashlib.blake2b(name, digest_size=16).digest()))
        made = self.example(index, rng, seq_len)
        if problem := _problem(made, seq_len):
            raise UserError(f"{type(self).__name__}.example({index}, seq_len={seq_len}): {problem}")
        return made


def _problem(example: Example, seq_len: int) -> str:
    """What is wrong with an example; empty when nothing is."""
    text, answers = example
    if len(text) != seq_len + 1:
        return f"its text has {len(text):,} bytes, expected seq_len + 1 = {seq_len + 1:,}; fill it up, or cut it"
    if not answers:
        return "it has no answer, expected at least one"
    free = 1  # the first token has none before it to be predicted from
    for start, end, group in answers:
        if not free <= start < end <= len(text):
            return (
                f"an answer has bytes {start} to {end}, expected a range that begins at {free} or later and ends at "
                f"{len(text)} at most; answers come in order, with at least one byte in between"
            )
        if group < 0:
            return f"an answer has group {group}, expected 0 or more"
        free = end + 1
    return ""
