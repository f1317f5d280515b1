"""Recipe files and `key.path=value` items as layers: plain values, and the place where each of them stands.

How YAML is read is recipe_yaml's business; no key is judged here.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from longnet_kit import durable, typed
from longnet_kit.errors import UserError
from longnet_kit.recipe_yaml import DEPTH, Excess, Problem, Reader, reason
from longnet_kit.recipe_yaml import place as place_of

COMMAND_LINE = "on the command line"
SIZE = 1 << 20
"""How large a recipe file may be, in bytes."""


@dataclass
class Layer:
    """The settings of one file, or of the command line."""

    values: dict[str, Any] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)
    """`file:line` of each dotted key; of each item of a list too, as `key[0]`."""
    folder: Path | None = None
    """Where the file is."""


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
        if not os.path.isfile(below):  # also where no file can have such a name
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
        text = durable.read(path, SIZE).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        byte = error.object[error.start]
        return None, [Problem("", f"{name}:{line}", f"is not UTF-8 text (byte 0x{byte:02x}); save the file as UTF-8")]
    except OSError as error:
        if error.errno == errno.EFBIG:
            return None, [Problem("", name, f"is larger than {SIZE:,} bytes, so it is no recipe")]
        return None, [Problem("", name, f"cannot be read: {error.strerror}")]
    return read_text(text, name, path.parent)


def read_text(text: str, name: str, folder: Path) -> tuple[Layer | None, list[Problem]]:
    """A recipe's text, which problems call `name`, as if it stood in a file in the folder."""
    reader = Reader(name)
    try:
        values = reader.read(text)
    except yaml.YAMLError as error:
        return None, [Problem("", place_of(name, error), f"is not valid YAML: {reason(error)}")]
    except Excess as error:
        return None, [Problem("", name, str(error))]
    if values is None:
        needed = "a recipe has at least name and trainer.max_steps"
        return None, [*reader.problems, Problem("", name, f"is empty; {needed}, or extends another recipe")]
    if not isinstance(values, dict):
        kind = typed.describe(type(values))
        return None, [*reader.problems, Problem("", name, f"holds {kind}, expected `key: value` lines at the top")]
    return Layer(values, reader.places, folder), reader.problems


def parse_dotlist(items: Sequence[str]) -> tuple[Layer, list[Problem]]:
    """`key.path=value` items as one layer, later ones first in rank; values are YAML."""
    layer = Layer()
    problems: list[Problem] = []
    for item in items:
        key, equals, text = item.partition("=")
        reader = Reader(COMMAND_LINE, lines=False)
        try:
            _check_path(key, bool(equals), item)
            value = reader.read(text, key)
        except UserError as error:
            problems.append(Problem(key if equals else "", COMMAND_LINE, str(error)))
            continue
        except yaml.YAMLError as error:
            quoted = """'key=["*.py"]'""" if text.startswith("[") else """'key="*.py"'"""
            message = f"got {text!r}, which is not a YAML value ({reason(error)}); quote text, as in {quoted}"
            problems.append(Problem(key, COMMAND_LINE, message))
            continue
        problems += reader.problems
        names = key.split(".")
        _assign(layer.values, names, value)
        around = {".".join(names[: i + 1]): COMMAND_LINE for i in range(len(names))}
        layer.places |= reader.places | around
    return layer, problems


def _check_path(key: str, has_value: bool, item: str) -> None:
    """Raise a UserError unless `key` is a dotted path that a value can be given to."""
    if not has_value:
        raise UserError(f"got {item!r}, expected key.path=value, like model.layers=2")
    if key.count(".") >= DEPTH:
        raise UserError(f"has more than {DEPTH} names with dots between them")
    if key == "extends":
        raise UserError("only a recipe file can extend another; name that recipe in place of this one")
    if "[" in key or re.search(r"\.\d+(\.|$)", key):
        whole = re.split(r"\[|\.\d", key)[0]
        raise UserError(f"the items of a list have no keys; give the whole list, like '{whole}=[1, 2]'")
    if not re.fullmatch(r"\w+(\.\w+)*", key):
        bare = re.sub(r"^[-+~]+", "", key)
        hint = f"; write {bare}=..." if re.fullmatch(r"\w+(\.\w+)*", bare) else ", like model.layers=2"
        raise UserError(f"got the key {key!r}, expected names with dots between them{hint}")


def _assign(values: dict[str, Any], path: Sequence[str], value: Any) -> None:
    for name in path[:-1]:
        if not isinstance(values.get(name), dict):
            values[name] = {}
        values = values[name]
    values[path[-1]] = value


def _similar(path: Path) -> str:
    """A hint at a recipe file beside `path` of nearly its name."""
    present = _recipes_in(path.parent)
    near = difflib.get_close_matches(path.name, present, n=1) or difflib.get_close_matches(
        f"{path.name}.yaml", present, n=1
    )
    if near:
        return f"; did you mean {show(path.parent / near[0])}?"
    return f"; {show(path.parent)} holds {', '.join(sorted(present))}" if present else ""


def _recipes_in(folder: Path) -> list[str]:
    try:
        return [name for name in os.listdir(folder) if name.endswith((".yaml", ".yml"))]
    except (OSError, ValueError):  # there is no such folder, or none can have such a name
        return []


def show(path: Path) -> str:
    """The path in a message: without detours, and relative to the working directory where it is inside."""
    here = Path().resolve()
    return os.path.relpath(path) if path.is_absolute() and path.is_relative_to(here) else os.path.normpath(path)
