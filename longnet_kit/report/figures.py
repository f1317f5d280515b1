"""Figures, drawn without pyplot: nothing global changes, and no display is needed.

matplotlib is imported on first use.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from longnet_kit import terminal
from longnet_kit.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEAST = 32
"""A bin of losses holds at least one of so many equal parts of all tokens."""


def as_label(text: str) -> str:
    """Escape text that a figure shows: a dollar sign begins no formula."""
    return terminal.printable(text, keep="").replace("$", r"\$")


def loss_by_position(
    losses: NDArray[np.floating], tokens: NDArray[np.integer] | None = None, positions_per_loss: int = 1
) -> Figure:
    """Draw mean loss against the position in the context, on a logarithmic axis; bins are those of `log_bins`.

    Args:
        losses: (seq_len,), nats, first position first; NaN where there was no token.
        tokens: (seq_len,), how many tokens each loss is the mean of; None: equally many.
        positions_per_loss: neighbouring positions that each loss is the mean of.

    Raises:
        UserError: losses holds no number.
    """
    from matplotlib.figure import Figure

    centres, means = log_bins(losses, tokens, positions_per_loss=positions_per_loss)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(centres, means, marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the context (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    return figure


def perplexity_by_context(perplexities: Mapping[int, float]) -> Figure:
    """Draw perplexity against the length of the context, in tokens, on a logarithmic axis."""
    from matplotlib.figure import Figure

    lengths = sorted(perplexities)
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(lengths, [perplexities[n] for n in lengths], marker="o", markersize=4)
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{n:,}" for n in lengths])
    axes.set_xlabel("context (tokens)")
    axes.set_ylabel("perplexity")
    axes.grid(alpha=0.3)
    return figure


def confusion(counts: NDArray[np.integer], classes: Sequence[str]) -> Figure:
    """Draw how often sequences of each class were given each class, as shares of their row.

    Args:
        counts: (C, C), the right class in the first dimension.
        classes: the names of the C.
    """
    from matplotlib.figure import Figure

    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    size = 2.4 + 0.42 * len(classes)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.add_subplot(xlabel="given class", ylabel="right class")
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    names = [as_label(name) for name in classes]
    axes.set_xticks(range(len(classes)), names, rotation=90)
    axes.set_yticks(range(len(classes)), [f"{name} ({n:,})" for name, n in zip(names, counts.sum(1), strict=True)])
    figure.colorbar(image, ax=axes, label="share of the right class's sequences")
    return figure


def branch_weights(shares: NDArray[np.floating], branches: Sequence[tuple[int, int]]) -> Figure:
    """Draw the share of each branch in the mixture, a bar per layer.

    Args:
        shares: (layers, branches); a row sums to 1.
        branches: (w, r) each.
    """
    from matplotlib.figure import Figure

    layers = len(shares)
    figure = Figure(figsize=(6.4, 1.4 + 0.34 * layers), layout="constrained")
    axes = figure.add_subplot()
    left = np.zeros(layers)
    for (w, r), share, shade in zip(branches, shares.T, np.linspace(0.15, 0.85, len(branches)), strict=True):
        bars = axes.barh(range(layers), share, left=left, label=f"w={w:,} r={r}", color=_viridis(shade), height=0.8)
        dark = shade < 0.6
        names = [f"{x:.0%}" if x >= 0.06 else "" for x in share]
        axes.bar_label(bars, names, label_type="center", fontsize=8, color="white" if dark else "black")
        left += share
    axes.set_yticks(range(layers), [f"layer {i}" for i in range(layers)])
    axes.invert_yaxis()
    axes.set_xlim(0, 1)
    axes.set_xlabel("mean share in the mixture")
    axes.xaxis.set_major_formatter("{x:.0%}")
    figure.legend(loc="outside upper center", ncols=min(len(branches), 4), fontsize=8, frameon=False)
    return figure


def _viridis(shade: float) -> tuple[float, float, float, float]:
    from matplotlib import colormaps

    return colormaps["viridis"](shade)


def log_bins(
    losses: NDArray[np.floating],
    tokens: NDArray[np.integer] | None = None,
    per_octave: int = 2,
    positions_per_loss: int = 1,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean loss and mean position (counted from 1) of bins that hold comparable numbers of tokens.

    Bins are cut backwards from the last position, `per_octave` for each halving of it, and joined with the bin before
    until each holds 1/32 of all tokens: a bin of a few tokens is noise, which looks like a property of the attention.
    """
    known = np.flatnonzero(~np.isnan(losses))
    if not len(known):
        raise UserError("there is no loss to draw: no position had a token; validate on at least one sample")
    last, weights = known[-1] + 1, np.ones(len(known)) if tokens is None else tokens[known].astype(float)
    index = np.floor(per_octave * np.log2(last / (known + 1.0)) + 1e-9).astype(int)  # 0 for the last bin
    held = np.bincount(index, weights)
    joined, filled, least = np.zeros(len(held), int), 0.0, weights.sum() / LEAST
    for i, count in enumerate(held):  # the bin that each octave's part belongs to, from the last one back
        joined[i:] += i > 0 and filled >= least
        filled = count + (0.0 if i > 0 and joined[i] > joined[i - 1] else filled)
    if filled < least and joined[-1]:
        joined[joined == joined[-1]] -= 1  # the first tokens are too few for a bin of their own
    index = joined[index]
    held = np.bincount(index, weights)
    centres = known * positions_per_loss + (positions_per_loss + 1) / 2  # of the positions that a loss is the mean of
    mean = [(np.bincount(index, weights * x) / held)[::-1] for x in (centres, losses[known])]
    return mean[0], mean[1]


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure: (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
