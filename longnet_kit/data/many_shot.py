"""A data set as the context: labelled examples of a concept that is new in every sequence, line by line.

Nothing can be learnt of a concept but in its context: accuracy by the number of lines before is how well a network
learns from examples it has only read.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from random import Random
from typing import Annotated

from longnet_kit import typed
from longnet_kit.data.answers import ENDLESS, Answer, AnswersSource, Count, Example
from longnet_kit.data.sources import registry
from longnet_kit.errors import UserError


@registry.register("many_shot")
class ManyShot(AnswersSource):
    """Lines like "dabcK": a word, and the label of the class whose prototype it is a noisy copy of.

    Each sequence draws how many classes it has, its own prototypes, words of small letters, and its own labels, capital
    letters. Every line's label is an answer; its group is the number of lines before it, down to a power of two: 8 are
    lines after 8 to 15 others. A class that has not come yet can only be guessed, and who reads the labels but not the
    words is right once in as many as there are. Sequences of few classes are what a network learns first.

    Args:
        classes: how many prototypes and labels at most.
        fewest_classes: and how many at least; the same number for sequences of `classes` alone.
        length: letters of a word.
        letters: how many different letters words are of.
        noise: the probability that a letter of a copy is drawn anew.
        train_examples, val_examples, test_examples, examples_seed: see `AnswersSource`.

    Raises:
        UserError: fewer words than classes, or fewer classes at most than at least.
    """

    label = "many_shot"

    def __init__(
        self,
        classes: Annotated[int, typed.Range(at_least=2, at_most=26)] = 8,
        fewest_classes: Annotated[int, typed.Range(at_least=1, at_most=26)] = 2,
        length: Annotated[int, typed.Range(at_least=1, at_most=64)] = 4,
        letters: Annotated[int, typed.Range(at_least=2, at_most=26)] = 8,
        noise: Annotated[float, typed.Range(at_least=0, at_most=1)] = 0.1,
        train_examples: Count = ENDLESS,
        val_examples: Count = 256,
        test_examples: Count = 256,
        examples_seed: int = 0,
    ) -> None:
        super().__init__(
            train_examples=train_examples,
            val_examples=val_examples,
            test_examples=test_examples,
            examples_seed=examples_seed,
        )
        if fewest_classes > classes:
            raise UserError(
                f"data.fewest_classes: got {fewest_classes}, more than the {classes} of data.classes; use at most those"
            )
        if letters**length < classes:
            raise UserError(
                f"data.classes: got {classes}, but there are only {letters**length} words of {length} of {letters} "
                "letters; use fewer classes, or longer words or more letters"
            )
        self._fewest, self._classes, self._length, self._noise = fewest_classes, classes, length, noise
        self._letters = string.ascii_lowercase[:letters]

    def groups(self, seq_len: int) -> Sequence[int]:
        """1, 2, 4 and so on, as far as there are lines; the first line of a text is in none."""
        lines = self._lines(seq_len)
        if lines < 2:
            raise UserError(
                f"data.seq_len: {seq_len:,} tokens hold {lines} lines of {self._line} bytes, expected 2 at least; use "
                f"{2 * self._line - 1:,} or more"
            )
        return [2**i for i in range((lines - 1).bit_length())]

    def example(self, index: int, rng: Random, seq_len: int) -> Example:
        classes = rng.randint(self._fewest, self._classes)
        labels = rng.sample(string.ascii_uppercase, classes)
        prototypes: list[str] = []
        while len(prototypes) < classes:
            word = self._word(rng)
            if word not in prototypes:
                prototypes.append(word)
        lines, answers = self._lines(seq_len), []
        text = "\n" * (seq_len + 1 - lines * self._line)
        for before in range(lines):
            kind = rng.randrange(classes)
            text += self._copy(prototypes[kind], rng)
            answers.append(Answer(len(text), len(text) + 1, 2 ** (before.bit_length() - 1) if before else 0))
            text += f"{labels[kind]}\n"
        return Example(text.encode(), answers)

    @property
    def _line(self) -> int:
        """Bytes of a line."""
        return self._length + len("K\n")

    def _lines(self, seq_len: int) -> int:
        return (seq_len + 1) // self._line

    def _word(self, rng: Random) -> str:
        return "".join(rng.choices(self._letters, k=self._length))

    def _copy(self, word: str, rng: Random) -> str:
        return "".join(rng.choice(self._letters) if rng.random() < self._noise else letter for letter in word)
