"""Files with the same bytes: which of them are to be taken, where each file is of some class."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from longnet_kit import durable
from longnet_kit.data.errors import DataError

BEGINNING = 4096
"""Bytes that are looked at before a file is read as a whole."""


class _Owned(NamedTuple):
    owner: str
    path: Path


def without(files: Mapping[str, Sequence[Path]]) -> set[Path]:
    """The files without copies: of those with the same bytes the first, none where they are of two classes.

    Only files of which size and beginning are another's are read as wholes.

    Raises:
        DataError: a file cannot be read.
    """
    groups = [[_Owned(name, path) for name, of_class in files.items() for path in of_class]]
    for trait in (_size, _beginning, _digest):
        groups = [part for group in groups for part in _parted(group, trait)]
    return {group[0].path for group in groups if len({file.owner for file in group}) == 1}


def _parted(group: list[_Owned], trait: Callable[[Path], Any]) -> list[list[_Owned]]:
    """Files parted by what may tell them apart; one alone needs no look."""
    if len(group) == 1:
        return [group]
    parts: dict[Any, list[_Owned]] = {}
    for file in group:
        try:
            parts.setdefault(trait(file.path), []).append(file)
        except OSError as error:
            raise DataError(f"{file.path} cannot be read: {error.strerror or error}") from error
    return list(parts.values())


def _size(path: Path) -> int:
    return path.stat().st_size


def _beginning(path: Path) -> bytes:
    with durable.opened(path) as file:
        return file.read(BEGINNING)


def _digest(path: Path) -> bytes:
    with durable.opened(path) as file:
        return hashlib.file_digest(file, "blake2b").digest()
