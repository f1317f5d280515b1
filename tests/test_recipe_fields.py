"""Every key that a recipe can have, misspelled, mistyped and out of range: told by its full name and line, before
anything is built.

The cases are drawn up from the schema, the Trainer's signature and the registries: a new key or plug-in is among them
by itself.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, NoReturn

import pytest
from lightning import Trainer

from longnet_kit import attention, data, model, recipe, recipe_schema, tasks, typed
from longnet_kit.attention import patterns
from longnet_kit.errors import UserError

Values = dict[str, Any]

FREE_TEXT = {"description", "trainer.model_registry"}
"""Keys outside of plug-ins that take any text. Every other one names something, and must refuse what is not there."""


# --- which keys there are


class Field(NamedTuple):
    """A key, what it may be, and the recipe around it."""

    key: str
    annotation: Any
    around: Values
    """Its dotted keys and their values."""
    choices: tuple[str, ...] = ()
    """What a text may name."""
    free: bool = False
    """Whether a text may be anything."""


def plain_fields() -> Iterator[Field]:
    """Of the schema: the top level, the sections, and the Trainer's arguments."""
    around = {"name": "x", "trainer.max_steps": 5}
    named = {"task": tuple(tasks.names()), "strategy.name": recipe_schema.STRATEGIES}
    hints = typing.get_type_hints(recipe_schema.Recipe, include_extras=True)
    found = {key: hints[key] for key in recipe_schema.names(recipe_schema.Recipe)}
    for section, cls in recipe_schema.SECTIONS.items():
        hints = typing.get_type_hints(cls, include_extras=True)
        found |= {f"{section}.{key}": hints[key] for key in recipe_schema.names(cls)}
    own = typing.get_type_hints(Trainer.__init__)
    for argument in inspect.signature(Trainer).parameters:
        if argument not in recipe_schema.TRAINER_REFUSED:
            found[f"trainer.{argument}"] = recipe_schema.TRAINER_TYPES.get(argument, own[argument])
    for key, annotation in found.items():
        section, _, name = key.rpartition(".")
        if recipe_schema.SELECTORS.get(section) != name or key in named:  # else it is with its plug-ins
            yield Field(key, annotation, around, named.get(key, ()), key in FREE_TEXT)
        for option in options_of(annotation):
            if dataclasses.is_dataclass(option) and key not in recipe_schema.SECTIONS:
                inner = typing.get_type_hints(option, include_extras=True)
                yield from (Field(f"{key}.{name}", inner[name], around) for name in inner)


def plugin_fields() -> Iterator[Field]:
    """The constructor arguments of everything registered that a recipe can choose, and the choices themselves."""
    below: Values = {"name": "x", "trainer.max_steps": 5}
    attention_patterns = {**below, "model.attention.backend": "naive"}
    for registry, section, around in (
        (attention.registry, "model.attention", below),
        (data.registry, "data", below),
        (patterns.registry, "model.attention.pattern", attention_patterns),
    ):
        assert recipe_schema.SELECTORS[section] == registry.selector
        selector = f"{section}.{registry.selector}"
        chosen = around
        for name in registry.names():
            parameters = inspect.signature(registry.get(name)).parameters
            hints = typing.get_type_hints(registry.get(name).__init__, include_extras=True)
            needed = {k: example_of(hints[k]) for k, p in parameters.items() if p.default is p.empty}
            chosen = {**around, selector: name, **{f"{section}.{k}": value for k, value in needed.items()}}
            if registry is data.registry:
                chosen["task"] = task_for(registry.get(name).supplies)
            yield from (Field(f"{section}.{k}", hints[k], chosen, free=True) for k in parameters)
        yield Field(selector, str, chosen, tuple(registry.names()))


def task_for(supplies: str) -> str:
    """The first task that can be trained on what a source supplies; language modelling where it can."""
    return next(n for n in ["language_modeling", *tasks.names()] if supplies in tasks.registry.get(n).takes)


def example_of(annotation: Any) -> Any:
    """A value that a required argument takes."""
    if typing.get_origin(annotation) is Annotated:
        (limits,) = (extra for extra in annotation.__metadata__ if isinstance(extra, typed.Range))
        return max(1, limits.at_least or 0)
    return [example_of(typing.get_args(annotation)[0])] if "list" in kinds(annotation) else "text"


# --- what would be wrong

SAMPLES: Values = {
    "text": "no such thing",
    "whole": 7,
    "fraction": 7.5,
    "bool": True,
    "null": None,
    "list": [[]],
    "mapping": {"stray": 1},
}
"""A value of each plain type."""


