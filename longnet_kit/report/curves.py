"""Curves of several runs in one figure: a panel for each tag, against steps, tokens, FLOPs, seconds or its groups.

matplotlib is imported on first use, and pyplot never. A long curve is drawn as the medians of its stretches, in a band
that reaches to their extremes: noise would hide the other curves, and nothing that stands out is lost.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from longnet_kit import typed
from longnet_kit.errors import UserError
from longnet_kit.report import figures, table
from longnet_kit.report.history import History
from longnet_kit.report.metrics_file import Series

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".pdf", ".svg")
GROUPS = "groups"
"""Against the N of `tag@N`: last values by distance, by examples before, or by length of the context."""
AXES = {"steps": None, "tokens": "train/tokens", "flops": "train/flops", "seconds": "train/seconds", GROUPS: None}
"""What curves are drawn against, and the tag that says how much of it a step has seen, where one is needed."""
_STRETCHES, _LONG = 200, 800
_FEW, _LEGEND_ROWS = 10, 25
_DOTTED = 50
_ORDERS, _WILD = 30, 5
_GROUP = re.compile(r"(.+)@(\d{1,15})")
_MOST_TICKS = 12


class Points(NamedTuple):
    """A curve, both (points,)."""

    x: NDArray[np.float64]
    y: NDArray[np.float64]


class Bands(NamedTuple):
    """A long curve by stretches, each (stretches,)."""

    x: NDArray[np.float64]
    low: NDArray[np.float64]
    middle: NDArray[np.float64]
    high: NDArray[np.float64]


def check(plot: Path | None, against: str) -> None:
    """Raise UserError where the file or the axis of a plot is none, before anything is read."""
    if against not in AXES:
        raise UserError(f"--against {against}: expected {', '.join(AXES)}; {typed.suggestion(against, AXES)}")
    if plot is None:
        return
    if plot.suffix.lower() not in SUFFIXES:
        raise UserError(f"--plot {plot}: the name must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    table.check_place("--plot", plot)


def draw(
    runs: Sequence[tuple[str, History]], legend: Sequence[str], tags: Sequence[str], against: str, plot: Path
) -> dict[str, str]:
    """Draw curves into a file.

    Args:
        runs: under their labels, best run first.
        legend: what to call each in the figure.
        tags: a panel each; against groups, without their @.

    Returns:
        Why runs were left out, by their labels.

    Raises:
        UserError: there is nothing to draw, or the file cannot be written.
    """
    axis, left_out, drawn = AXES[against], {}, []
    wanted = " or ".join(f"{tag}@N" if against == GROUPS else tag for tag in tags)
    for (label, run), name in zip(runs, legend, strict=True):
        seen = None if axis is None else run.metrics.series(axis)
        if seen is not None and not np.isfinite(seen.values).any():
            left_out[label] = f"not in the plot: no {axis}"
            continue
        if against == GROUPS:
            points = {tag: by_group(run, tag) for tag in tags}
        else:
            points = {tag: place(run.metrics.series(tag), seen) for tag in tags}
        if any(np.isfinite(curve.y).any() for curve in points.values()):
            drawn.append((name, points))
        else:
            left_out[label] = f"not in the plot: no number for {wanted}"
    if not drawn:
        advice = "choose another --metric" if axis is None else "draw against steps"
        raise UserError(f"--plot {plot}: no run has {wanted}{f' and {axis}' if axis else ''}; {advice}")
    picture = figure(drawn, tags, against)
    try:
        picture.savefig(plot, dpi=150)
    except OSError as error:
        raise UserError(f"--plot {plot}: cannot be written ({error.strerror}); name another file") from error
    return left_out


def grouped(tags: Iterable[str]) -> list[str]:
    """What tags are groups of: val/accuracy where there is val/accuracy@16."""
    return list(dict.fromkeys(match[1] for match in map(_GROUP.fullmatch, tags) if match))


def by_group(run: History, tag: str) -> Points:
    """The last value of each group of a tag, NaN and infinities included, by what the groups are named after."""
    named = [match for match in map(_GROUP.fullmatch, run.tags) if match and match[1] == tag]
    known = sorted((int(match[2]), value) for match in named if (value := run.final(match[0])) is not None)
    return Points(*np.array(known, dtype=float).reshape(-1, 2).T)


def place(series: Series, seen: Series | None) -> Points:
    """Where the values of a tag stand on the horizontal axis, from left to right.

    Args:
        seen: what the steps of training rows had seen, in tokens, FLOPs or seconds; between them it grows evenly, and
            after the last at the pace that it had there. None for steps themselves.
    """
    order = np.argsort(series.steps, kind="stable")
    steps, values = series.steps[order], series.values[order]
    if seen is None:
        return Points(steps, values)
    known = np.isfinite(seen.values)
    at, last = np.unique(seen.steps[known][::-1], return_index=True)
    amounts = seen.values[known][::-1][last]
    if at[0] > 0:
        at, amounts = np.append(0.0, at), np.append(0.0, amounts)
    x = np.interp(steps, at, amounts)
    if len(at) > 1:
        pace = (amounts[-1] - amounts[-2]) / (at[-1] - at[-2])
        x += pace * np.maximum(steps - at[-1], 0)
    return Points(x, values)


def bands(points: Points) -> Bands:
    """Sum up a long curve by neighbouring points, as many in each stretch (the last may have fewer)."""
    length = -(-len(points.x) // _STRETCHES)
    whole = len(points.x) // length * length
    parts = [
        (points.x[stretch].reshape(-1, size), points.y[stretch].reshape(-1, size))
        for stretch, size in ((slice(whole), length), (slice(whole, None), len(points.x) - whole))
        if size
    ]
    rows = [(x.mean(1), y.min(1), np.median(y, axis=1), y.max(1)) for x, y in parts]
    return Bands(*(np.concatenate(column) for column in zip(*rows, strict=True)))


def figure(drawn: Sequence[tuple[str, Mapping[str, Points]]], tags: Sequence[str], against: str) -> Figure:
    """The figure of runs, each with its name in the legend and its points by tag; best run first."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator

    names = [figures.as_label(name) for name, _ in drawn]
    is_few = len(drawn) <= _FEW
    palette = colormaps["tab10"](np.arange(_FEW)) if is_few else colormaps["viridis"](np.linspace(0, 0.93, len(drawn)))
    across = len(tags) if len(tags) <= 3 else 2
    stacks = math.ceil(len(drawn) / _LEGEND_ROWS)
    down = math.ceil(len(tags) / across)
    width = 5.0 * across + stacks * (0.55 + 0.075 * max(map(len, names)))
    height = max(4.2 * down, 0.4 + 0.17 * min(len(drawn), _LEGEND_ROWS))
    picture = Figure(figsize=(width, height), layout="constrained")
    furthest = max(points.x.max(initial=0.0) for _, curves in drawn for points in curves.values())
    scale, unit = _unit(against, furthest)
    for i, tag in enumerate(tags):
        axes = picture.add_subplot(down, across, i + 1, title=tag, xlabel=unit)
        if against == GROUPS:
            _doubling(axes, sorted({x for _, curves in drawn for x in curves[tag].x.tolist()}))
        else:
            axes.xaxis.set_major_locator(MaxNLocator(integer=scale == 1 and against != "seconds"))
        for (_, curves), colour in zip(drawn, palette, strict=False):
            points = Points(curves[tag].x / scale, curves[tag].y)
            _curve(axes, points, colour, is_one_of_few=is_few, is_training=against != GROUPS)
        _fit(axes, np.concatenate([curves[tag].y for _, curves in drawn]))
        axes.grid(alpha=0.3)
    words = _explanation([points for _, curves in drawn for points in curves.values()], is_training=against != GROUPS)
    picture.supxlabel(words, fontsize="small", color="gray")
    handles = [Line2D([], [], color=colour) for _, colour in zip(drawn, palette, strict=False)]
    picture.legend(handles, names, loc="outside right upper", ncols=stacks, fontsize="small", frameon=False)
    return picture


