"""A table as text, as Markdown or as CSV, and numbers as people read them."""

from __future__ import annotations

import csv
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longnet_kit import terminal
from longnet_kit.errors import UserError

DASH = "-"
_GAP = "  "
_MARKDOWN = str.maketrans({
    "&": "&amp;", "<": "&lt;", ">": "&gt;", "\\": "&#92;", "`": "&#96;", "|": "\\|", "*": "&#42;", "~": "&#126;",
})  # fmt: skip


@dataclass
class Column:
    """A column: what it is called in print and in full, its values, and how each is printed."""

    title: str
    name: str
    values: Sequence[Any]
    """None where a row has no value."""
    texts: Sequence[str]
    is_right: bool = True


def text(columns: Sequence[Column], width: int | None = None) -> str:
    """Lines of aligned cells; where they are wider than `width`, blocks that each repeat the first column."""
    cells = [_padded(column) for column in columns]
    return "\n\n".join(
        "\n".join(_GAP.join(row).rstrip() for row in zip(*block, strict=True)) for block in _blocks(cells, width)
    )


def markdown(columns: Sequence[Column]) -> str:
    """A table as GitHub renders it."""
    rows = [
        [as_markdown(column.title) for column in columns],
        ["--:" if column.is_right else "---" for column in columns],
    ]
    rows += [[as_markdown(cell) for cell in row] for row in zip(*(column.texts for column in columns), strict=True)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def as_markdown(text: str) -> str:
    """Escape text so that Markdown shows it as it is, on one line: no HTML, links, code or other cells of a table."""
    return re.sub(r"\](?=[(\[])", "&#93;", terminal.printable(text, keep="").translate(_MARKDOWN))


def fenced(text: str, language: str = "") -> str:
    """Text as a block of code in Markdown, its fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def check_place(option: str, path: Path) -> None:
    """Raise UserError where the file of an option cannot be written, before anything is read."""
    if not os.path.isdir(path.parent) or os.path.isdir(path):
        reason = "it is a folder" if os.path.isdir(path) else f"there is no folder {path.parent}"
        raise UserError(f"{option} {path}: cannot be written, {reason}; name a file in a folder that exists")


def write_csv(columns: Sequence[Column], path: Path) -> None:
    """Write the values in full under their full names; UserError where that cannot be."""
    try:
        with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow([column.name for column in columns])
            writer.writerows(zip(*(column.values for column in columns), strict=True))
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); name a file in a folder that can be") from error


def number(value: float) -> str:
    """A measured value: four decimals where that says something, else four digits."""
    if math.isnan(value) or math.isinf(value) or value == int(value) and abs(value) < 1e9:
        return f"{value:.0f}"
    if abs(value) >= 1e4:
        return f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:.4f}" if abs(value) >= 1e-2 else f"{value:.4g}"


def size(count: float) -> str:
    """Bytes, in the unit that leaves few digits."""
    for unit, letters in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.4g} {letters}"
    return f"{count:.0f} B"


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    if not math.isfinite(seconds):
        return f"{seconds:.0f}"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def _padded(column: Column) -> list[str]:
    cells = [terminal.printable(cell, keep="") for cell in (column.title, *column.texts)]
    width = max(map(len, cells))
    return [cell.rjust(width) if column.is_right else cell.ljust(width) for cell in cells]


def _blocks(cells: list[list[str]], width: int | None) -> list[list[list[str]]]:
    """Columns, as many side by side as fit; the first stands in every block."""
    blocks = [[cells[0]]]
    for column in cells[1:]:
        used = sum(len(other[0]) + len(_GAP) for other in blocks[-1])
        if width is not None and len(blocks[-1]) > 1 and used + len(column[0]) > width:
            blocks.append([cells[0]])
        blocks[-1].append(column)
    return blocks
