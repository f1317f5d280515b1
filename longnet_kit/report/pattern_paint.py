"""The colours of pattern pictures, and one panel of a figure; `pattern_figures` arranges them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HUES = ("#3568a8", "#d9772b", "#2f9268", "#b03a6b", "#7555b8", "#9a7d1e", "#2f93a8", "#6b7280")
"""One per branch, in turn."""
SEPARATE = 32
"""The longest sequence whose tokens are set apart by lines."""
_MOST_SEGMENTS = 64
"""As many segments of a branch get a border; more would cover the picture."""
_UNSEEN, _AHEAD, _BORDER, _FRAME = "#eceff2", "#ffffff", "#343a40", "#b6bcc4"
_MIXED = "YlGnBu"


class Paint:
    """How multiplicities become colours: exact counts have one each, means over cells a logarithmic scale.

    Args:
        length: tokens in the sequence.
        cell: tokens along the side of a cell; 1: pictures are exact.
        causal: keys after a query are left white.
        pictures: (columns, heads, C, C), all that will be drawn; they span the scale.
    """

    def __init__(self, length: int, cell: int, causal: bool, pictures: Tensor) -> None:
        from matplotlib import colormaps
        from matplotlib.colors import ListedColormap, LogNorm, to_rgb

        self._length, self._cell, self._rgb = length, cell, to_rgb
        most = max(1.0, float(pictures.max()))
        # What is common in the sparsest column, and not the least: cells at a border hold next to nothing.
        least = min((float(column[column > 0].median()) for column in pictures if column.any()), default=1.0)
        cmap = colormaps[_MIXED]
        self._most = round(most)
        self._shades = [cmap(x)[:3] for x in np.linspace(0.35 if self._most > 1 else 0.7, 0.95, self._most)]
        self._scale = LogNorm(min(least, most / 10), most)
        self._cmap = ListedColormap(cmap(np.linspace(0.15, 1, 256))).with_extremes(bad=_UNSEEN)
        side = np.arange(pictures.shape[-1])
        self._ahead = causal & (side[None, :] > side[:, None])

    def panel(self, axes: Axes, picture: NDArray[np.float32], hue: str | None) -> None:
        """Draw one picture, (C, C), with its ticks and its grid; in one hue, or in the colours of the mixture."""
        side = len(picture) * self._cell - 0.5
        axes.imshow(self._colours(picture, hue), extent=(-0.5, side, side, -0.5), **self._resampling())
        axes.set_xlim(-0.5, self._length - 0.5)
        axes.set_ylim(self._length - 0.5, -0.5)
        step = 1 << max(0, (self._length - 1).bit_length() - 2)  # a power of two, as segments mostly are
        ticks = range(0, self._length, step)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_ticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.tick_params(labelsize=7, length=2, color=_FRAME)
        for spine in axes.spines.values():
            spine.set(color=_FRAME, linewidth=0.8)
        if self._length <= SEPARATE:
            between = np.arange(0.5, self._length - 1)
            axes.vlines(between, -0.5, self._length - 0.5, color="white", linewidth=0.8)
            axes.hlines(between, -0.5, self._length - 0.5, color="white", linewidth=0.8)

    def segments(self, axes: Axes, w: int) -> None:
        """Draw the borders of segments of `w` tokens."""
        from matplotlib.patches import Rectangle

        if self._length > w * _MOST_SEGMENTS:
            return
        for start in range(0, self._length, w):
            size = min(w, self._length - start)
            axes.add_patch(Rectangle((start - 0.5, start - 0.5), size, size, fill=False, ec=_BORDER, lw=0.9, zorder=3))

    def key(self, figure: Figure, counted: bool) -> None:
        """Say above the panels what the colours mean; `counted`: some panel has those of the mixture."""
        if self._cell > 1:
            from matplotlib.cm import ScalarMappable
            from matplotlib.ticker import LogLocator

            bar = figure.colorbar(
                ScalarMappable(self._scale, self._cmap), ax=figure.axes, location="top", shrink=0.5, aspect=40,
                pad=0.2 / figure.get_figheight(),
                label=f"times a key is seen, mean of {self._cell} x {self._cell} tokens", format="%g",
                ticks=LogLocator(subs=(1, 2, 5)),
            )  # fmt: skip
            bar.minorticks_off()
            bar.ax.tick_params(labelsize=7)
            bar.ax.xaxis.label.set_fontsize(8)
        elif counted and self._most > 1:
            from matplotlib.patches import Patch

            handles = [Patch(facecolor=shade, label=str(i + 1)) for i, shade in enumerate(self._shades)]
            figure.legend(
                handles=handles, title="branches that show the key", loc="outside upper right", ncols=8,
                fontsize=8, title_fontsize=8, frameon=False, handlelength=1, handleheight=1, columnspacing=1,
            )  # fmt: skip

    def _colours(self, picture: NDArray[np.float32], hue: str | None) -> NDArray[Any]:
        """(C, C, 3)."""
        if self._cell > 1:
            rgb = self._cmap(self._scale(np.ma.masked_equal(picture, 0)))[..., :3]
        else:
            shades = self._shades if hue is None else [self._rgb(hue)]
            palette = np.array([self._rgb(_UNSEEN), *shades])
            rgb = palette[np.minimum(picture.round().astype(int), len(shades))]
        rgb[self._ahead] = self._rgb(_AHEAD)
        return rgb

    def _resampling(self) -> dict[str, Any]:
        """Blow tokens up without blur; smooth cells, which are about as small as pixels."""
        return {"interpolation": "nearest" if self._cell == 1 else "antialiased"}