def _doubling(axes: Axes, groups: Sequence[float]) -> None:
    """A horizontal axis on which doublings are evenly apart, with the groups' own numbers."""
    if 0 in groups:
        axes.set_xscale("symlog", base=2, linthresh=1)
    else:
        axes.set_xscale("log", base=2)
    shown = groups[:: math.ceil(len(groups) / _MOST_TICKS) or 1]
    axes.set_xticks(shown, [f"{group:,.0f}" for group in shown])


def _explanation(curves: Sequence[Points], *, is_training: bool) -> str:
    """What in the figure is not a plain curve."""
    if not is_training:
        return "" if all(np.isfinite(points.y).all() for points in curves) else "gaps: nan or inf"
    words = []
    if any(np.isfinite(points.y).sum() > _LONG for points in curves):
        words.append("lines: medians of neighbouring points; bands: their extremes")
    if any(len(points.y) and not np.isfinite(points.y[-1]) for points in curves):
        words.append("crosses: from here on nan or inf")
    return "; ".join(words)


def _curve(axes: Axes, points: Points, colour: Any, *, is_one_of_few: bool, is_training: bool) -> None:
    """One run in one panel; a cross where its numbers ended in NaN or infinity, a gap where those are of a group."""
    is_number = np.isfinite(points.y)
    if is_training:
        shown = Points(points.x[is_number], points.y[is_number])
    else:
        shown, is_number = Points(points.x, np.where(is_number, points.y, np.nan)), np.ones_like(is_number)
    width = 1.5 if is_one_of_few else 1.0
    if len(shown.x) > _LONG:
        band = bands(shown)
        axes.fill_between(band.x, band.low, band.high, color=colour, alpha=0.12 if is_one_of_few else 0.06, linewidth=0)
        axes.plot(band.x, band.middle, color=colour, linewidth=width)
    else:
        marker = "o" if len(shown.x) <= _DOTTED else ""
        axes.plot(shown.x, shown.y, color=colour, linewidth=width, marker=marker, markersize=3)
    if len(shown.x) and not is_number[-1]:
        axes.plot(shown.x[-1:], shown.y[-1:], color=colour, marker="x", markersize=8, markeredgewidth=2)


