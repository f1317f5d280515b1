"""The grid of a sweep: which items of the command line are axes, and the cells that they span, each with a name.

A cell's name depends on the axes' keys and on its own values, not on the other cells: a sweep that grows finds its
runs again. No recipe is read here.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from longnet_kit import recipe_files
from longnet_kit.errors import UserError
from longnet_kit.recipe_yaml import Reader

NAME_LENGTH = 100
"""The longest name that a recipe may have."""
HASH_LENGTH, VALUE_LENGTH = 8, 32
ONLY = "the only cell"
"""The label of the cell of a grid without axes."""
_NAME = "every cell is a run with a name of its own; give one name, which the sweep takes"
_RESUME = "a sweep goes on with every run by itself; leave resume out"


@dataclass(frozen=True)
class Axis:
    """A key and the values that it takes."""

    key: str
    texts: list[str]
    """The values as they were typed."""
    values: list[Any]


@dataclass(frozen=True)
class Cell:
    """One point of the grid."""

    label: str
    """What the user knows it by: `backend=sdpa seq_len=128`."""
    name: str
    """What its folder is called: `backend-sdpa+seq_len-128`."""
    items: list[str]
    """`key.path=value` of the axes and of what is fixed."""


@dataclass(frozen=True)
class Grid:
    """The axes of a sweep, and the items that hold in every cell."""

    axes: list[Axis]
    fixed: list[str]
    name: str | None
    """The sweep's name, where the items give one."""

    def cells(self, room: int = NAME_LENGTH) -> list[Cell]:
        """All cells; the last axis varies fastest.

        Args:
            room: how long their names may be.
        """
        short = short_keys([axis.key for axis in self.axes])
        found = []
        for chosen in itertools.product(*(zip(axis.texts, axis.values, strict=True) for axis in self.axes)):
            picked = {axis.key: pick for axis, pick in zip(self.axes, chosen, strict=True)}
            label = " ".join(f"{short[key]}={text}" for key, (text, _) in picked.items()) or ONLY
            name = _cell_name({short[key]: value for key, (_, value) in picked.items()}, room)
            items = [*self.fixed, *(f"{key}={text}" for key, (text, _) in picked.items())]
            items.sort(key=_depth)  # a whole mapping would replace the keys inside it that come before
            found.append(Cell(label, name, items))
        return found


def parse(items: Sequence[str]) -> Grid:
    """The grid that `key.path=value` items span; those with commas outside of brackets and quotes are axes.

    Raises:
        UserError: items are malformed or contradict each other; all that is wrong is told.
    """
    axes: list[Axis] = []
    fixed: list[str] = []
    name: str | None = None
    keys: list[str] = []
    problems: list[str] = []
    for item in items:
        key, equals, text = item.partition("=")
        texts = split(text)
        values, wrong = _read(key, equals, texts)
        wrong = wrong or _refusals(key, texts, values, keys)
        problems += wrong
        keys.append(key)
        if wrong:
            continue
        if len(texts) > 1:
            axes.append(Axis(key, texts, values))
        elif key == "name":
            name = None if values[0] is None else str(values[0])
        else:
            fixed.append(item)
    if problems:
        raise UserError("\n  ".join(problems if len(problems) == 1 else [f"{len(problems)} problems", *problems]))
    return Grid(axes, fixed, name)


def split(text: str) -> list[str]:
    """The parts of a text between its commas, those in brackets and quotes aside, without the blanks around them."""
    parts, start, depth, quote, before = [], 0, 0, "", ""
    position = 0
    while position < len(text):
        c = text[position]
        if quote:
            if (quote, c) == ('"', "\\") or text.startswith("''", position) and quote == "'":
                position += 1  # what is escaped closes nothing
            elif c == quote:
                quote = ""
        elif c in "'\"" and before in ("", *",:[{"):  # elsewhere it is a character like others
            quote = c
        elif c in "[{":
            depth += 1
        elif c in "]}":
            depth = max(0, depth - 1)
        elif c == "," and depth == 0:
            parts.append(text[start:position])
            start = position + 1
        before = before if c.isspace() else c
        position += 1
    return [part.strip() for part in (*parts, text[start:])]


def short_keys(keys: Sequence[str]) -> dict[str, str]:
    """Each key by its last parts, as many as tell it from the others."""

    def short(key: str) -> str:
        names = key.split(".")
        ends = [".".join(names[-n:]) for n in range(1, len(names) + 1)]
        return next((end for end in ends if sum(f".{k}".endswith(f".{end}") for k in keys) == 1), key)

    return {key: short(key) for key in keys}


def _depth(item: str) -> int:
    return item.partition("=")[0].count(".")


def _read(key: str, equals: str, texts: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The values of an item, and what is wrong with it as YAML."""
    values: list[Any] = []
    wrong: list[str] = []
    for text in texts:
        layer, problems = recipe_files.parse_dotlist([f"{key}{equals}{text}"])
        wrong += [str(problem) for problem in problems]
        value: Any = layer.values
        for name in key.split(".") if not problems else ():
            value = value[name]
        values.append(value)
    return values, list(dict.fromkeys(wrong))


def _refusals(key: str, texts: Sequence[str], values: Sequence[Any], taken: Sequence[str]) -> list[str]:
    """Why an item cannot be part of a grid."""
    if key in taken:
        return [f"{key}: stands twice; give all its values in one item, as in {key}=a,b"]
    if key == "resume":
        return [f"resume: got {', '.join(texts)}; {_RESUME}"]
    if len(texts) == 1:
        return []
    if key == "name":
        return [f"name: got {', '.join(texts)}; {_NAME}"]
    if "" in texts:
        return [f"{key}: got {','.join(texts)!r}, an empty value; write null for none, and text with commas in quotes"]
    twice = [text for i, text in enumerate(texts) if any(_is_same(values[i], other) for other in values[:i])]
    return [f"{key}: got {text} twice; list each value once" for text in twice]


def _is_same(one: Any, other: Any) -> bool:
    """Whether two values are one; true is not 1, but 1.0 is."""
    return one == other and isinstance(one, bool) == isinstance(other, bool)


def _cell_name(values: dict[str, Any], room: int) -> str:
    """`key-value` parts with + between them, by their keys; hashes, which have no -, after what is not told in full."""
    name = "+".join(f"{key}-{_value_name(values[key])}" for key in sorted(values)) or "cell"
    if len(name) <= room:
        return name
    return f"{name[: room - HASH_LENGTH - 1].rstrip('.+-')}+{_hash(values)}"


def _value_name(value: Any) -> str:
    """A value in a folder's name: as it is if it is short and the folder of no other value could be meant."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", text) and len(text) <= VALUE_LENGTH and _reads_as(text, value):
        return text
    return re.sub(r"[^A-Za-z0-9_-]+", "_", text).strip("_")[:VALUE_LENGTH].rstrip("_") + f"+{_hash(value)}"


def _reads_as(text: str, value: Any) -> bool:
    try:
        read = Reader("", lines=False).read(text)
    except yaml.YAMLError:
        return False
    return type(read) is type(value) and read == value


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:HASH_LENGTH]
