"""Recall at a distance: texts that state something under a name, and ask for it so many tokens later.

`passkey` hides it in prose (as in Landmark Attention, arXiv 2305.16300), `associative_recall` is bare pairs of a key
and a value (MQAR, arXiv 2312.04927).
"""

from __future__ import annotations

import math
import string
from abc import ABC, abstractmethod
from collections.abc import Sequence
from random import Random
from typing import Annotated, Any, NamedTuple

import numpy as np

from longnet_kit import typed
from longnet_kit.data.answers import ENDLESS, Answer, AnswersSource, Count, Example
from longnet_kit.data.sources import registry
from longnet_kit.errors import UserError

Spread = Annotated[float, typed.Range(at_least=0, at_most=1)]
TRIES = 400
"""Layouts that are drawn afresh before an example is given up."""
EASY = 10
"""Layouts that may be needed at first: a source that takes more would give up some day, and is refused at once."""

SENTENCES = [
    b"The grass is green. ",
    b"The sky is blue. ",
    b"The sun is yellow. ",
    b"Here we go. ",
    b"There and back again. ",
    b"Rain fell all night. ",
    b"Nobody saw the cat. ",
    b"It was late by then. ",
]
"""What fills a `passkey` text: no digit is in it."""


class Pair(NamedTuple):
    """A statement and its question, in whole: both hold the value, which the text's answer is in the question."""

    statement: bytes
    question: bytes
    value_at: tuple[int, int]
    """Where the value begins in each."""
    value_bytes: int

    def offset(self, distance: int) -> int:
        """From the start of the statement to that of the question, the values being `distance` bytes apart."""
        return self.value_at[0] + distance - self.value_at[1]

    def span(self, distance: int) -> int:
        """Bytes from the start of the statement to the end of the question."""
        return self.offset(distance) + len(self.question)


class Recall(AnswersSource, ABC):
    """Pairs of a statement and a question at drawn places of a text, the values' first bytes a distance apart.

    Names are drawn without repetition, values and places at random. Pair j of example i has the distance
    (i * pairs + j) mod len(distances) of the list: every split covers each distance equally often. With a `spread` s,
    a pair of the distance d is somewhere from (1 - s) d to d apart: where all are exactly d, a network may learn to
    copy from d tokens before, whatever is asked for, and knows nothing of other distances.
    """

    names: str
    """The names, a character each."""
    key: str
    """The recipe key that says how many pairs a text has."""

    def __init__(self, distances: Sequence[int], pairs: int, spread: float, **options: int) -> None:
        super().__init__(**options)
        self._spread = spread
        self._distances = list(distances)
        self._pairs = pairs
        self._check()

    @abstractmethod
    def pair(self, name: str, rng: Random) -> Pair:
        """A statement and a question of a drawn value, equally long whatever is drawn."""

    @abstractmethod
    def filler(self, size: int, rng: Random) -> bytes:
        """`size` bytes of what stands around them."""

    def groups(self, seq_len: int) -> Sequence[int]:
        """The distances."""
        longest = max(self._distances)
        span = self.pair(self.names[0], Random(0)).span(longest)
        if span > seq_len + 1:
            fits = longest - (span - seq_len - 1)
            remedy = f"use at most {fits:,}, or a longer seq_len" if fits >= self._nearest else "use a longer seq_len"
            raise UserError(
                f"data.distances: {longest:,} does not fit a sequence of {seq_len:,} tokens: statement, question and "
                f"what lies between take {span:,}; {remedy}"
            )
        for index in range(4 * len(self._distances)):
            self._laid_out(index, Random(index), seq_len, EASY)
        return sorted(self._distances)

    def example(self, index: int, rng: Random, seq_len: int) -> Example:
        return self._laid_out(index, rng, seq_len, TRIES)

    def _laid_out(self, index: int, rng: Random, seq_len: int, tries: int) -> Example:
        pairs = [self.pair(name, rng) for name in rng.sample(self.names, self._pairs)]
        first = index * self._pairs
        groups = [self._distances[(first + j) % len(self._distances)] for j in range(self._pairs)]
        distances = [rng.randint(self._least(group), group) if self._spread else group for group in groups]
        text = bytearray(self.filler(seq_len + 1, rng))
        answers = []
        places = self._places(pairs, distances, rng, seq_len, tries)
        for pair, group, distance, start in zip(pairs, groups, distances, places, strict=True):
            asked = start + pair.offset(distance)
            text[start : start + len(pair.statement)] = pair.statement
            text[asked : asked + len(pair.question)] = pair.question
            value = asked + pair.value_at[1]
            answers.append(Answer(value, value + pair.value_bytes, group))
        return Example(bytes(text), sorted(answers))

    def _places(self, pairs: list[Pair], distances: list[int], rng: Random, seq_len: int, tries: int) -> list[int]:
        """Where each statement begins, so that nothing overlaps; the farthest pairs, which fit worst, choose first."""
        order = sorted(range(len(pairs)), key=lambda j: -distances[j])
        for _ in range(tries):
            taken = np.zeros(seq_len + 1, dtype=bool)
            starts: dict[int, int] = {}
            for j in order:
                free = _free(pairs[j], distances[j], taken)
                if not len(free):
                    break
                starts[j] = start = int(free[rng.randrange(len(free))])
                asked = start + pairs[j].offset(distances[j])
                taken[start : start + len(pairs[j].statement)] = True
                taken[asked : asked + len(pairs[j].question)] = True
            else:
                return [starts[j] for j in range(len(pairs))]
        raise UserError(
            f"data.{self.key}: {self._pairs} at distances of {self._distances} are too many for a sequence of "
            f"{seq_len:,} tokens; use fewer or shorter distances, or a longer seq_len"
        )

    def _least(self, distance: int) -> int:
        """How near the values of a pair of this distance may be."""
        return math.ceil((1 - self._spread) * distance)

    def _check(self) -> None:
        """Raise a UserError unless pairs and distances are possible in sequences of some length."""
        if not 1 <= self._pairs <= len(self.names):
            raise UserError(
                f"data.{self.key}: got {self._pairs}, expected 1 to {len(self.names)}: each has its own name"
            )
        pair = self.pair(self.names[0], Random(0))
        self._nearest = len(pair.statement) - pair.offset(0)
        given = self._distances
        if not given or len(set(given)) < len(given) or self._least(min(given)) < self._nearest:
            after = f" after data.spread {self._spread} of them is taken off" if self._spread else ""
            raise UserError(
                f"data.distances: got {given}, expected one or more different ones of at least {self._nearest} tokens"
                f"{after}, in which a statement ends before its question begins"
            )


