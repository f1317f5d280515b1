"""The recipes that come with the kit: where they are, and how a short name finds one.

In a clone they stand beside the package, in a wheel inside it. Nothing heavy is imported here, nor is any recipe read.
"""

from __future__ import annotations

import os
from pathlib import Path

from longnet_kit import typed
from longnet_kit.errors import UserError

SUFFIX = ".yaml"


def recipes_dir() -> Path:
    """The folder of the shipped recipes; FileNotFoundError when the installation has none."""
    package = Path(__file__).resolve().parent
    for folder in (package / "recipes", package.parent / "recipes"):  # a wheel's, a clone's
        if folder.is_dir():
            return folder
    raise FileNotFoundError(f"no recipes folder in {package} or beside it; reinstall longnet_kit")


def names() -> list[str]:
    """The short name of every shipped recipe, sorted: `paper/longnet_8k`, `quickstart`."""
    folder = recipes_dir()
    return sorted(path.relative_to(folder).with_suffix("").as_posix() for path in folder.rglob(f"*{SUFFIX}"))


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The file of a recipe, given as a path or by the short name of a shipped one, with or without its suffix.

    A path that exists wins over a short name, so that a user's own `quickstart.yaml` is not passed over.

    Raises:
        UserError: there is neither; the message names the nearest shipped recipe, or all of them.
    """
    path = Path(name_or_path)
    if path.is_file():
        return path
    shipped = names()
    name = path.as_posix().removesuffix(SUFFIX)
    if name in shipped:
        return recipes_dir() / (name + SUFFIX)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; expected a recipe file or the name of a shipped recipe")
    raise UserError(f"no recipe {str(path)!r}: neither a file nor a shipped recipe; {typed.suggestion(name, shipped)}")
