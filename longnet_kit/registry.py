"""A registry of named classes, chosen by one key of a recipe: attention backends, data sources, tasks.

Registering a taken name raises. Packages add names through a Python entry-point group, loaded on first use;
one that cannot be loaded only harms who asks for it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from longnet_kit import typed
from longnet_kit.errors import UserError

T = TypeVar("T")
C = TypeVar("C", bound=type)


class Registry(Generic[T]):
    """Classes by name.

    Args:
        kind: what the names stand for, in the words of an error message ("attention backend").
        selector: the recipe key that holds the name ("backend").
        group: the entry-point group whose entries register further names when loaded; None for none.
    """

    def __init__(self, kind: str, selector: str, group: str | None = None) -> None:
        self.kind = kind
        self.selector = selector
        self.group = group
        self._classes: dict[str, type[T]] = {}
        self._broken: dict[str, str] = {}  # entry points that could not be loaded, and why
        self._entry_points_loaded = False

    def register(self, name: str) -> Callable[[C], C]:
        """A class decorator that enters the class under `name`; UserError when the name is taken."""

        def enter(cls: C) -> C:
            if name in self._classes:
                taken = self._classes[name]
                raise UserError(
                    f"{self.kind} {name!r} is already registered by {taken.__module__}.{taken.__qualname__}; "
                    f"choose another name for {cls.__module__}.{cls.__qualname__}"
                )
            self._classes[name] = cast(type[T], cls)
            return cls

        return enter

    def names(self) -> list[str]:
        """Every registered name that can be had, sorted as people read them (`a2` before `a10`)."""
        self._load_entry_points()
        usable = self._classes.keys() - self._broken.keys()
        return sorted(usable, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])

    def get(self, name: str) -> type[T]:
        """The class under `name`; UserError that names the nearest one, or says why it is broken."""
        refusal = self.refusal(name)
        if refusal:
            raise UserError(refusal)
        return self._classes[name]

    def name_of(self, cls: type[T]) -> str | None:
        """The name of a class, if it has one."""
        return next((name for name, own in self._classes.items() if own is cls), None)

    def refusal(self, name: str) -> str:
        """Why there is no class under `name`, and what to do; empty when there is one."""
        self._load_entry_points()
        if not isinstance(name, str):  # what a mapping from Python holds may not even be hashable
            return f"got {name!r}, which is no {self.kind}; known: {', '.join(self.names())}"
        if name in self._broken:
            return f"the {self.kind} {name!r} cannot be had: {self._broken[name]}"
        if name in self._classes:
            return ""
        lost = f" (nor could all be loaded: {'; '.join(self._broken.values())})" if self._broken else ""
        hint = "a plug-in's name is known once its module is listed under imports:"
        return f"unknown {self.kind} {name!r}; {typed.suggestion(str(name), self.names())}{lost}; {hint}"

    def problems(self, config: Mapping[str, Any], key: str = "") -> list[typed.Problem]:
        """Everything wrong with a mapping of the selector and the class's keyword arguments, short of building it."""
        name = config.get(self.selector)
        if name is None:
            known = ", ".join(self.names())
            return [typed.Problem(typed.join(key, self.selector), f"missing; expected one of {known}")]
        try:
            cls = self.get(name)
        except UserError as error:
            return [typed.Problem(typed.join(key, self.selector), str(error))]
        return typed.argument_problems(cls, self._arguments(config), key)

    def build(self, config: Mapping[str, Any]) -> T:
        """Construct the class that `config` names with the rest of it; UserError lists everything wrong with it."""
        found = self.problems(config)
        if found:
            raise UserError(f"{self.kind} {config.get(self.selector)!r}: " + "; ".join(map(str, found)))
        cls = self.get(config[self.selector])
        try:
            return cls(**self._arguments(config))
        except UserError:
            raise
        except ValueError as error:
            if cls.__module__.startswith("longnet_kit."):
                raise
            raise UserError(str(error)) from error  # a plug-in refuses a value in the way that Python classes do

    def _arguments(self, config: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in config.items() if key != self.selector}

    def _load_entry_points(self) -> None:
        if self.group is None or self._entry_points_loaded:
            return
        self._entry_points_loaded = True
        for entry in metadata.entry_points(group=self.group):
            try:
                loaded = entry.load()
                if isinstance(loaded, type) and loaded not in self._classes.values():
                    self.register(entry.name)(loaded)
            except (Exception, SystemExit) as error:  # a plug-in's code can fail in any way
                package = f"the package {entry.dist.name}" if entry.dist else "a package"
                cause = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
                self._broken[entry.name] = f"{package} has it in {entry.value}, which fails with {cause}"
