"""Recipe files and `key.path=value` items as layers: plain values, and the place where each of them stands.

The YAML is 1.1 as PyYAML reads it, except that 3e-3 is a number, 010 and 2024-01-01 and 1:30 are text, and a key that
stands twice is an error. No key is judged here.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longnet_kit import typed

COMMAND_LINE = "on the command line"


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the key, where it stands, and what came and what would do."""

    key: str
    place: str
    message: str

    def __str__(self) -> str:
        head = f"{self.key} ({self.place})" if self.key and self.place else self.key or self.place
        return f"{head}: {self.message}" if head else self.message


@dataclass
class Layer:
    """The settings of one file, or of the command line."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """`file:line` of each dotted key; of each item of a list too, as `key[0]`."""
    folder: Path | None = None
    """Where the file is."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the kit's idea of numbers."""


class Dumper(yaml.SafeDumper):
    """Writes what `Loader` reads back as it was: it quotes text that would be taken for a number, and no more."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def text(self, value: str) -> yaml.ScalarNode:
        """PyYAML writes these characters bare, and takes them for line ends when it reads them."""
        style = '"' if re.search("[\x85\u2028\u2029]", value) else None
        return self.represent_scalar("tag:yaml.org,2002:str", value, style=style)


Dumper.add_representer(str, Dumper.text)

_NUMBERS = (
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+", "-+0123456789"),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", "-+."),
)
_KEPT = {f"tag:yaml.org,2002:{kind}" for kind in ("bool", "null", "merge")}
for _class in (Loader, Dumper):
    _class.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag in _KEPT]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    for _kind, _pattern, _first in _NUMBERS:
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"^(?:{_pattern})$"), list(_first))


def read_chain(path: Path) -> tuple[list[Layer], list[Problem], bool]:
    """A recipe file and all that it extends.

    Returns:
        The layers, lowest first; what is wrong with the files as files; and whether every layer could be read.
    """
    layers: list[Layer] = []
    problems: list[Problem] = []
    seen: list[Path] = []
    while True:
        layer, found = read_file(path)
        problems += found
        if layer is None:
            return layers, problems, False
        layers.insert(0, layer)
        seen.append(path)
        parent = layer.values.get("extends")
        if parent is None:
            return layers, problems, True
        place = layer.places["extends"]
        if not isinstance(parent, str):
            problems.append(Problem("extends", place, f"got {parent!r}, expected the path of one recipe, or null"))
            return layers, problems, False
        below = path.parent / parent
        if not below.is_file():
            problems.append(Problem("extends", place, f"there is no file {show(below)}{_similar(below)}"))
            return layers, problems, False
        if any(below.samefile(other) for other in seen):
            chain = " -> ".join(show(p) for p in (*seen, below))
            problems.append(Problem("extends", place, f"recipes extend each other in a circle: {chain}"))
            return layers, problems, False
        path = below


def read_file(path: Path) -> tuple[Layer | None, list[Problem]]:
    """One recipe file; no layer when it cannot be read at all."""
    name = show(path)
    if path.is_dir():
        inside = path / "recipe.yaml"
        hint = f"; did you mean {show(inside)}?" if inside.is_file() else ""
        return None, [Problem("", name, f"is a directory, expected a recipe file (YAML){hint}")]
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        return None, [Problem("", f"{name}:{line}", f"is not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8")]
    except OSError as error:
        return None, [Problem("", name, f"cannot be read: {error.strerror}")]
    reader = _Reader(name)
    try:
        values = reader.read(text)
    except yaml.YAMLError as error:
        return None, [Problem("", _error_place(name, error), f"is not valid YAML: {_reason(error)}")]
    except RecursionError:
        return None, [Problem("", name, "is nested too deeply")]
    if values is None:
        needed = "a recipe has at least name and trainer.max_steps"
        return None, [*reader.problems, Problem("", name, f"is empty; {needed}, or extends another recipe")]
    if not isinstance(values, dict):
        kind = typed.describe(type(values))
        return None, [*reader.problems, Problem("", name, f"holds {kind}, expected `key: value` lines at the top")]
    return Layer(values, reader.places, path.parent), reader.problems


def parse_dotlist(items: Sequence[str]) -> tuple[Layer, list[Problem]]:
    """`key.path=value` items as one layer, later ones first in rank; values are YAML."""
    layer = Layer()
    problems: list[Problem] = []
    for item in items:
        key, equals, text = item.partition("=")
        reader = _Reader(COMMAND_LINE, lines=False)
        try:
            _check_path(key, bool(equals), item)
            value = reader.read(text, key)
        except ValueError as error:
            problems.append(Problem(key if equals else "", COMMAND_LINE, str(error)))
            continue
        except yaml.YAMLError as error:
            quoted = """'key=["*.py"]'""" if text.startswith("[") else """'key="*.py"'"""
            message = f"got {text!r}, which is not a YAML value ({_reason(error)}); quote text, as in {quoted}"
            problems.append(Problem(key, COMMAND_LINE, message))
            continue
        problems += reader.problems
        names = key.split(".")
        _assign(layer.values, names, value)
        around = {".".join(names[: i + 1]): COMMAND_LINE for i in range(len(names))}
        layer.places |= reader.places | around
    return layer, problems


class _Reader:
    """Turns YAML nodes into plain values and notes where each stands."""

    def __init__(self, name: str, lines: bool = True) -> None:
        self.name = name
        self.lines = lines
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []
        self._open: list[yaml.Node] = []

    def read(self, text: str, key: str = "") -> Any:
        self._loader = Loader(text)
        try:
            node = self._loader.get_single_node()
            return None if node is None else self._value(node, key)
        finally:
            self._loader.dispose()

    def _value(self, node: yaml.Node, key: str) -> Any:
        if node in self._open:
            self._complain(key, node, "an alias that holds itself")
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, key)
            if isinstance(node, yaml.SequenceNode):
                self._check_tag(node, key, "seq")
                items = []
                for i, item in enumerate(node.value):
                    self.places[f"{key}[{i}]"] = self._place(item)
                    items.append(self._value(item, f"{key}[{i}]"))
                return items
            return self._scalar(node, key)
        finally:
            self._open.pop()

    def _mapping(self, node: yaml.MappingNode, key: str) -> dict[str, Any]:
        self._check_tag(node, key, "map")
        first: dict[str, str] = {}
        for key_node, _ in node.value:
            name = self._name(key_node)
            if name in first and name != "<<":
                path = typed.join(key, name)
                message = f"stands twice in one mapping, first at {first[name]}; keep one of them"
                self.problems.append(Problem(path, self._place(key_node), message))
            first.setdefault(name, self._place(key_node))
        self._loader.flatten_mapping(node)  # puts what `<<` brings in first
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            name = self._name(key_node)
            path = typed.join(key, name)
            self.places[path] = self._place(key_node)
            values[name] = self._value(value_node, path)
        return values

    def _scalar(self, node: yaml.Node, key: str) -> Any:
        self._check_tag(node, key, "str", "int", "float", "bool", "null")
        try:
            return self._loader.construct_object(node)
        except ValueError:
            self._complain(key, node, f"{node.value[:60]!r} is not of the type that its tag says")
            return None

    def _check_tag(self, node: yaml.Node, key: str, *allowed: str) -> None:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in allowed:
            # Left as it is, the node would be built by whatever the tag names.
            node.tag = f"tag:yaml.org,2002:{allowed[0]}"
            self._complain(
                key, node, f"the YAML tag {'!' * 2 + kind if kind.isalpha() else kind} is not allowed; leave it out"
            )

    def _name(self, node: yaml.Node) -> str:
        return str(node.value) if isinstance(node, yaml.ScalarNode) else yaml.serialize(node).strip()

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines else self.name

    def _complain(self, key: str, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(key, self._place(node), message))


def _check_path(key: str, has_value: bool, item: str) -> None:
    """Raise a ValueError unless `key` is a dotted path that a value can be given to."""
    if not has_value:
        raise ValueError(f"got {item!r}, expected key.path=value, like model.layers=2")
    if key in ("extends",):
        raise ValueError("only a recipe file can extend another; name that recipe in place of this one")
    if "[" in key or re.search(r"\.\d+(\.|$)", key):
        whole = re.split(r"\[|\.\d", key)[0]
        raise ValueError(f"the items of a list have no keys; give the whole list, like '{whole}=[1, 2]'")
    if not re.fullmatch(r"\w+(\.\w+)*", key):
        bare = re.sub(r"^[-+~]+", "", key)
        hint = f"; write {bare}=..." if re.fullmatch(r"\w+(\.\w+)*", bare) else ", like model.layers=2"
        raise ValueError(f"got the key {key!r}, expected names with dots between them{hint}")


def _assign(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value


def _reason(error: yaml.YAMLError) -> str:
    """What PyYAML found, in one short line."""
    if isinstance(error, yaml.MarkedYAMLError):
        parts = [part for part in (error.context, error.problem) if part]
        reason = ": ".join(parts) or "syntax error"
        return f"{reason} (indent with spaces)" if "'\\t'" in reason else reason
    return str(getattr(error, "reason", error)).splitlines()[0]


def _error_place(name: str, error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f"{name}:{mark.line + 1}" if mark is not None else name


def _similar(path: Path) -> str:
    """A hint at a recipe file beside `path` of nearly its name."""
    present = {p.name for p in _recipes_in(path.parent)}
    near = difflib.get_close_matches(path.name, present, n=1) or difflib.get_close_matches(
        f"{path.name}.yaml", present, n=1
    )
    if near:
        return f"; did you mean {show(path.with_name(near[0]))}?"
    return f"; {show(path.parent)} holds {', '.join(sorted(present))}" if present else ""


def _recipes_in(folder: Path) -> Iterator[Path]:
    return (p for p in folder.glob("*") if p.suffix in (".yaml", ".yml"))


def show(path: Path) -> str:
    """The path in a message: without detours, and relative to the working directory where it is inside."""
    here = Path().resolve()
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(here) else os.path.normpath(path)
