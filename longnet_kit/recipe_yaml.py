"""YAML as recipes use it: plain values and where each of them stands, and text that reads back as it was.

The YAML is 1.1 as PyYAML reads it, except that 3e-3 is a number, that 010 and 2024-01-01 and 1:30 are text, that tags
are refused, that a key which stands twice is a problem, and that there are limits to size. No key is judged here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from longnet_kit import typed
from longnet_kit.errors import UserError


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a recipe: the key, where it stands, and what came and what would do."""

    key: str
    place: str
    message: str

    def __str__(self) -> str:
        head = f"{self.key} ({self.place})" if self.key and self.place else self.key or self.place
        return f"{head}: {self.message}" if head else self.message


DEPTH = 50
"""How deep mappings and lists may be nested."""
VALUES = 10_000
"""How many values a document may hold; an alias counts as all that it stands for."""
_DIGITS = 1000


class Excess(UserError):
    """A document that is larger than any recipe."""


class Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the kit's idea of numbers, and of how large a document may be."""

    _depth = _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        self._nodes += 1
        check_size(self._depth, self._nodes)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def check_size(depth: int, values: int) -> None:
    """Raise `Excess` where a document is nested too deeply or holds too much."""
    if depth > DEPTH:
        raise Excess(f"is nested more than {DEPTH} deep; a recipe needs 4")
    if values > VALUES:
        raise Excess(f"holds more than {VALUES:,} values, each alias counted in full; a recipe needs a few dozen")


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


class Reader:
    """Turns YAML nodes into plain values and notes where each stands."""

    def __init__(self, name: str, lines: bool = True) -> None:
        self.name = name
        self.lines = lines
        self.places: dict[str, str] = {}
        self.problems: list[Problem] = []
        self._values = 0
        self._open: list[yaml.Node] = []
        self._merging: list[yaml.Node] = []
        self._pairs_of: dict[yaml.Node, Pairs] = {}

    def read(self, text: str, key: str = "") -> Any:
        """The values of one document; YAMLError where it is not YAML, `Excess` where it is too large.

        Args:
            key: what the document is the value of.
        """
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
        self._values += 1
        self._open.append(node)
        check_size(len(self._open), self._values)
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
        values: dict[str, Any] = {}
        for name, (key_node, value_node) in self._pairs(node, key).items():
            path = typed.join(key, name)
            self.places[path] = self._place(key_node)
            if not _is_whole_text(name):
                self._complain(path, key_node, _HALF)
            values[name] = self._value(value_node, path)
        return values

    def _pairs(self, node: yaml.MappingNode, key: str) -> Pairs:
        """The keys of a mapping by name, and their values; what `<<` brings in stands below its own."""
        if node in self._pairs_of:  # an alias is met again
            return self._pairs_of[node]
        self._merging.append(node)
        self._check_keys(node, key)
        brought: Pairs = {}
        own: Pairs = {}
        for key_node, value_node in node.value:
            if key_node.tag != "tag:yaml.org,2002:merge":
                own[self._name(key_node)] = key_node, value_node
                continue
            merged = value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            for below in reversed(merged):  # the first of them wins
                if below in self._merging:
                    self._complain(typed.join(key, "<<"), below, "an alias that holds itself")
                elif isinstance(below, yaml.MappingNode):
                    brought |= self._pairs(below, key)
                    self._values += len(brought)
                    check_size(0, self._values)
                else:
                    self._complain(typed.join(key, "<<"), below, "expected a mapping to merge, or a list of them")
        self._merging.pop()
        self._pairs_of[node] = brought | own
        return self._pairs_of[node]

    def _check_keys(self, node: yaml.MappingNode, key: str) -> None:
        first: dict[str, str] = {}
        for key_node, _ in node.value:
            name, place = self._name(key_node), self._place(key_node)
            if name in first and name != "<<":
                message = f"stands twice in one mapping, first at {first[name]}; keep one of them"
                self.problems.append(Problem(typed.join(key, name), place, message))
            first.setdefault(name, place)

    def _scalar(self, node: yaml.Node, key: str) -> Any:
        self._check_tag(node, key, "str", "int", "float", "bool", "null")
        try:
            value = self._loader.construct_object(node)
        except (ValueError, LookupError):  # LookupError: of what is no boolean, and of a number without a digit
            self._complain(key, node, f"{node.value[:60]!r} is not of the type that its tag says")
            return None
        if isinstance(value, int) and len(node.value) > _DIGITS:
            self._complain(key, node, f"has {len(node.value):,} digits")
            return None
        if isinstance(value, str) and not _is_whole_text(value):
            self._complain(key, node, _HALF)
            return None
        return value

    def _check_tag(self, node: yaml.Node, key: str, *allowed: str) -> None:
        kind = node.tag.removeprefix("tag:yaml.org,2002:")
        if kind not in allowed:
            # Left as it is, the node would be built by whatever the tag names.
            node.tag = f"tag:yaml.org,2002:{allowed[0]}"
            tag = f"!!{kind}" if kind.isalpha() else kind
            self._complain(key, node, f"the YAML tag {tag} is not allowed; leave it out")

    def _name(self, node: yaml.Node) -> str:
        """A key as text, whatever it is."""
        if isinstance(node, yaml.ScalarNode):
            return str(node.value)
        return "{...}" if isinstance(node, yaml.MappingNode) else "[...]"

    def _place(self, node: yaml.Node) -> str:
        return f"{self.name}:{node.start_mark.line + 1}" if self.lines else self.name

    def _complain(self, key: str, node: yaml.Node, message: str) -> None:
        self.problems.append(Problem(key, self._place(node), message))


Pairs = dict[str, tuple[yaml.Node, yaml.Node]]

_HALF = "holds half a character (a lone surrogate, as in \\ud800), which no file can; write the whole one"


def _is_whole_text(text: str) -> bool:
    return not re.search("[\ud800-\udfff]", text)


def reason(error: yaml.YAMLError) -> str:
    """What PyYAML found, in one short line."""
    if isinstance(error, yaml.MarkedYAMLError):
        parts = [part for part in (error.context, error.problem) if part]
        found = ": ".join(parts) or "syntax error"
        return f"{found} (indent with spaces)" if "'\\t'" in found else found
    return str(getattr(error, "reason", error)).splitlines()[0]


def place(name: str, error: yaml.YAMLError) -> str:
    """`name:line` of what PyYAML found, as far as it says."""
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    return f"{name}:{mark.line + 1}" if mark is not None else name
