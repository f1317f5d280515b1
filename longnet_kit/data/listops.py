"""ListOps of the Long Range Arena (arXiv 2011.04006, after Nangia and Bowman 2018): nested lists to be computed.

An expression is a digit, or an operator with its arguments in brackets. Each symbol is one byte, so that with the
tokenizer `bytes` each is one token: `m` for [MIN, `M` for [MAX, `d` for [MED, `s` for [SM, `]`, and the digits.
`s26M91]]` is [SM 2 6 [MAX 9 1 ] ]: (2 + 6 + 9) mod 10 = 7.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from statistics import median
from typing import Annotated, Any

from longnet_kit.data.errors import DataError
from longnet_kit.data.labels import Labelled, LabelledSource
from longnet_kit.data.sources import Split, registry
from longnet_kit.typed import Range

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "m": min,
    "M": max,
    "d": lambda values: int(median(values)),  # of two in the middle, their mean rounded down
    "s": lambda values: sum(values) % 10,
}
"""By their symbol."""
END = "]"
OPERATOR_SHARE = 0.25
"""How often an argument is a list and no digit, as in the Arena's generator (which calls it VALUE_P)."""
FORMAT = 1
"""Raised when the same options would give other examples."""
_TRIES = 20_000
"""Drawings after which no expression of the wanted length is expected any more."""

Count = Annotated[int, Range(at_least=1)]


@registry.register("listops")
class ListOps(LabelledSource):
    """Expressions whose value is their class: MIN, MAX, MED (the median, rounded down) and SM (the sum mod 10).

    Drawn as in the Arena's generator: a list has 2 to `max_args` arguments, an argument above the deepest level is a
    list with probability 0.25, and expressions of another length than wanted are drawn again. The Arena's own data has
    the default options. An example depends on `examples_seed`, the split and its number alone, and is drawn when it is
    asked for.

    Args:
        min_length, max_length: symbols of an expression, brackets' ends included; `data.seq_len` must hold them.
        max_depth: levels of an expression, its digits included.
        max_args: the most arguments of a list.
        train_examples, val_examples, test_examples: how many there are.
        examples_seed: another one gives other examples.

    Raises:
        DataError: no expression has such a length. Drawing raises it where almost none has.
    """

    label = "listops"
    classes = tuple("0123456789")

    def __init__(
        self,
        min_length: Count = 501,
        max_length: Annotated[int, Range(at_least=4)] = 1999,
        max_depth: Annotated[int, Range(at_least=2, at_most=100)] = 10,
        max_args: Annotated[int, Range(at_least=2, at_most=1000)] = 10,
        train_examples: Count = 96_000,
        val_examples: Count = 2_000,
        test_examples: Count = 2_000,
        examples_seed: int = 0,
    ) -> None:
        if min_length > max_length:
            raise DataError(f"data.min_length is {min_length} and data.max_length {max_length}; lower the first")
        possible = 1
        for _ in range(max_depth - 1):
            possible = min(2 + max_args * possible, max_length)
        if min_length > possible:
            raise DataError(
                f"data.min_length is {min_length}, but with data.max_depth {max_depth} and data.max_args {max_args} no "
                f"expression is longer than {possible}; lower it, or raise one of them"
            )
        self._lengths = min_length, max_length
        self._max_depth, self._max_args, self._seed = max_depth, max_args, examples_seed
        self._sizes: dict[Split, int] = {"train": train_examples, "val": val_examples, "test": test_examples}
        self.longest = max_length

    def size(self, split: Split) -> int:
        return self._sizes[split]

    def example(self, split: Split, index: int) -> Labelled:
        draw = random.Random(f"{self._seed} {split} {index}").random  # the same under every version of Python
        shortest, longest = self._lengths
        for _ in range(_TRIES):
            symbols: list[str] = []
            value = self._list(draw, 1, symbols)
            if shortest <= len(symbols) <= longest:
                return Labelled("".join(symbols), value)
        raise DataError(
            f"data.source listops: of {_TRIES:,} expressions none had {shortest:,} to {longest:,} symbols; widen "
            f"data.min_length and data.max_length, or change data.max_depth ({self._max_depth}) or data.max_args "
            f"({self._max_args})"
        )

    def fingerprint(self) -> Any:
        return [FORMAT, self._lengths, self._max_depth, self._max_args, self._seed, self._sizes]

    def _list(self, draw: Callable[[], float], depth: int, symbols: list[str]) -> int:
        """Append a list at a level of an expression, counted from 1, and return its value; cut off once too long.

        Whoever asks for more than one symbol asks for a list: a digit alone would only be drawn again.
        """
        operator = list(OPERATORS)[_below(len(OPERATORS), draw)]
        symbols.append(operator)
        values: list[int] = []
        for _ in range(2 + _below(self._max_args - 1, draw)):
            if len(symbols) > self._lengths[1]:
                return 0
            if depth + 1 < self._max_depth and draw() < OPERATOR_SHARE:
                values.append(self._list(draw, depth + 1, symbols))
            else:
                values.append(_below(10, draw))
                symbols.append(str(values[-1]))
        symbols.append(END)
        return OPERATORS[operator](values)


def _below(limit: int, draw: Callable[[], float]) -> int:
    """A random number of 0 to limit - 1."""
    return int(limit * draw())