def _free(pair: Pair, distance: int, taken: np.ndarray[Any, np.dtype[np.bool_]]) -> np.ndarray[Any, Any]:
    """The places where a statement may begin so that neither it nor its question overlaps what is `taken`."""
    before = np.concatenate(([0], np.cumsum(taken)))
    places = len(taken) - pair.span(distance) + 1
    asked, (stating, asking) = pair.offset(distance), (len(pair.statement), len(pair.question))
    in_statement = before[stating : stating + places] - before[:places]
    in_question = before[asked + asking : asked + asking + places] - before[asked : asked + places]
    return np.flatnonzero(in_statement + in_question == 0)


@registry.register("passkey")
class PassKey(Recall):
    """Pass keys in prose: " Pass key K is 482." and later " Pass key K? 482.", of which 482 is the answer.

    Args:
        distances: tokens from the key where it is stated to where it is asked for, first digit to first digit.
        keys: pass keys in a text, each stated and asked for once, at most 26.
        digits: of each key.
        spread: what part of its distance a key may be nearer, see `Recall`.
        train_examples, val_examples, test_examples, examples_seed: see `AnswersSource`.

    Raises:
        UserError: distances that are too short, or given twice.
    """

    label = "passkey"
    names = string.ascii_uppercase
    key = "keys"

    def __init__(
        self,
        distances: Sequence[Count] = (32, 64, 128, 256, 512),
        keys: Annotated[int, typed.Range(at_least=1, at_most=26)] = 5,
        digits: Annotated[int, typed.Range(at_least=1, at_most=16)] = 5,
        spread: Spread = 0.0,
        train_examples: Count = ENDLESS,
        val_examples: Count = 256,
        test_examples: Count = 256,
        examples_seed: int = 0,
    ) -> None:
        self._digits = digits
        counts = {"train_examples": train_examples, "val_examples": val_examples, "test_examples": test_examples}
        super().__init__(distances, keys, spread, **counts, examples_seed=examples_seed)

    def pair(self, name: str, rng: Random) -> Pair:
        value = "".join(rng.choices(string.digits, k=self._digits))
        return _pair(f" Pass key {name} is ", f" Pass key {name}? ", value, ".")

    def filler(self, size: int, rng: Random) -> bytes:
        count = -(-size // min(map(len, SENTENCES)))
        return b"".join(rng.choices(SENTENCES, k=count))[:size]


@registry.register("associative_recall")
class AssociativeRecall(Recall):
    """Keys and values among dots: "K=x ", and later "K?x ", of which x is the answer.

    Keys are capital letters and digits, values small letters: without recall 1 in 26 is right.

    Args:
        distances: tokens from a value to where it is asked for.
        pairs: keys in a text, each with a value and asked for once, at most 36.
        spread: what part of its distance a value may be nearer, see `Recall`.
        train_examples, val_examples, test_examples, examples_seed: see `AnswersSource`.

    Raises:
        UserError: distances that are too short, or given twice.
    """

    label = "associative_recall"
    names = string.ascii_uppercase + string.digits
    key = "pairs"

    def __init__(
        self,
        distances: Sequence[Count] = (32, 64, 128, 256, 512),
        pairs: Annotated[int, typed.Range(at_least=1, at_most=36)] = 20,
        spread: Spread = 0.0,
        train_examples: Count = ENDLESS,
        val_examples: Count = 256,
        test_examples: Count = 256,
        examples_seed: int = 0,
    ) -> None:
        counts = {"train_examples": train_examples, "val_examples": val_examples, "test_examples": test_examples}
        super().__init__(distances, pairs, spread, **counts, examples_seed=examples_seed)

    def pair(self, name: str, rng: Random) -> Pair:
        return _pair(f"{name}=", f"{name}?", rng.choice(string.ascii_lowercase), " ")

    def filler(self, size: int, rng: Random) -> bytes:
        return b"." * size


def _pair(stating: str, asking: str, value: str, end: str) -> Pair:
    statement, question = ((opening + value + end).encode() for opening in (stating, asking))
    return Pair(statement, question, (len(stating), len(asking)), len(value))
