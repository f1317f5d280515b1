"""Figures, drawn without pyplot: nothing global changes, and no display is needed.

matplotlib is imported on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def loss_by_position(losses: NDArray[np.floating], bins_per_octave: int = 2, positions_per_loss: int = 1) -> Figure:
    """Draw mean loss against the position in the context, in bins of equal width on a logarithmic axis.

    Args:
        losses: (seq_len,), nats, first position first; NaN where there was no token.
        bins_per_octave: bins from one position to its double.
        positions_per_loss: neighbouring positions that each loss is the mean of.

    Raises:
        ValueError: losses holds no number.
    """
    from matplotlib.figure import Figure

    centres, means = log_bins(losses, bins_per_octave)
    centres = centres * positions_per_loss
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(centres, means, marker="o", markersize=3)
    axes.set_xscale("log", base=2)
    axes.set_xlabel("position in the context (tokens)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    return figure


def log_bins(losses: NDArray[np.floating], per_octave: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean loss and mean position (counted from 1) of each bin that has tokens."""
    positions = np.flatnonzero(~np.isnan(losses))
    if not len(positions):
        raise ValueError("there is no loss to draw: no position had a token; validate on at least one sample")
    counted = positions + 1.0
    index = np.floor(np.log2(counted) * per_octave + 1e-9).astype(int)
    sizes = np.bincount(index)
    filled = sizes > 0
    mean = [np.bincount(index, weights)[filled] / sizes[filled] for weights in (counted, losses[positions])]
    return mean[0], mean[1]


def pixels(figure: Figure) -> NDArray[np.uint8]:
    """Render a figure: (height, width, 3)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()
