"""Attention patterns as figures, as the LongNet paper draws them: a panel per head and branch, keys across.

Drawn without pyplot; matplotlib is imported on first use. Long sequences are pooled into cells, see `pattern_panels`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from longnet_kit.attention.patterns import Dilated, Pattern
from longnet_kit.errors import UserError
from longnet_kit.report import pattern_panels
from longnet_kit.report.pattern_paint import HUES, SEPARATE, Paint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LONGEST = 65_536
"""Tokens that a figure shows, at most."""
MOST_HEADS = 8
"""Distinct heads that a figure shows, at most."""
_EXACT, _CELLS = 128, 256
"""Up to so many tokens a panel shows each of them, which takes some pixels each; else so many cells of several."""


class _Column(NamedTuple):
    """A column of panels: a branch, or what all of them show together."""

    title: str
    segment: int
    """Tokens in a segment; 0: there are none to draw."""
    hue: str | None
    """None: keys are coloured by how often they are seen."""


def pattern_figure(pattern: Pattern, length: int, heads: int, causal: bool = True, note: str = "") -> Figure:
    """Draw which keys the queries of each head see: a row per distinct head, a column per branch and for their mixture.

    Args:
        length: tokens in the sequence. Above 128 the panels show means over cells of several tokens.
        heads: heads of the layer. Heads that see the same share a row; at most 8 rows are drawn.
        note: words to put below.

    Raises:
        UserError: a length below 1 or above 65,536.
    """
    check_length(length)
    cell = 1 if length <= _EXACT else max(2, -(-length // _CELLS))
    groups = pattern_panels.alike(pattern, length, heads, causal)
    shown, columns = groups[:MOST_HEADS], _columns(pattern)
    asked = pattern, [group[0] for group in shown], length, heads, causal, cell
    if isinstance(pattern, Dilated):
        branches = pattern_panels.branch_pictures(pattern, *asked[1:])
        pictures = branches
        if len(columns) > 1:
            pictures = torch.cat([branches, pattern_panels.picture_together(pattern, branches, *asked[1:])[None]])
    else:
        pictures = pattern_panels.pictures(*asked)[None]
    paint = Paint(length, cell, causal, pictures)
    names = [pattern_panels.name(group, heads) for group in shown]
    figure, panels = _grid(names, columns, length)
    for i, axes in enumerate(panels):
        row, place = divmod(i, len(columns))
        paint.panel(axes, pictures[place, row].numpy(), columns[place].hue)
        if columns[place].segment:
            paint.segments(axes, columns[place].segment)
    _label(figure, columns, sum(map(len, groups[MOST_HEADS:])), note)
    paint.key(figure, counted=columns[-1].hue is None)
    return figure


def check_length(length: int) -> None:
    """Raise a UserError unless a pattern can be drawn for so many tokens."""
    if not 1 <= length <= LONGEST:
        raise UserError(f"length is {length}; a pattern can be drawn for 1 to {LONGEST} tokens")


def _columns(pattern: Pattern) -> list[_Column]:
    """A column per branch and one for the mixture; just one where these would be the same."""
    if not isinstance(pattern, Dilated):
        return [_Column("", 0, None)]
    branches = [_Column(f"w={w:,}, r={r:,}", w, HUES[i % len(HUES)]) for i, (w, r) in enumerate(pattern.branches)]
    return branches if len(branches) == 1 else [*branches, _Column(pattern_panels.together(pattern), 0, None)]


def _grid(names: Sequence[str], columns: Sequence[_Column], length: int) -> tuple[Figure, list[Axes]]:
    """A figure of square panels, named, row by row; a single column is laid out across, four to a line."""
    from matplotlib.figure import Figure

    alone = len(columns) == 1
    panels, across = len(names) * len(columns), min(len(names), 4) if alone else len(columns)
    down = -(-panels // across)
    side = 1.7 if length <= SEPARATE else 2.5
    figure = Figure(figsize=(max(across * side + 0.8, 2.8), down * (side + 0.1) + 1), layout="constrained")
    made = [figure.add_subplot(down, across, i + 1) for i in range(panels)]
    for i, axes in enumerate(made):
        row, place = divmod(i, len(columns))
        axes.tick_params(labelleft=i % across == 0, labelbottom=i + across >= panels)
        if alone:
            axes.set_title(names[row], fontsize=9)
        elif row == 0:
            axes.set_title(columns[place].title, fontsize=9)
        if place == 0 and not alone:
            axes.set_ylabel(names[row], fontsize=9, fontweight="bold", labelpad=8)
    return figure, made


def _label(figure: Figure, columns: Sequence[_Column], more: int, note: str) -> None:
    if len(columns) == 1 and columns[0].title:
        figure.suptitle(columns[0].title, fontsize=10)
    words = "key position"
    if more:
        words += f"\n{more} more heads see other keys" if more > 1 else "\n1 more head sees other keys"
    if note:
        words += f"\n{note}"
    figure.supxlabel(words, fontsize=9)
    figure.supylabel("query position", fontsize=9)
