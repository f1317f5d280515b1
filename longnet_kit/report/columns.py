"""The columns of a comparison: what differs in the recipes, and what came of the runs."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longnet_kit.report import table
from longnet_kit.report.history import History
from longnet_kit.report.table import DASH, Column

UNCOMPARED = ("description", "extends", "imports", "resume")
"""Keys that say nothing of what was trained."""
RATE, MEMORY, SECONDS = "train/tokens_per_second", "train/peak_memory", "train/seconds"
_LARGER_IS_BETTER = ("tokens_per_second", "mfu", "accuracy")
_WIDEST = 32


@dataclass
class Row:
    """A run, and what it is called among the others."""

    label: str
    run: History


def build(rows: Sequence[Row], keys: Sequence[Column], metrics: Sequence[str], by: str | None) -> list[Column]:
    """All columns, the first naming the run.

    Args:
        keys: the columns of recipe keys.
        metrics: the tags whose final values are shown; that of `by` comes first, with its best value.
        by: the tag that the rows are sorted by.
    """
    runs = [row.run for row in rows]
    statuses, steps = [run.status for run in runs], [run.steps for run in runs]
    columns = [
        Column("run", "run", [str(run.path) for run in runs], [row.label for row in rows], is_right=False),
        Column("status", "status", statuses, statuses, is_right=False),
        Column("steps", "steps", steps, [DASH if step is None else str(step) for step in steps]),
        *keys,
    ]
    if by is not None:
        best = [run.best(by, larger_is_better(by)) for run in runs]
        columns += [_finals(runs, by), _measured("best", f"best {by}", best)]
    columns += [_finals(runs, tag) for tag in metrics if tag != by]
    usual = {RATE: ("tokens/s", _count), MEMORY: ("memory", table.size), SECONDS: ("time", table.duration)}
    shown = {by, *metrics}
    return columns + [_finals(runs, tag, title, show) for tag, (title, show) in usual.items() if tag not in shown]


def larger_is_better(tag: str) -> bool:
    """Whether a run with more of it is the better one."""
    return any(word in tag for word in _LARGER_IS_BETTER)


def rank(run: History, by: str) -> tuple[int, float]:
    """A key that sorts the best final value first, then what is not finite, then the runs without one."""
    value = run.final(by)
    if value is None:
        return 2, 0.0
    if not math.isfinite(value):
        return 1, 0.0
    return 0, -value if larger_is_better(by) else value


def differing(rows: Sequence[Row]) -> list[Column]:
    """The recipe keys whose values are not the same in all runs, in the recipe's order.

    A key counts as differing where some recipe lacks it; a run whose recipe cannot be read counts for nothing.
    """
    recipes = [row.run.recipe for row in rows]
    readable = [recipe for recipe in recipes if recipe]
    every = list(dict.fromkeys(key for recipe in readable for key in recipe))
    unlike = [key for key in every if len({plain(recipe[key]) if key in recipe else None for recipe in readable}) > 1]
    unlike = [key for key in unlike if key not in UNCOMPARED and not (key == "name" and _paths_tell_names(rows))]
    titles = _shortest_suffixes(unlike, every)
    columns = []
    for key in unlike:
        texts = [plain(recipe[key]) if key in recipe else DASH for recipe in recipes]
        values = [_in_full(recipe[key]) if key in recipe else None for recipe in recipes]
        is_number = all(isinstance(value, (int, float, type(None))) for value in values)
        columns.append(Column(titles[key], key, values, _shortened(texts), is_right=is_number))
    return columns


def plain(value: Any) -> str:
    """A recipe's value as text: as in YAML, lists without brackets."""
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    if isinstance(value, float):
        return f"{value:.15g}"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(plain, value))
    return " ".join(str(value).split())


def _finals(runs: Iterable[History], tag: str, title: str = "", show: Callable[[float], str] = table.number) -> Column:
    return _measured(title or tag, tag, [run.final(tag) for run in runs], show)


def _measured(
    title: str, name: str, values: Sequence[float | None], show: Callable[[float], str] = table.number
) -> Column:
    return Column(title, name, values, [DASH if value is None else show(value) for value in values])


def _count(value: float) -> str:
    return f"{value:,.0f}"


def _in_full(value: Any) -> Any:
    """A recipe's value for a file."""
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else plain(value)


def _paths_tell_names(rows: Sequence[Row]) -> bool:
    """Whether every run lies in a folder of its recipe's name."""
    return all(
        Path(os.path.abspath(row.run.path)).parent.as_posix().endswith(f"/{row.run.recipe['name']}")
        for row in rows
        if "name" in row.run.recipe
    )


def _shortest_suffixes(keys: Iterable[str], every: Iterable[str]) -> dict[str, str]:
    """Each dotted key by as few of its last parts as no other key of the recipes ends in."""
    counts = Counter(suffix for key in every for suffix in _suffixes(key))
    return {key: next((suffix for suffix in _suffixes(key) if counts[suffix] == 1), key) for key in keys}


def _suffixes(key: str) -> list[str]:
    parts = key.split(".")
    return [".".join(parts[i:]) for i in reversed(range(len(parts)))]


def _shortened(texts: list[str]) -> list[str]:
    """Long values without their middle, where they can still be told apart."""
    half = _WIDEST // 2
    short = [text if len(text) <= _WIDEST else f"{text[:half]}…{text[1 - half :]}" for text in texts]
    return short if len(set(short)) == len(set(texts)) else texts