def kinds(annotation: Any) -> set[str]:
    """The plain types that an annotation allows."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is Any:
        return set(SAMPLES)
    if origin is Annotated:
        return kinds(arguments[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*map(kinds, arguments))
    if origin is Literal:
        return set().union(*(kinds(type(choice)) for choice in arguments))
    base = origin or annotation
    if dataclasses.is_dataclass(base) or issubclass(base, Mapping):
        return {"mapping"}
    if issubclass(base, str):
        return {"text"}
    if issubclass(base, Collection):
        return {"list"}
    plain = {bool: {"bool"}, int: {"whole"}, float: {"whole", "fraction"}, types.NoneType: {"null"}}
    return plain.get(base, set())  # an object that a recipe cannot hold


def options_of(annotation: Any) -> list[Any]:
    """The members of a union; else the annotation itself."""
    is_union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    return list(typing.get_args(annotation)) if is_union else [annotation]


def mistyped(field: Field, annotation: Any) -> Iterator[tuple[str, Any]]:
    """Keys to be told of, and values of every type that the annotation excludes; in its lists too."""
    yield from ((field.key, SAMPLES[kind]) for kind in SAMPLES.keys() - kinds(annotation))
    for option in options_of(annotation):
        if kinds(option) == {"list"}:
            items = [item for item in typing.get_args(option) if item is not ...]
            is_tuple = typing.get_origin(option) is tuple and len(items) > 1
            right = [0.5] * len(items)
            for i, item in enumerate(items):
                for kind in SAMPLES.keys() - kinds(item):
                    value = [*right[:i], SAMPLES[kind], *right[i + 1 :]] if is_tuple else [SAMPLES[kind]]
                    yield f"{field.key}[{i if is_tuple else 0}]", value
            if is_tuple:
                yield from ((field.key, value) for value in ([], right[1:], [*right, 0.5]))


def out_of_range(field: Field, annotation: Any) -> Iterator[tuple[str, Any]]:
    """Keys to be told of, and values of the right type just beyond what the annotation, or a registry, allows."""
    for option in options_of(annotation):
        if typing.get_origin(option) is Annotated:
            yield from ((field.key, value) for value in beyond(option))
        elif kinds(option) == {"list"}:
            items = [item for item in typing.get_args(option) if item is not ...]
            for i, item in enumerate(items):
                for key, value in out_of_range(field._replace(key=f"{field.key}[{i}]"), item):
                    yield key, [0.5] * i + [value] + [0.5] * (len(items) - i - 1)
        elif typing.get_origin(option) is Literal or (option is str and not field.free):
            known = [c for c in typing.get_args(option) or field.choices if isinstance(c, str)]
            yield from ((field.key, misspelled) for c in known for misspelled in misspellings(c, known))
            yield from ((field.key, text) for text in ("", "no such thing", "\0"))


def beyond(option: Any) -> Iterator[float]:
    """Just past each bound of an `Annotated` number, and what is no number at all."""
    base, *extras = typing.get_args(option)

    def step(bound: float, towards: float) -> float:
        return math.nextafter(bound, towards) if base is float else int(bound + math.copysign(1, towards))

    for limits in extras:
        if isinstance(limits, typed.Range):
            yield from (step(b, -math.inf) for b in [limits.at_least] if b is not None)
            yield from (step(b, math.inf) for b in [limits.at_most] if b is not None)
            yield from (b if base is float else int(b) for b in (limits.above, limits.below) if b is not None)
            yield from (-math.inf, math.inf, math.nan)


def misspellings(word: str, known: Iterable[str]) -> list[str]:
    """The word with two letters swapped, one dropped, both, one doubled, and in capitals; what is no word known."""
    middle = (len(word) - 1) // 2
    swapped = word[:middle] + word[middle + 1 : middle + 2] + word[middle] + word[middle + 2 :]
    dropped = word[:middle] + word[middle + 1 :]
    both = swapped[:-1] if len(word) > 5 else ""
    doubled = word[: middle + 1] + word[middle:]
    found = dict.fromkeys([swapped, dropped, both, doubled, word.upper()])
    return [w for w in found if w and w not in known]


# --- the cases


class Case(NamedTuple):
    """A wrong setting."""

    given: str
    """The key that is set."""
    value: Any
    around: Values
    told: str
    """The key that must be named."""
    meant: str = ""
    """The name that must be suggested."""


FIELDS = [*plain_fields(), *plugin_fields()]


def misspelled_keys(field: Field) -> Iterator[Case]:
    section, _, name = field.key.rpartition(".")
    beside = [f.key.rpartition(".")[2] for f in FIELDS if f.key.rpartition(".")[0] == section]
    for wrong in misspellings(name, beside):
        key = typed.join(section, wrong)
        yield Case(key, 1, field.around, key, name)


def wrong_types(field: Field) -> Iterator[Case]:
    return (Case(field.key, value, field.around, told) for told, value in mistyped(field, field.annotation))


def wrong_choices(field: Field) -> Iterator[Case]:
    for told, value in out_of_range(field, field.annotation):
        meant = [c for c in field.choices if value in misspellings(c, field.choices)]
        yield Case(field.key, value, field.around, told, "".join(meant[:1]))


def each_field(make: Callable[[Field], Iterator[Case]]) -> pytest.MarkDecorator:
    """A test for each field that there are such cases of."""
    drawn = {f"{field.key}-{i}": list(make(field)) for i, field in enumerate(FIELDS)}
    return pytest.mark.parametrize("cases", [pytest.param(cases, id=key) for key, cases in drawn.items() if cases])


@pytest.fixture(scope="module", autouse=True)
def nothing_built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Whoever makes a model, a source or a Trainer, or leaves a file behind, fails."""

    def refuse(*_: Any, **__: Any) -> NoReturn:
        raise AssertionError("something was built")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("desk"))
        patch.setattr(model, "build", refuse)
        patch.setattr(Trainer, "__init__", functools.wraps(Trainer.__init__)(refuse))  # still says what it takes
        for registry in (data.registry, tasks.registry):
            patch.setattr(registry, "build", refuse)
        yield
        assert [path.name for path in Path().iterdir()] == ["wrong.yaml"]


