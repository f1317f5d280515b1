"""metrics.csv read back, in whatever state it was left: whole lines are used, and what cannot be read is told of.

The file is a header and rows of numbers with empty cells; several rows may have one step. A run that logs a new tag
rewrites the header, and one that was killed leaves half a line. A column is turned into numbers when it is asked for:
a hundred megabytes of other columns cost only the search for their commas.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

STEP = "step"
_COMMA, _NEWLINE, _RETURN = b",\n\r"
_TAIL = 64
Places = NDArray[np.int64]


class Series(NamedTuple):
    """The values of one tag and the steps they belong to, both (points,), as the file has them."""

    steps: NDArray[np.float64]
    values: NDArray[np.float64]


@dataclass
class _Section:
    """The rows under one header."""

    columns: dict[str, int]
    lines: Places  # (rows,), counted from 0
    steps: NDArray[np.float64]  # (rows,)


class Metrics:
    """The columns of one metrics.csv.

    Attributes:
        tags: every column but the step, as headers name them.
        problems: what could not be read, in words; reading a column may add to them.
    """

    def __init__(self, data: bytes) -> None:
        """Find the lines and cells of a file's content."""
        self.problems: list[str] = []
        whole = data[: data.rfind(b"\n") + 1]
        text = np.frombuffer(whole, np.uint8)
        marks = np.flatnonzero((text == _COMMA) | (text == _NEWLINE))
        self._data, self._text = whole, text
        self._marks = np.concatenate([[-1], marks])  # cell i lies between the marks i and i + 1
        self._past = np.flatnonzero(text[marks] == _NEWLINE) + 1  # (lines,): the first cell that is not in the line
        self._first = np.concatenate([[0], self._past[:-1]])  # (lines,): its first cell
        self._series: dict[str, Series] = {}
        self._sections = self._find_sections()
        if data and not self._sections:
            self.problems.insert(0, f"no line is a header that names a {STEP!r} column")
        if len(whole) < len(data):
            self.problems.append(f"line {len(self._past) + 1} is cut off, and left out")
        self.tags = list(dict.fromkeys(tag for section in self._sections for tag in section.columns if tag != STEP))

    @property
    def last_step(self) -> int | None:
        """The highest step of any row; None where there is no row."""
        highest = [section.steps.max() for section in self._sections if len(section.steps)]
        return int(max(highest)) if highest else None

    def series(self, tag: str) -> Series:
        """Every value of a tag, NaN and infinities included; empty where there is none."""
        if tag not in self._series:
            parts = [self._column(section, tag) for section in self._sections if tag in section.columns]
            steps, values = zip(*parts, strict=True) if parts else ([np.empty(0)], [np.empty(0)])
            self._series[tag] = Series(np.concatenate(steps), np.concatenate(values))
        return self._series[tag]

    def last(self, tag: str) -> float | None:
        """The last value of a tag, without reading the others."""
        for section in reversed(self._sections):
            for lines in (section.lines[-_TAIL:], section.lines) if tag in section.columns else ():
                starts, ends = self._cells(lines, section.columns[tag])
                for row in np.flatnonzero(ends > starts)[::-1].tolist():
                    value = _number(self._data[starts[row] : ends[row]])
                    if value is not None:
                        return value
        return None

    def rows_until(self, step: float) -> list[dict[str, str]]:
        """The rows up to and including a step: cells by tag, as they are in the file; only those that can be read."""
        found: list[dict[str, str]] = []
        for tag in self.tags:
            self.series(tag)  # which notes the cells that cannot be read
        for section in self._sections:
            rows = [{STEP: str(int(at))} for at in section.steps.tolist()]
            for tag in [tag for tag in section.columns if tag != STEP]:
                cells = self._slices(*self._cells(section.lines, section.columns[tag]))
                for row, cell in zip(rows, cells, strict=True):
                    if cell and _number(cell) is not None:
                        row[tag] = cell.decode()
            found += [row for row, at in zip(rows, section.steps.tolist(), strict=True) if at <= step]
        return found

    def _find_sections(self) -> list[_Section]:
        headers = self._headers()
        begins = [*headers, len(self._past)]
        unread = [(line, "stands before the header") for line in range(begins[0] if headers else 0)]
        sections = []
        for (line, names), end in zip(headers.items(), begins[1:], strict=True):
            if line > begins[0]:
                self.problems.append(f"line {line + 1} is another header, by which the lines after it are read")
            section, wrong = self._rows(names, np.arange(line + 1, end))
            sections.append(section)
            unread += wrong
        self._tell(unread)
        return sections

    def _headers(self) -> dict[int, list[str]]:
        """The lines that have a cell `step`, which no row has."""
        found = {}
        at = self._data.find(STEP.encode())
        while at >= 0:
            line = int(np.searchsorted(self._marks[self._past], at))
            start, end = self._marks[self._first[line]] + 1, self._marks[self._past[line]]
            names = _names(self._data[start:end])
            if STEP in names:
                found[line] = names
            at = self._data.find(STEP.encode(), int(end))
        return found

    def _rows(self, names: list[str], lines: Places) -> tuple[_Section, list[tuple[int, str]]]:
        """The rows among some lines, and why each other line is none."""
        counts = self._past[lines] - self._first[lines]
        starts, ends = self._cells(lines, 0)
        is_blank = (counts == 1) & (starts == ends)
        wrong = [
            (line, f"has {count} cell{'s' * (count != 1)}, not {len(names)}")
            for line, count in _pairs(lines, counts, (counts != len(names)) & ~is_blank)
        ]
        columns = {name: i for i, name in enumerate(names)}
        lines = lines[(counts == len(names)) & ~is_blank]
        starts, ends = self._cells(lines, columns[STEP])
        steps = np.array([_number(cell) for cell in self._slices(starts, ends)], dtype=np.float64)  # None gives NaN
        is_row = np.isfinite(steps) & (steps >= 0) & (np.floor(steps) == steps)
        wrong += [(line, "has no step that is a whole number") for line, _ in _pairs(lines, lines, ~is_row)]
        return _Section(columns, lines[is_row], steps[is_row]), wrong

    def _column(self, section: _Section, tag: str) -> Series:
        starts, ends = self._cells(section.lines, section.columns[tag])
        filled = ends > starts
        cells = self._slices(starts[filled], ends[filled])
        steps, lines = section.steps[filled], section.lines[filled]
        try:
            return Series(steps, np.array([float(cell) for cell in cells], dtype=np.float64))
        except ValueError:  # one of them is no number
            values = [_number(cell) for cell in cells]
        unread = [
            (line, f"{tag} is {cell[:20].decode(errors='replace')!r}, not a number")
            for line, cell, value in zip(lines.tolist(), cells, values, strict=True)
            if value is None
        ]
        self._tell(unread)
        read = np.array([value is not None for value in values])
        return Series(steps[read], np.array([value for value in values if value is not None], dtype=np.float64))

    def _cells(self, lines: Places, column: int) -> tuple[Places, Places]:
        """Where the cells of a column start and end in the file."""
        cell = self._first[lines] + column
        starts, ends = self._marks[cell] + 1, self._marks[cell + 1]
        ends = ends - ((ends > starts) & (self._text[ends - 1] == _RETURN))
        return starts, ends

    def _slices(self, starts: Places, ends: Places) -> list[bytes]:
        data = self._data
        return [data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True)]

    def _tell(self, unread: list[tuple[int, str]]) -> None:
        """Note the first of some lines that cannot be read, and how many more cannot."""
        if unread:
            line, words = min(unread)
            more = f" ({len(unread) - 1} more cannot be read)" if len(unread) > 1 else ""
            self.problems.append(f"line {line + 1} {words}{more}")


def _names(line: bytes) -> list[str]:
    """The cells of a header, whose tags may hold commas in quotes."""
    try:
        return [name.strip() for name in next(csv.reader([line.decode("utf-8-sig", "replace").strip()]), [])]
    except csv.Error:
        return []


def _number(cell: bytes) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _pairs(lines: Places, values: Places, chosen: NDArray[np.bool_]) -> Iterable[tuple[int, int]]:
    return zip(lines[chosen].tolist(), values[chosen].tolist(), strict=True)
