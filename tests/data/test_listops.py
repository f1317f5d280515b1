"""ListOps: values by another parser, the Arena's rules, and the same examples whenever they are asked for."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longnet_kit.data import DataError
from longnet_kit.data.listops import ListOps

SMALL: dict[str, Any] = {"min_length": 10, "max_length": 60, "max_depth": 5, "max_args": 5}


class Parser:
    """Reads an expression again, and knows nothing of how it was drawn."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0
        self.depth = self.level = 1
        self.arguments: list[int] = []
        self.lists = self.slots = 0

    def value(self) -> int:
        symbol = self.text[self.at]
        self.at += 1
        if symbol.isdigit():
            return int(symbol)
        values = []
        self.level += 1
        self.depth = max(self.depth, self.level)
        while self.text[self.at] != "]":
            if self.level < 10:
                self.slots += 1
                self.lists += not self.text[self.at].isdigit()
            values.append(self.value())
        self.at += 1
        self.level -= 1
        self.arguments.append(len(values))
        ordered = sorted(values)
        if symbol == "m":
            return ordered[0]
        if symbol == "M":
            return ordered[-1]
        if symbol == "s":
            return sum(values) - sum(values) // 10 * 10
        assert symbol == "d"
        middle = ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]
        return middle // 2


@pytest.mark.parametrize(
    ("text", "value"), [("s26M91]]", 7), ("m43]", 3), ("d1234]", 2), ("d19]", 5), ("d951]", 5), ("s55]", 0)]
)
def test_the_parser_reads_what_people_would(text: str, value: int) -> None:
    assert Parser(text).value() == value


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.sampled_from(["train", "val", "test"]),
    st.integers(2, 8),
    st.integers(2, 12),
    st.integers(0, 99),
)
def test_labels_are_the_values(index: int, split: Any, depth: int, args: int, seed: int) -> None:
    source = ListOps(min_length=4, max_length=80, max_depth=depth, max_args=args, examples_seed=seed)
    content, label = source.example(split, index)
    assert isinstance(content, str)
    assert re.fullmatch(r"[mMds\]0-9]{4,80}", content)
    parser = Parser(content)
    assert parser.value() == label
    assert parser.at == len(content), "the expression ends where the text does"
    assert parser.depth <= depth
    assert all(2 <= count <= args for count in parser.arguments)
    assert ListOps(
        min_length=4, max_length=80, max_depth=depth, max_args=args, examples_seed=seed, val_examples=7
    ).example(split, index) == (content, label)


def test_the_defaults_are_the_arenas() -> None:
    """Lengths strictly between 500 and 2000, depth and arguments to 10, each argument a list in one case of four."""
    source = ListOps()
    assert [source.size(split) for split in ("train", "val", "test")] == [96_000, 2_000, 2_000]
    counts: Counter[str] = Counter()
    for index in range(60):
        content, label = source.example("train", index)
        assert isinstance(content, str)
        assert 500 < len(content) < 2000
        parser = Parser(content)
        assert parser.value() == label
        assert parser.depth <= 10 and max(parser.arguments) <= 10
        counts.update(content)
    operators = [counts[symbol] for symbol in "mMds"]
    assert max(operators) < 1.1 * min(operators)
    digits = [counts[symbol] for symbol in "0123456789"]
    assert max(digits) < 1.15 * min(digits)


def test_a_list_stands_where_chance_puts_it() -> None:
    """Of expressions that may have any length, a quarter of the arguments above the deepest level are lists."""
    source = ListOps(min_length=4, max_length=100_000, max_depth=10, max_args=3)
    lists = slots = 0
    for index in range(600):
        parser = Parser(str(source.example("val", index).content))
        parser.value()
        lists, slots = lists + parser.lists, slots + parser.slots
    assert lists / slots == pytest.approx(0.25, abs=0.02)


def test_splits_and_seeds_have_examples_of_their_own() -> None:
    source = ListOps(**SMALL)
    found = {
        split: {source.example(split, index).content for index in range(300)} for split in ("train", "val", "test")
    }
    assert not found["train"] & found["val"] and not found["train"] & found["test"] and not found["val"] & found["test"]
    assert all(len(texts) > 295 for texts in found.values())
    assert ListOps(**SMALL, examples_seed=1).example("train", 0) != source.example("train", 0)
    assert ListOps(**SMALL, examples_seed=1).fingerprint() != source.fingerprint() == ListOps(**SMALL).fingerprint()


def test_every_class_comes() -> None:
    counts = Counter(ListOps(**SMALL).example("train", index).label for index in range(1000))
    assert set(counts) == set(range(10))
    assert max(counts.values()) < 300, "none is the answer to most"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"min_length": 90, "max_length": 60}, "data.min_length is 90 and data.max_length 60; lower the first"),
        ({**SMALL, "max_depth": 2, "min_length": 9}, "no expression is longer than 7"),
    ],
)
def test_lengths_that_cannot_be_are_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        ListOps(**options)


def test_lengths_that_hardly_ever_come_end_in_an_error() -> None:
    source = ListOps(min_length=53, max_length=53, max_depth=4, max_args=3)
    with pytest.raises(DataError, match=r"of 20,000 expressions none had 53 to 53 symbols; widen"):
        source.example("train", 0)
