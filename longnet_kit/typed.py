"""Checks plain values, as YAML or keyword arguments give them, against type annotations.

Everything is checked and every problem is returned, so that a user reads all of them at once. Nothing is converted
and nothing heavy is imported here. The recipe and the registries are its callers.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import math
import types
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Annotated, Any, Literal, Union, cast

Annotation = Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong: `key` is the dotted path to it, `message` says what came and what is allowed."""

    key: str
    message: str

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


@dataclasses.dataclass(frozen=True)
class Range:
    """Bounds of a number, as the metadata of an `Annotated` type."""

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None

    def admits(self, value: float) -> bool:
        """Whether `value` is within the bounds; NaN and infinity never are."""
        return (
            abs(value) < math.inf
            and (self.at_least is None or value >= self.at_least)
            and (self.above is None or value > self.above)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = {"at least": self.at_least, "above": self.above, "at most": self.at_most, "below": self.below}
        return " and ".join(f"{words} {bound:.10g}" for words, bound in bounds.items() if bound is not None)


def suggestion(word: str, choices: Iterable[str]) -> str:
    """A hint that names the choice nearest to a misspelled word, or all of them where none is near."""
    choices = sorted(choices)
    alike = likeness(word, choices)
    if alike:
        return f"did you mean {max(alike, key=alike.__getitem__)!r}?"
    return f"known: {', '.join(choices)}" if choices else "nothing is allowed here"


def likeness(word: str, choices: Iterable[str]) -> dict[str, float]:
    """The choices that a word may stand for, each with how alike the two are, from 0.6 to 1.

    Case and dashes do not count, and letters that changed places count for little.
    """
    plain = word.lower().replace("-", "_")
    matcher = difflib.SequenceMatcher(b=plain)
    found: dict[str, float] = {}
    for choice in choices:
        other = choice.lower().replace("-", "_")
        matcher.set_seq1(other)
        if matcher.real_quick_ratio() < 0.6 or matcher.quick_ratio() < 0.6:  # bounds that take no time
            continue
        alike = matcher.ratio()
        if sorted(plain) == sorted(other):  # of which the matcher makes too much where a word is short
            alike = max(alike, 0.75)
        if alike >= 0.6:
            found[choice] = alike
    return found


def value_problems(value: Any, annotation: Annotation, key: str) -> list[Problem]:
    """What is wrong with `value` under `annotation`; an empty list when nothing is."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if annotation is Any or annotation is inspect.Parameter.empty:
        return []
    if origin is Annotated:
        found = value_problems(value, arguments[0], key)
        ranges = [extra for extra in arguments[1:] if isinstance(extra, Range)]
        if not found and isinstance(value, (int, float)) and not isinstance(value, bool):
            finite = "" if abs(value) < math.inf else " and finite"
            found = [Problem(key, f"got {value!r}, expected {r}{finite}") for r in ranges if not r.admits(value)]
        return found
    if origin in (Union, types.UnionType):
        attempts = [value_problems(value, option, key) for option in _plain_options(arguments)]
        if not attempts or not all(attempts):
            return []
        # The option that the value nearly fits says more than the list of all of them.
        deeper = [found for found in attempts if any(p.key != key or "expected at" in p.message for p in found)]
        return deeper[0] if deeper else [_mismatch(value, annotation, key)]
    if origin is Literal:
        if any(value == choice and type(value) is type(choice) for choice in arguments):
            return []
        if isinstance(value, str) and all(isinstance(choice, str) for choice in arguments):
            hint = f"; {suggestion(value, arguments)}" if likeness(value, arguments) else ""
            return [Problem(key, f"got {value!r}, expected {describe(annotation)}{hint}")]
        return [_mismatch(value, annotation, key)]
    if dataclasses.is_dataclass(annotation):
        if not isinstance(value, Mapping):
            return [_mismatch(value, annotation, key)]
        return argument_problems(cast(type, annotation), value, key)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            return [_mismatch(value, annotation, key)]
        return [p for name, item in value.items() for p in value_problems(item, arguments[1], join(key, str(name)))]
    if isinstance(origin, type) and issubclass(origin, Collection):
        return _items_problems(value, annotation, key)
    return [] if _is_instance(value, annotation) else [_mismatch(value, annotation, key)]


def argument_problems(function: Callable[..., Any], arguments: Mapping[str, Any], key: str = "") -> list[Problem]:
    """What is wrong with calling `function` (or constructing the class) with these keyword arguments.

    Unknown names, missing ones and values that do not fit their annotation are all reported.
    """
    known = parameters(function)
    hints = _hints(function)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in known.values())
    named = {n: p for n, p in known.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    found: list[Problem] = []
    for name, value in arguments.items():
        if name in named:
            found += value_problems(value, hints.get(name, Any), join(key, name))
        elif not takes_any:
            found.append(Problem(join(key, str(name)), f"unknown key; {suggestion(str(name), named)}"))
    for name, parameter in named.items():
        if parameter.default is parameter.empty and name not in arguments:
            found.append(Problem(join(key, name), f"missing; expected {describe(hints.get(name, Any))}"))
    return found


def join(*keys: str) -> str:
    """The dotted path of nested keys; empty parts drop out."""
    return ".".join(key for key in keys if key)


def describe(annotation: Annotation) -> str:
    """An annotation in a user's words: `a list of whole numbers`, `one of 'a', 'b'`."""
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if annotation in _WORDS:
        return _WORDS[annotation]
    if origin is Annotated:
        ranges = "".join(f" {extra}" for extra in arguments[1:] if isinstance(extra, Range))
        return describe(arguments[0]) + ranges
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(option) for option in _plain_options(arguments)))
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if isinstance(origin, type) and issubclass(origin, Mapping) or dataclasses.is_dataclass(annotation):
        return "a mapping"
    if isinstance(origin, type) and issubclass(origin, Collection):
        if origin is tuple and Ellipsis not in arguments:
            return f"a list of {len(arguments)} values"
        return f"a list, each {describe(arguments[0])}" if arguments else "a list"
    return getattr(annotation, "__name__", str(annotation))


