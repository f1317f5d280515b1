"""Recipes as tests write, load and have them refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from longnet_kit import recipe
from longnet_kit.recipe import Recipe, RecipeError

SMALLEST = "name: x\ntrainer: {max_steps: 5}\n"


def write(folder: Path, text: str, name: str = "r.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load_text(folder: Path, text: str, *overrides: str) -> Recipe:
    return recipe.load(write(folder, text), overrides)


def refusal(path: Path | str, *overrides: str) -> str:
    with pytest.raises(RecipeError) as caught:
        recipe.load(path, overrides)
    return str(caught.value)
