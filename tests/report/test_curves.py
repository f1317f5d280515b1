"""Curves of several runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib._pylab_helpers import Gcf
from matplotlib.colors import to_hex

from longnet_kit.report import curves, figures
from longnet_kit.report.compare import compare
from longnet_kit.report.curves import Points
from longnet_kit.report.metrics_file import Series


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(number: int, rows: int = 5, tags: str = "train/loss,train/tokens,train/seconds") -> None:
    """A finished run with training rows, and a validation at the end."""
    folder = Path(f"runs/a/version_{number}")
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text(f"name: a\noptimizer: {{lr: {number + 1}}}\n")
    (folder / "summary.json").write_text('{"status": "finished"}')
    values = ",".join(["{0}"] * len(tags.split(",")))
    lines = [f"step,{tags},val/loss", *(f"{i},{values.format(100 * i)}," for i in range(1, rows + 1))]
    (folder / "metrics.csv").write_text("\n".join([*lines, f"{rows},{',' * tags.count(',')},{number}"]) + "\n")


def series(points: list[tuple[float, float]]) -> Series:
    return Series(*np.array(points, dtype=float).reshape(-1, 2).T)


def test_values_stand_where_their_steps_were_in_tokens() -> None:
    tokens = series([(20, 400), (10, 100), (30, float("nan")), (40, 1000)])
    placed = curves.place(series([(5, 1), (10, 2), (15, 3), (40, 4), (30, 5), (44, 6)]), tokens)
    np.testing.assert_allclose(placed.x, [50, 100, 250, 700, 1000, 1120])  # the last at the pace of steps 20 to 40
    np.testing.assert_array_equal(placed.y, [1, 2, 3, 5, 4, 6])
    alone = curves.place(series([(5, 1), (20, 2)]), series([(10, 100)]))
    np.testing.assert_allclose(alone.x, [50, 200])
    np.testing.assert_array_equal(curves.place(series([(2, 1), (1, 3)]), None), [[1, 2], [3, 1]])


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=3000))
def test_a_band_keeps_every_extreme(values: list[float]) -> None:
    y = np.array(values)
    x = np.arange(len(y), dtype=float)
    band = curves.bands(Points(x, y))
    assert len(band.x) <= 200 and (np.diff(band.x) > 0).all()
    assert (band.low.min(), band.high.max()) == (y.min(), y.max())
    assert ((band.low <= band.middle) & (band.middle <= band.high)).all()
    length = -(-len(y) // 200)
    for i in range(len(band.x)):
        part = slice(i * length, (i + 1) * length)
        assert (band.low[i], band.high[i]) == (y[part].min(), y[part].max())
        assert band.middle[i] == pytest.approx(np.median(y[part])) and band.x[i] == pytest.approx(x[part].mean())


@pytest.mark.parametrize("number", [1, 2, 10, 11, 60])
def test_every_run_is_a_curve_of_its_own_colour_in_every_panel(number: int) -> None:
    points = Points(np.arange(3.0), np.arange(3.0))
    drawn = [(f"run {i}", {"a": points, "b": Points(points.x, points.y + i)}) for i in range(number)]
    figure = curves.figure(drawn, ["a", "b"], "steps")
    colours = [[to_hex(line.get_color()) for line in axes.lines] for axes in figure.axes]
    (legend,) = figure.legends
    assert colours[0] == colours[1] == [to_hex(handle.get_color()) for handle in legend.legend_handles]
    assert len(set(colours[0])) == number
    assert [text.get_text() for text in legend.texts] == [name for name, _ in drawn]
    np.testing.assert_array_equal(figure.axes[1].lines[-1].get_ydata(), points.y + number - 1)
    assert not Gcf.figs, "pyplot knows of the figure"


def test_nothing_of_a_crowded_figure_is_out_of_it() -> None:
    points = Points(np.arange(3.0), np.arange(3.0))
    drawn = [(f"lr={i}, backend=dilated", {"a": points}) for i in range(60)]
    figure = curves.figure(drawn, ["a"], "steps")
    figures.pixels(figure)
    legend, panel = figure.legends[0].get_window_extent(), figure.axes[0].get_window_extent()
    assert legend.x0 > panel.x1 and legend.x1 <= figure.bbox.x1 + 1 and legend.y0 >= figure.bbox.y0
    assert panel.width > 400


def test_a_long_curve_is_a_band_and_a_wild_point_is_out_of_view_and_told() -> None:
    y = np.sin(np.arange(5000) / 50)
    y[700] = 1e6
    figure = curves.figure([("a", {"t": Points(np.arange(5000.0), y)})], ["t"], "steps")
    (axes,) = figure.axes
    assert len(axes.collections) == 1 and len(axes.lines[0].get_xdata()) == 200
    assert axes.get_ylim()[1] < 2 and axes.get_title(loc="right") == "1 points out of view"
    assert figure.get_supxlabel().startswith("lines: medians")


def test_numbers_that_end_are_marked() -> None:
    y = np.array([1.0, np.nan, 3.0, np.inf])
    figure = curves.figure([("a", {"t": Points(np.arange(4.0), y)})], ["t"], "steps")
    curve, cross = figure.axes[0].lines
    np.testing.assert_array_equal(curve.get_xdata(), [0, 2])
    assert (cross.get_marker(), list(cross.get_xdata())) == ("x", [2])
    assert figure.get_supxlabel() == "crosses: from here on nan or inf"


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_the_file_is_what_its_name_says(suffix: str) -> None:
    make(0)
    make(1, rows=2000)
    text = compare([], plot=Path("curves" + suffix))
    assert text.endswith(f"wrote the curves of train/loss, val/loss to curves{suffix}")
    content = Path("curves" + suffix).read_bytes()
    assert {".png": b"PNG", ".pdf": b"%PDF", ".svg": b"<svg"}[suffix] in content and len(content) > 5000


def test_runs_that_do_not_know_their_tokens_are_left_out_with_a_word() -> None:
    make(0)
    make(1, tags="train/loss")
    text = compare([], plot=Path("curves.png"), against="tokens")
    assert "version_1: not in the plot: no train/tokens" in text
    assert "version_0: not in the plot" not in text
    with pytest.raises(ValueError, match="no run has train/loss or val/loss and train/tokens; draw against steps"):
        compare(["runs/a/version_1"], plot=Path("curves.png"), against="tokens")


def test_the_last_values_of_groups_are_drawn_over_what_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    make(0)
    make(1, tags="val/accuracy,val/accuracy@128,val/accuracy@16,val/accuracy@near,val/perplexity@16")
    drawn: list[tuple[str, dict[str, Points]]] = []
    figure = curves.figure
    monkeypatch.setattr(curves, "figure", lambda runs, *rest: drawn.extend(runs) or figure(runs, *rest))
    text = compare([], plot=Path("curves.png"), against="groups")
    assert "version_0: not in the plot: no number for val/accuracy@N or val/perplexity@N" in text
    assert text.endswith("wrote the curves of val/accuracy, val/perplexity to curves.png")
    ((_, points),) = drawn
    np.testing.assert_array_equal(points["val/accuracy"], [[16, 128], [500, 500]])
    np.testing.assert_array_equal(points["val/perplexity"], [[16], [500]])
    assert compare([], plot=Path("curves.png"), against="groups", metrics=["val/accuracy"]).endswith("to curves.png")
    for metric in ("val/accuracy@16", "val/loss"):
        with pytest.raises(ValueError, match=f"no run has {metric}@N; give --metric without its @, or draw against st"):
            compare([], plot=Path("curves.png"), against="groups", metrics=[metric])
    with pytest.raises(ValueError, match="no run has val/loss@N"):
        compare(["runs/a/version_0"], plot=Path("curves.png"), against="groups")


def test_groups_stand_evenly_where_they_double() -> None:
    points = Points(np.array([32.0, 64.0, 128.0]), np.arange(3.0))
    (axes,) = curves.figure([("a", {"t": points})], ["t"], "groups").axes
    assert axes.get_xscale() == "log"
    assert [axes.xaxis.get_major_formatter()(x) for x in points.x] == ["32", "64", "128"]


def test_a_plot_that_cannot_be_is_refused_before_runs_are_read() -> None:
    for plot, words in (
        ("curves.gif", r"the name must end in .png, .pdf or .svg"),
        ("curves", "the name must end in"),
        ("no/curves.png", "there is no folder no; name a file"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(["missing"], plot=Path(plot))
    with pytest.raises(
        ValueError, match="--against token: expected steps, tokens, flops, seconds, groups; did you mean 'tokens'"
    ):
        compare(["missing"], against="token")


def test_a_place_that_may_not_be_written_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    make(0)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("matplotlib.figure.Figure.savefig", refuse)
    with pytest.raises(ValueError, match=r"curves.png: cannot be written \(Permission denied\)"):
        compare([], plot=Path("curves.png"))


@pytest.mark.parametrize(
    ("against", "furthest", "unit"),
    [("steps", 1e9, "optimizer steps"), ("tokens", 3e9, "tokens (billions)"), ("tokens", 100, "tokens"),
     ("flops", 5e16, "training FLOPs (10^15)"),
     ("seconds", 60, "seconds of training"), ("seconds", 600, "minutes of training"),
     ("seconds", 9000, "hours of training"), ("groups", 256, "N of the tag's groups, @N")],
)  # fmt: skip
def test_the_axis_counts_in_a_unit_that_fits(against: str, furthest: float, unit: str) -> None:
    points = Points(np.array([0, furthest]), np.zeros(2))
    assert curves.figure([("a", {"t": points})], ["t"], against).axes[0].get_xlabel() == unit