def _fit(axes: Axes, values: NDArray[np.float64]) -> None:
    """A logarithmic axis for what spans orders of magnitude, and a few wild points cut off, with a word on it."""
    values = values[np.isfinite(values)]
    if not len(values):
        return
    low, high = np.percentile(values, [1, 99])
    if low > 0 and high > _ORDERS * low:
        axes.set_yscale("log")
    elif np.ptp(values) > _WILD * (high - low) > 0:
        margin = 0.1 * (high - low)
        axes.set_ylim(low - margin, high + margin)
        outside = np.count_nonzero((values < low - margin) | (values > high + margin))
        axes.set_title(f"{outside} points out of view", loc="right", fontsize="small", color="gray")


def _unit(against: str, furthest: float) -> tuple[float, str]:
    """What one unit of the horizontal axis is worth, and what to call it."""
    units = {
        "steps": [(1.0, "optimizer steps")],
        "tokens": [
            (1e12, "tokens (trillions)"),
            (1e9, "tokens (billions)"),
            (1e6, "tokens (millions)"),
            (1.0, "tokens"),
        ],
        "flops": [(10.0**power, f"training FLOPs (10^{power})") for power in (21, 18, 15, 12)],
        GROUPS: [(1.0, "N of the tag's groups, @N")],
        "seconds": [(3600.0, "hours of training"), (60.0, "minutes of training"), (1.0, "seconds of training")],
    }[against]
    return next((unit for unit in units if furthest >= 2 * unit[0]), units[-1])
