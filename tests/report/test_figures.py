"""Figures."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib._pylab_helpers import Gcf

from longnet_kit.report import figures


def test_each_bin_is_the_mean_of_its_positions() -> None:
    losses = np.arange(16.0)
    centres, means = figures.log_bins(losses, per_octave=1)  # positions 1 | 2 | 3-4 | 5-8 | 9-16
    np.testing.assert_allclose(centres, [1, 2, 3.5, 6.5, 12.5])
    np.testing.assert_allclose(means, [0, 1, 2.5, 5.5, 11.5])
    centres, _ = figures.log_bins(losses, per_octave=1, positions_per_loss=4)  # the first is that of positions 1 to 4
    np.testing.assert_allclose(centres, [2.5, 6.5, 12.5, 24.5, 48.5])
    centres, means = figures.log_bins(np.array([4.0, 2.0, 1.0, 1.0]), np.array([1, 99, 150, 150]), per_octave=1)
    np.testing.assert_allclose(centres, [199 / 100, 3.5])  # the only token of position 1 is too few for a bin
    np.testing.assert_allclose(means, [202 / 100, 1])


def bins_of(losses: np.ndarray, tokens: np.ndarray, per_octave: int) -> list[float]:
    """How many tokens each bin holds, found by marking a position at a time."""
    shares: list[float] = []
    for position in np.flatnonzero(~np.isnan(losses)):
        marked = np.where(np.isnan(losses), np.nan, 0.0)
        marked[position] = 1
        means = figures.log_bins(marked, tokens, per_octave)[1]
        shares = shares or [0.0] * len(means)
        bin_ = int(np.flatnonzero(means)[0])
        shares[bin_] = tokens[position] / means[bin_]
    return shares


@pytest.mark.parametrize("length", [16, 100, 127, 128, 129, 500])
@pytest.mark.parametrize("per_octave", [1, 2])
@pytest.mark.parametrize("kind", ["dense", "gaps", "uneven", "one at the end"])
def test_bins_hold_comparable_numbers_of_tokens(length: int, per_octave: int, kind: str) -> None:
    rng = np.random.default_rng(length)
    losses, tokens = np.zeros(length), np.full(length, 3)
    if kind == "gaps":
        losses[rng.random(length) < 0.7] = np.nan
    if kind == "uneven":
        tokens = rng.integers(1, 1000, length)
    if kind == "one at the end":
        losses[length // 10 : -1] = np.nan
    held = bins_of(losses, tokens, per_octave)
    known = tokens[~np.isnan(losses)]
    assert sum(held) == pytest.approx(known.sum())
    assert min(held) >= known.sum() / 32 * (1 - 1e-9)
    if kind == "dense" and length >= 100:
        assert len(held) >= 4 * per_octave, "the axis still has points in each octave"


def test_positions_without_tokens_are_left_out() -> None:
    losses = np.array([1.0, np.nan, 3.0, np.nan, np.nan, np.nan, np.nan, 8.0])
    centres, means = figures.log_bins(losses, per_octave=1)
    np.testing.assert_allclose(centres, [1, 3, 8])
    np.testing.assert_allclose(means, [1, 3, 8])
    centres, _ = figures.log_bins(np.append(losses, [np.nan] * 3), per_octave=1)  # the last bin ends where tokens end
    np.testing.assert_allclose(centres, [1, 3, 8])
    with pytest.raises(ValueError, match="no position had a token"):
        figures.loss_by_position(np.full(4, np.nan))


@pytest.mark.parametrize("length", [1, 2, 3, 1024, 100_000])
def test_every_position_is_in_one_bin(length: int) -> None:
    losses = np.random.default_rng(0).random(length)
    for per_octave in (1, 2, 3):
        centres, means = figures.log_bins(losses, per_octave=per_octave)
        assert (np.diff(centres) > 0).all()
        assert len(centres) <= per_octave * (np.log2(length) + 1) + 1
        assert losses.min() <= means.min() and means.max() <= losses.max()


def test_the_figure_shows_the_bins_without_pyplot() -> None:
    losses = np.linspace(5, 2, 600)
    figure = figures.loss_by_position(losses)
    (axes,) = figure.axes
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_xydata(), np.stack(figures.log_bins(losses), axis=1))
    assert axes.get_xscale() == "log"
    pixels = figures.pixels(figure)
    assert pixels.dtype == np.uint8 and pixels.shape[2] == 3 and pixels.std() > 5
    assert not Gcf.figs, "pyplot knows of the figure"


def test_the_perplexity_of_each_context_stands_at_its_length() -> None:
    (axes,) = figures.perplexity_by_context({1024: 3.0, 256: 5.0, 512: 4.0}).axes
    np.testing.assert_array_equal(axes.lines[0].get_xydata(), [[256, 5], [512, 4], [1024, 3]])
    assert [label.get_text() for label in axes.get_xticklabels()] == ["256", "512", "1,024"]


def test_a_dollar_in_a_name_begins_no_formula() -> None:
    figure = figures.confusion(np.eye(2, dtype=int), [r"$\nothing$", "a$"])
    figures.pixels(figure)  # which would read the formula
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == [r"\$\nothing\$", r"a\$"]


def test_each_layers_shares_stand_in_its_bar_under_their_branch() -> None:
    shares = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    figure = figures.branch_weights(shares, [(4, 1), (8, 2), (2048, 4)])
    (axes,) = figure.axes
    for branch, container in enumerate(axes.containers):
        bars = sorted(container, key=lambda bar: bar.get_y())
        np.testing.assert_allclose([bar.get_width() for bar in bars], shares[:, branch])
        np.testing.assert_allclose([bar.get_x() for bar in bars], shares[:, :branch].sum(1))
    assert axes.yaxis_inverted()
    assert [label.get_text() for label in axes.get_yticklabels()] == ["layer 0", "layer 1"]
    handles = [text.get_text() for text in figure.legends[0].get_texts()]
    assert handles == ["w=4 r=1", "w=8 r=2", "w=2,048 r=4"]


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, longnet_kit.report.figures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_confusion_is_drawn_in_shares_of_the_right_class() -> None:
    counts = np.array([[6, 2, 0], [0, 0, 0], [1, 1, 2]])
    axes = figures.confusion(counts, ["a", "b", "c"]).axes[0]
    np.testing.assert_allclose(axes.images[0].get_array(), [[0.75, 0.25, 0], [0, 0, 0], [0.25, 0.25, 0.5]])
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a (8)", "b (0)", "c (4)"]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("given class", "right class")