def written(settings: Mapping[str, Any]) -> dict[str, int]:
    """Write dotted keys as a recipe file, each on a line of its own; returns the lines by the keys."""
    nested: Values = {}
    for key, value in settings.items():
        *sections, name = key.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = Leaf(value)
    lines: list[str] = []
    places: dict[str, int] = {}

    def write(values: Values, path: str, indent: str) -> None:
        for name, value in values.items():
            key = typed.join(path, name)
            lines.append(f"{indent}{name}: {plain(value.value) if isinstance(value, Leaf) else ''}\n")
            places[key] = len(lines)
            if not isinstance(value, Leaf):
                write(value, key, indent + "  ")

    write(nested, "", "")
    Path("wrong.yaml").write_text("".join(lines), encoding="utf-8")
    return places


class Leaf(NamedTuple):
    """A value as it stands on one line, whatever it holds."""

    value: Any


def plain(value: Any) -> str:
    """A value in YAML, on one line."""
    text = json.dumps(value)
    return text if isinstance(value, str) else re.sub(r"NaN|-?Infinity", lambda m: YAML_NUMBERS[m[0]], text)


YAML_NUMBERS = {"NaN": ".nan", "Infinity": ".inf", "-Infinity": "-.inf"}


def check(case: Case, place: str, overrides: list[str]) -> None:
    """Hold a refusal to what it must say."""
    with pytest.raises(recipe.RecipeError) as caught:
        loaded = recipe.load("wrong.yaml", overrides)
        pytest.fail(f"{case} was taken: {loaded}")
    message = str(caught.value)
    assert f"{case.told} ({place}): " in message
    assert "problems" not in message, "one cause, one problem"
    assert isinstance(caught.value, UserError)
    if case.meant:
        name = re.escape(case.meant)
        assert re.search(rf"did you mean '?([\w.]+\.)?{name}'?\?", message)


def in_the_file(cases: list[Case]) -> None:
    for case in cases:
        beside = {key: value for key, value in case.around.items() if not f"{key}.".startswith(f"{case.given}.")}
        places = written(beside | {case.given: case.value})
        check(case, f"wrong.yaml:{places[case.given]}", [])


def on_the_command_line(cases: list[Case]) -> None:
    written(cases[0].around)
    for case in cases:
        check(case, "on the command line", [f"{case.given}={plain(case.value)}"])


BOTH = pytest.mark.parametrize("where", [in_the_file, on_the_command_line])
Where = Callable[[list[Case]], None]


@BOTH
@each_field(misspelled_keys)
def test_a_misspelled_key_is_told_with_the_right_one(where: Where, cases: list[Case]) -> None:
    where(cases)


@BOTH
@each_field(wrong_types)
def test_a_value_of_the_wrong_type_is_told(where: Where, cases: list[Case]) -> None:
    where(cases)


@BOTH
@each_field(wrong_choices)
def test_a_value_out_of_range_is_told(where: Where, cases: list[Case]) -> None:
    where(cases)


@pytest.mark.parametrize("field", [pytest.param(f, id=f"{f.key}-{i}") for i, f in enumerate(FIELDS)])
def test_the_recipe_around_each_wrong_key_is_a_right_one(field: Field) -> None:
    """Else the others would fail for a reason of their own."""
    written(field.around)
    recipe.load("wrong.yaml")