_WORDS: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    list: "a list",
    dict: "a mapping",
    Any: "any value",
}
_PLAIN = (int, float, bool, str, type(None), list, dict, tuple)


def _mismatch(value: Any, annotation: Annotation, key: str) -> Problem:
    kind = "" if value is None else f" ({describe(type(value))})"
    return Problem(key, f"got {_short(value)}{kind}, expected {describe(annotation)}")


def _short(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_instance(value: Any, annotation: Annotation) -> bool:
    if annotation is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if annotation is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if annotation is None:
        return value is None
    if not isinstance(annotation, type):
        return True
    if issubclass(annotation, (list, tuple)):
        return isinstance(value, (list, tuple))
    return isinstance(value, annotation)


def _items_problems(value: Any, annotation: Annotation, key: str) -> list[Problem]:
    """Problems of a list; a tuple of fixed length checks its length too."""
    arguments = typing.get_args(annotation)
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        return [_mismatch(value, annotation, key)]
    if typing.get_origin(annotation) is tuple and Ellipsis not in arguments:
        if len(value) != len(arguments):
            return [_mismatch(value, annotation, key)]
        kinds: Sequence[Annotation] = arguments
    else:
        kinds = [arguments[0]] * len(value)
    pairs = zip(value, kinds, strict=True)
    return [p for i, (item, kind) in enumerate(pairs) for p in value_problems(item, kind, f"{key}[{i}]")]


def _plain_options(options: Iterable[Annotation]) -> list[Annotation]:
    """The options of a union that a plain value can be: Python-only classes (a Strategy, say) drop out."""
    return [o for o in options if typing.get_origin(o) is not None or o in _PLAIN or dataclasses.is_dataclass(o)]


@lru_cache(maxsize=1024)
def parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """What a function, or a class's constructor, can be called with."""
    return inspect.signature(function).parameters


@lru_cache(maxsize=1024)
def _hints(function: Callable[..., Any]) -> Mapping[str, Annotation]:
    """Resolved annotations; what cannot be resolved counts as Any."""
    target = function
    if isinstance(function, type) and not dataclasses.is_dataclass(function):
        target = function.__init__
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, TypeError):
        return {}
