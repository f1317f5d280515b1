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


def as_label(text: str) -> str:
    """Escape text that a figure shows: a dollar sign begins no formula."""
    return terminal.printable(text, keep="").replace("$", r"\$")


def loss_by_position(losses: NDArray[np.floating], bins_per_octave: int = 2, positions_per_loss: int = 1) -> Figure:
    """Draw mean loss against the position in the context, in bins of equal width on a logarithmic axis.

    Args:
        losses: (seq_len,), nats, first position first; NaN where there was no token.
        bins_per_octave: bins from one position to its double.
        positions_per_loss: neighbouring positions that each loss is the mean of.

    Raises:
        UserError: losses holds no number.
    """
    from matplotlib.figure import Figure

    centres, means = log_bins(losses, bins_per_octave, positions_per_loss)
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
    losses: NDArray[np.floating], per_octave: int, positions_per_loss: int = 1
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean loss and mean position (counted from 1) of each bin that has tokens.

    Bins are cut backwards from the last position, so that the last bin is as wide as its octave's others: a last bin of
    a few positions is noise that looks like a cliff. A bin begins after the position at which the one before it ends.
    """
    known = np.flatnonzero(~np.isnan(losses))
    if not len(known):
        raise UserError("there is no loss to draw: no position had a token; validate on at least one sample")
    last = known[-1] + 1
    index = np.floor(per_octave * np.log2(last / (known + 1.0)) + 1e-9).astype(int)  # 0 for the last bin
    sizes = np.bincount(index)
    filled = sizes > 0
    centres = known * positions_per_loss + (positions_per_loss + 1) / 2  # of the positions that a loss is the mean of
    mean = [(np.bincount(index, weights)[filled] / sizes[filled])[::-1] for weights in (centres, losses[known])]
    return mean[0], mean[1]


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure: (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
