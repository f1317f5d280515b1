"""Entry points of other packages: what they add, and that a broken one harms nobody who does not ask for it."""

from __future__ import annotations

from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest

from longnet_kit import attention, recipe, recipe_checks
from longnet_kit.registry import Registry


class Thing:
    """What the registry of these tests holds."""


class Good(Thing):
    """What an entry point gives."""


def entry(name: str, outcome: Any) -> Any:
    def load() -> Any:
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    return SimpleNamespace(name=name, value=f"{name}_module", dist=SimpleNamespace(name=f"{name}-kit"), load=load)


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[Thing]:
    entries = [
        entry("lost", ImportError("no numpy")),
        entry("taken", Good),
        entry("good", Good),
        entry("ends", SystemExit(1)),
    ]
    monkeypatch.setattr(metadata, "entry_points", lambda group: entries if group == "things" else [])
    made: Registry[Thing] = Registry("thing", "kind", group="things")
    made.register("taken")(Thing)
    made.register("old")(type("Old", (Thing,), {}))
    return made


def test_a_broken_entry_point_harms_only_who_asks_for_it(registry: Registry[Thing]) -> None:
    assert registry.get("good") is Good and registry.get("old")
    assert registry.names() == ["good", "old"]
    for name, cause in (("lost", "ImportError: no numpy"), ("taken", "already registered"), ("ends", "SystemExit: 1")):
        with pytest.raises(ValueError, match=f"{name}-kit .*{cause}"):
            registry.get(name)
        (problem,) = registry.problems({"kind": name})
        assert problem.key == "kind" and cause in problem.message and "unknown" not in problem.message


def test_an_unknown_name_is_told_with_what_may_have_had_it(registry: Registry[Thing]) -> None:
    with pytest.raises(ValueError, match="unknown thing 'loost'; known: good, old .*lost-kit.*no numpy"):
        registry.get("loost")


def test_a_recipe_names_the_package_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    values = recipe.to_dict(recipe.load("quickstart"))
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry("lost", ImportError("no numpy"))])
    monkeypatch.setattr(attention.registry, "_entry_points_loaded", False)
    monkeypatch.setattr(attention.registry, "_broken", {}, raising=False)
    assert recipe_checks.problems(values) == []
    values["model"]["attention"] = {"backend": "lost"}
    (problem,) = recipe_checks.problems(values)
    assert problem.key == "model.attention.backend" and "lost-kit" in problem.message
