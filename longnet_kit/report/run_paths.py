"""Which runs the arguments of `longnet compare` mean, and what each run is called where several are shown."""

from __future__ import annotations

import glob
import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from longnet_kit import runs, typed
from longnet_kit.errors import UserError

_LISTED = 12


def expand(paths: Sequence[str]) -> tuple[list[Path], list[str]]:
    """The run directories that paths mean, each once, and the folders that have none.

    Args:
        paths: run directories; runs/<name> for its newest finished version; folders with runs further down, for all
            of them; glob patterns. Without any, everything under runs/.

    Returns:
        Run directories, in the order of the arguments, and sentences on what was passed over.

    Raises:
        UserError: a path does not exist, or a pattern matches no folder of runs.
    """
    found: dict[str, Path] = {}
    empty = []
    for text in paths or [str(runs.ROOT)]:
        path = Path(text)
        if os.path.isdir(path):
            inside = _inside(path)
            if not inside:
                can_look = os.access(path, os.R_OK | os.X_OK)
                why = (
                    f"no run in it (no {runs.RECIPE} or {runs.METRICS}, no version_<n>)"
                    if can_look
                    else "cannot be read"
                )
                empty.append(f"{path}: {why}")
        elif glob.has_magic(text) and not os.path.exists(path):
            inside = _matching(text)
        else:
            raise UserError(_missing(text, paths))
        for run in inside:
            found.setdefault(os.path.realpath(run), run)
    return list(found.values()), empty


def labels(paths: Sequence[Path]) -> list[str]:
    """The shortest path of each run that tells it from the others: without the folders that all have in common."""
    parts = [Path(os.path.abspath(path)).parts for path in paths]
    if len(paths) < 2:
        return ["/".join(names[-2:]) for names in parts]
    begin = _shared(parts)
    end = _shared([names[:begin:-1] for names in parts])  # the folder after the first difference stays
    return ["/".join(names[begin : len(names) - end]) or "." for names in parts]


def _shared(parts: Sequence[Sequence[str]]) -> int:
    """How many folders are the same at the beginning of all paths."""
    alike = (len(set(names)) == 1 for names in zip(*parts, strict=False))
    return sum(1 for _ in itertools.takewhile(bool, alike))


def _inside(folder: Path) -> list[Path]:
    """The runs that an existing folder means."""
    if _is_run(folder):
        return [folder]
    named = folder if folder.name else folder.absolute()
    versions = runs.versions(named.name, named.parent)
    if versions:
        try:
            return [runs.find(named)]
        except UserError:  # none has a recipe
            return versions[-1:]
    return list(_below(folder, set()))


def _below(folder: Path, seen: set[str]) -> Iterator[Path]:
    """Every run further down, in the order in which people count; links are followed, into each folder once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in entries if os.path.isdir(entry) and entry.name[0] != "."]
    except OSError:
        return
    for name in sorted(names, key=_as_read):
        child = folder / name
        if _is_run(child):
            yield child
        else:
            yield from _below(child, seen)


def _is_run(folder: Path) -> bool:
    if re.fullmatch(r"version_\d+", folder.name):
        return True
    return any(os.path.lexists(folder / name) for name in (runs.RECIPE, runs.METRICS, runs.SUMMARY))


def _matching(pattern: str) -> list[Path]:
    matches = [Path(match) for match in glob.glob(pattern, recursive=True)]
    found = [
        run
        for match in sorted(matches, key=lambda m: _as_read(str(m)))
        if os.path.isdir(match)
        for run in _inside(match)
    ]
    if not found:
        raise UserError(f"{pattern}: the pattern matches no folder with a run; {_present()}")
    return found


def _missing(text: str, paths: Sequence[str]) -> str:
    if os.path.exists(text):
        return f"{text}: is a file; give the run directory that it is in"
    if not paths:
        return f"{text}: there is no such folder here; train a run with `longnet fit`, or say where there are runs"
    names = _names()
    near = typed.suggestion(text, {str(folder) for name in names for folder in (Path(name), *Path(name).parents)})
    hint = f"{near} " if near.startswith("did you mean") else ""
    return f"{text}: there is no such run or folder; {hint}{_present()}"


def _present() -> str:
    """What runs there are."""
    names = _names()
    if not names:
        return f"there are no runs in {runs.ROOT}/"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f"there are: {', '.join(names[:_LISTED])}{more}"


def _names() -> list[str]:
    below: Iterable[Path] = _below(runs.ROOT, set()) if os.path.isdir(runs.ROOT) else ()
    return list(dict.fromkeys(str(run.parent) for run in below))


def _as_read(name: str) -> list[tuple[bool, int, str]]:
    """A key that sorts version_2 before version_10."""
    return [(part.isdigit(), int(part) if part.isdecimal() else 0, part) for part in re.split(r"(\d+)", name)]
