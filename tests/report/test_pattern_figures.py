"""Pattern figures: every panel is the pattern, cell by cell, and long sequences cost little."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from matplotlib._pylab_helpers import Gcf
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from longnet_kit.attention.patterns import BlockSparse, Dense, Dilated, Pattern
from longnet_kit.report import figures, pattern_panels
from longnet_kit.report.pattern_figures import pattern_figure
from tests.attention.oracle import dilated_options
from tests.report.test_pattern import Skewed

pytestmark = pytest.mark.filterwarnings("ignore:no branch has dilation rate 1")
SMALL = Dilated([4, 8, 16], [1, 2, 4])


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.images]


def seen(axes: Axes) -> Tensor:
    """Which keys a panel colours: (C, C) bool."""
    rgb = np.asarray(axes.images[0].get_array())
    blank = [np.isclose(rgb, to_rgb(colour)).all(-1) for colour in ("#eceff2", "#ffffff")]
    return torch.from_numpy(~(blank[0] | blank[1]))


def pooled(m: Tensor, cell: int) -> Tensor:
    """Means over cells, written out: (N, N) to (C, C)."""
    return torch.stack([torch.stack([c.double().mean() for c in rows.split(cell, 1)]) for rows in m.split(cell, 0)])


@given(
    options=dilated_options(),
    seq_len=st.integers(1, 60),
    heads=st.integers(1, 6),
    causal=st.booleans(),
    cell=st.integers(1, 9),
)
def test_pictures_are_means_of_the_multiplicity(
    options: dict[str, Any], seq_len: int, heads: int, causal: bool, cell: int
) -> None:
    pattern, chosen = Dilated(**options), [heads - 1, 0]
    found = pattern_panels.branch_pictures(pattern, chosen, seq_len, heads, causal, cell)
    for branch, pictures in zip(pattern.branches, found, strict=True):
        m = pattern.branch_multiplicity(branch, seq_len, heads, causal)
        for head, picture in zip(chosen, pictures, strict=True):
            torch.testing.assert_close(picture.double(), pooled(m[head], cell), rtol=1e-6, atol=1e-6)
    for overlap in ("multiset", "set"):
        pattern = Dilated(**options, overlap=overlap)  # type: ignore[arg-type]
        together = pattern_panels.picture_together(pattern, found, chosen, seq_len, heads, causal, cell)
        by_rows = pattern_panels.pictures(pattern, chosen, seq_len, heads, causal, cell)
        torch.testing.assert_close(by_rows, together, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("pattern", [Dense(), BlockSparse("fixed", 3, 2), BlockSparse("local", 5, 2), Skewed()])
@pytest.mark.parametrize("entries", [1, 200, 2**22])
def test_pictures_from_rows_do_not_show_their_chunks(
    pattern: Pattern, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pattern_panels, "_ENTRIES", entries)
    for seq_len, cell in ((1, 1), (17, 1), (17, 4), (32, 8)):
        found = pattern_panels.pictures(pattern, [1], seq_len, 3, True, cell)
        expected = pooled(pattern.multiplicity(seq_len, 3, True)[1], cell)
        torch.testing.assert_close(found[0].double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "heads"), [(16, 4), (17, 1), (1, 4), (100, 3)])
def test_panels_show_each_branch_and_the_mixture(length: int, heads: int, causal: bool) -> None:
    made = panels(pattern_figure(SMALL, length, heads, causal))
    groups = pattern_panels.alike(SMALL, length, heads, causal)
    assert len(made) == 4 * len(groups)
    for row, group in enumerate(groups):
        parts = [SMALL.branch_multiplicity(branch, length, heads, causal) for branch in SMALL.branches]
        for axes, m in zip(made[4 * row :], [*parts, SMALL.multiplicity(length, heads, causal)], strict=False):
            assert torch.equal(seen(axes), m[group[0]] > 0)
        assert made[4 * row].get_ylabel() == pattern_panels.name(group, heads)
    assert [axes.get_title() for axes in made[:4]] == ["w=4, r=1", "w=8, r=2", "w=16, r=4", "mixed"]


def test_the_union_of_a_set_has_one_colour_and_no_legend() -> None:
    pattern = Dilated([4, 8, 16], [1, 2, 4], overlap="set")
    figure = pattern_figure(pattern, 16, 4, note="as it were")
    made = panels(figure)
    assert made[3].get_title() == "union" and not figure.legends
    assert torch.equal(seen(made[3]), SMALL.multiplicity(16, 4, True)[0] > 0)
    assert len({tuple(colour) for colour in np.asarray(made[3].images[0].get_array()).reshape(-1, 3)}) == 3
    assert figure.get_supxlabel() == "key position\nas it were"


def test_the_mixture_is_coloured_by_multiplicity_and_the_legend_says_how() -> None:
    figure = pattern_figure(SMALL, 16, 4)
    rgb = np.asarray(panels(figure)[3].images[0].get_array())
    m = SMALL.multiplicity(16, 4, True)[0]
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["1", "2", "3"]
    for patch, count in zip(legend.get_patches(), (1, 2, 3), strict=True):
        shade = np.isclose(rgb, np.array(patch.get_facecolor())[:3]).all(-1)
        assert torch.equal(torch.from_numpy(shade), m == count)


def test_segment_borders_and_lines_between_tokens_are_drawn() -> None:
    made = panels(pattern_figure(SMALL, 18, 4))
    assert [len(axes.patches) for axes in made[:4]] == [5, 3, 2, 0]
    last = made[0].patches[-1]
    assert (last.get_x(), last.get_y(), last.get_width(), last.get_height()) == (15.5, 15.5, 2, 2)  # type: ignore[attr-defined]
    assert len(made[0].collections) == 2 and not panels(pattern_figure(SMALL, 33, 4))[0].collections
    assert not panels(pattern_figure(Dilated([1], [1]), 100, 4))[0].patches


def test_one_column_is_laid_out_across_by_heads() -> None:
    figure = pattern_figure(Dilated([8], [4]), 16, 6)
    titles = ["heads 0, 4", "heads 1, 5", "head 2", "head 3"]
    assert [axes.get_title() for axes in panels(figure)] == titles
    assert figure.get_suptitle() == "w=8, r=4"
    assert [axes.get_title() for axes in panels(pattern_figure(Dense(), 9, 4))] == ["all 4 heads"]
    assert [axes.get_title() for axes in panels(pattern_figure(Skewed(), 9, 4))] == ["heads 0, 2", "heads 1, 3"]


def test_more_than_eight_distinct_heads_are_told_of() -> None:
    figure = pattern_figure(Dilated([16, 16], [1, 12]), 16, 23)  # head 8 with head 20, 9 with 21, 10 with 22, 11 alone
    assert len(panels(figure)) == 8 * 3
    assert "7 more heads" in figure.get_supxlabel()
    assert "more" not in pattern_figure(Dilated([16, 16], [1, 8]), 16, 8).get_supxlabel()


@pytest.mark.parametrize("causal", [True, False])
def test_a_long_sequence_is_pooled(causal: bool) -> None:
    pattern = Dilated([256, 512, 1024], [1, 2, 4])
    figure = pattern_figure(pattern, 2048, 4, causal)
    made = panels(figure)
    for axes, branch in zip(made, pattern.branches, strict=False):
        cells = seen(axes)
        assert len(cells) <= 512 and 2048 % len(cells) == 0
        m = pattern.branch_multiplicity(branch, 2048, 1, causal)[0]
        assert torch.equal(cells, pooled_any(m, 2048 // len(cells)))
    assert "mean of 8 x 8 tokens" in figure.axes[-1].get_xlabel()


def pooled_any(m: Tensor, cell: int) -> Tensor:
    return (m.unflatten(0, (-1, cell)).unflatten(2, (-1, cell)) > 0).any(3).any(1)


def test_a_very_long_sequence_takes_seconds() -> None:
    began = time.perf_counter()
    pattern = Dilated([2048, 4096, 8192, 16384, 32768], [1, 2, 4, 6, 12])
    assert len(panels(pattern_figure(pattern, 16_384, 12))) == 8 * 6
    assert time.perf_counter() - began < 60  # on a busy machine; 2.5 on an idle one


@pytest.mark.parametrize("length", [0, 65_537])
def test_lengths_that_cannot_be_drawn_are_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"length is {length}.*1 to 65536"):
        pattern_figure(SMALL, length, 4)


@pytest.mark.parametrize("length", [1, 16, 17, 129])
def test_figures_render_without_pyplot(length: int) -> None:
    pixels = figures.pixels(pattern_figure(SMALL, length, 4))
    assert pixels.std() > 5 and not Gcf.figs


def test_importing_the_module_does_not_import_matplotlib() -> None:
    code = "import sys, longnet_kit.report.pattern; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
