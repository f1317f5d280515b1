"""Importing the modules of a recipe's `imports`, which register plug-ins.

An entry is `module` (dotted if it is in a package), or `folder/module`. It is looked up beside the recipe, in the
working directory, then on sys.path.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from longnet_kit import terminal
from longnet_kit.errors import UserError

_TRUSTS = ContextVar("trusts", default=False)
_ACCEPTED = "LONGNET_ACCEPTED"
"""Environment variable with the run or file that the user has accepted: other ranks of the job do not ask again."""


@contextmanager
def trusted() -> Iterator[None]:
    """Let runs and exported files from outside the working directory import the modules that their recipes name."""
    token = _TRUSTS.set(True)
    try:
        yield
    finally:
        _TRUSTS.reset(token)


def check_trust(entries: Sequence[str], origin: Path) -> None:
    """Ask whether the modules of a run's or exported file's recipe may be imported, unless it is the user's own.

    Those in the working directory are the user's own. Where there is no terminal, nobody is asked.

    Raises:
        UserError: the user says no, or cannot be asked.
    """
    place = str(origin.resolve())
    if not entries or _TRUSTS.get() or os.environ.get(_ACCEPTED) == place or _is_inside(origin):
        return
    told = f"{origin} is outside the working directory, and its recipe runs the code of {', '.join(entries)}"
    if sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        terminal.tell(f"{told}; go on? [y/N] ", end="")
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            os.environ[_ACCEPTED] = place
            return
    raise UserError(f"{told}; look at that code first, then add --trust (in Python: `with plugins.trusted():`)")


def load(entry: str, folders: Sequence[Path] = ()) -> str:
    """Import one entry.

    Args:
        entry: `module`, or `folder/module` with the folder relative to the working directory or to one of `folders`.
        folders: where the recipe and those it extends are, the nearest first.

    Returns:
        The entry by which the module is found without `folders`, for the resolved recipe.

    Raises:
        UserError: there is no such module, or importing it failed; the message says where it was looked for, or what
            its code raised.
    """
    folder, _, module = entry.rpartition("/")
    if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*", module) or module.endswith(".py"):
        bare = entry.removesuffix(".py")
        hint = f"; write {bare}" if bare != entry else ""
        raise UserError(f"got {entry!r}, expected the name of a Python module, or folder/module{hint}")
    places = [*folders, Path()]
    if folder:
        places = [place / folder for place in (Path(), *folders)]
    places = list(dict.fromkeys(place.resolve() for place in places))
    top = module.partition(".")[0]
    spec = PathFinder.find_spec(top, [str(place) for place in places])
    if folder and spec is None:
        raise UserError(f"there is no module {module!r} in {' or '.join(map(str, places))}")
    origin = _location(spec)
    loaded = sys.modules.get(top)
    if origin is not None and loaded is not None and _location(loaded.__spec__) != origin:
        raise UserError(
            f"got {entry!r}, which is {origin}, but a module of that name is loaded already (from "
            f"{_location(loaded.__spec__) or 'the interpreter'}); rename yours"
        )
    with _search_first([str(place) for place in places]):
        try:
            importlib.import_module(module)
        except (Exception, SystemExit) as error:
            raise UserError(_failure(entry, module, error, places)) from error
    if origin is None or origin.parent == Path().resolve():
        return module if origin is None or not folder else entry
    return f"{_short(origin.parent)}/{module}"


@contextmanager
def _search_first(folders: list[str]) -> Iterator[None]:
    """Search `folders` before sys.path, and from then on after it: what a plug-in imports later is found too."""
    before = list(sys.path)
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before + [folder for folder in folders if folder not in before]


def _failure(entry: str, module: str, error: BaseException, places: Sequence[Path]) -> str:
    missing = getattr(error, "name", None) if isinstance(error, ModuleNotFoundError) else None
    if missing and (module == missing or module.startswith(f"{missing}.")):
        searched = ", ".join(map(str, places))
        return f"got {entry!r}, but there is no module {missing!r} in {searched}, nor on sys.path"
    line = "".join(traceback.format_exception_only(error)).strip().splitlines()[-1]
    if isinstance(error, SyntaxError):
        return f"importing {entry!r} failed: {error.filename}:{error.lineno}: {line}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<frozen")]
    kit = Path(__file__).parent
    own = [f for f in frames if not Path(f.filename).is_relative_to(kit)] or frames
    own = [f for f in own if any(Path(f.filename).is_relative_to(place) for place in places)] or own
    return f"importing {entry!r} failed: {own[-1].filename}:{own[-1].lineno}: {line}"


def _location(spec: ModuleSpec | None) -> Path | None:
    """The file of a module, or the folder of a package."""
    if spec is None:
        return None
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve()
    return Path(spec.origin).resolve() if spec.origin and spec.has_location else None


def _is_inside(path: Path) -> bool:
    """Whether a path is in the working directory, by its name or by what its links lead to."""
    here = Path().absolute()
    return Path(os.path.abspath(path)).is_relative_to(here) or path.resolve().is_relative_to(here.resolve())


def _short(folder: Path) -> str:
    """Relative to the working directory where it is inside, so that a run can move with it."""
    here = Path().resolve()
    return os.path.relpath(folder, here) if folder.is_relative_to(here) else str(folder)
