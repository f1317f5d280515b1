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


def grouped_run(number: int, **groups: float) -> None:
    """A run whose tags val/accuracy@N fall from twice their last values to these; and val/accuracy itself."""
    make(number)
    folder = Path(f"runs/a/version_{number}")
    tags = [f"val/accuracy@{name.removeprefix('of_')}" for name in groups]
    rows = [[1.0, *(2 * value for value in groups.values())], [0.5, *groups.values()]]
    lines = [f"{step},{','.join(map(str, row))}" for step, row in enumerate(rows, 1)]
    (folder / "metrics.csv").write_text("\n".join([",".join(["step,val/accuracy", *tags]), *lines]) + "\n")


def groups_drawn(monkeypatch: pytest.MonkeyPatch, *metrics: str) -> tuple[str, list[tuple[str, dict[str, Points]]]]:
    drawn: list[tuple[str, dict[str, Points]]] = []
    figure = curves.figure
    with monkeypatch.context() as patch:
        patch.setattr(curves, "figure", lambda runs, *rest: drawn.extend(runs) or figure(runs, *rest))
        return compare([], plot=Path("curves.png"), against="groups", metrics=metrics), drawn


def test_the_last_values_of_groups_are_drawn_over_what_they_are_named_after(monkeypatch: pytest.MonkeyPatch) -> None:
    make(0)
    grouped_run(1, of_128=0.25, of_0=0.75, of_16=0.5, of_near=0.1)
    text, ((_, points),) = groups_drawn(monkeypatch)
    assert "version_0: not in the plot: no number for val/accuracy@N" in text
    assert text.endswith("wrote the curves of val/accuracy to curves.png")
    np.testing.assert_array_equal(points["val/accuracy"], [[0, 16, 128], [0.75, 0.5, 0.25]])
    grouped_run(2, of_16=float("nan"))
    text, ((_, points),) = groups_drawn(monkeypatch, "val/accuracy")
    assert "version_2: not in the plot: no number for val/accuracy@N" in text


def test_metrics_without_groups_are_refused_where_groups_are_drawn() -> None:
    make(0)
    with pytest.raises(ValueError, match="--against groups: no run has a tag METRIC@N, as .*; draw against steps"):
        compare([], plot=Path("curves.png"), against="groups")
    assert "wrote" not in compare([], against="groups")
    grouped_run(1, of_16=0.5)
    for metric in ("val/accuracy@16", "val/loss", "nothing"):
        with pytest.raises(ValueError, match=f"--metric {metric}: no run has a tag {metric}@N, .* use val/accuracy$"):
            compare([], plot=Path("curves.png"), against="groups", metrics=["val/accuracy", metric])
    with pytest.raises(ValueError, match="--plot curves.png: no run has val/accuracy@N; choose another --metric"):
        grouped_run(2, of_16=float("inf"))
        compare(["runs/a/version_2"], plot=Path("curves.png"), against="groups")


@pytest.mark.parametrize("groups", [[32, 64, 128, 256], [1, 2], [512, 1024], [0, 1, 2, 4]])
def test_doublings_of_groups_are_evenly_apart_and_have_their_own_numbers(groups: list[int]) -> None:
    points = Points(np.array(groups, dtype=float), np.linspace(1, 0, len(groups)))
    figure = curves.figure([("a", {"t": points})], ["t"], "groups")
    (axes,) = figure.axes
    figures.pixels(figure)
    ticks = [(tick.get_loc(), tick.label1.get_text()) for tick in axes.xaxis.get_major_ticks()]
    assert ticks == [(group, f"{group:,}") for group in groups] and not len(axes.xaxis.get_minor_ticks())
    places = axes.transData.transform([(group, 0) for group in groups if group])[:, 0]
    np.testing.assert_allclose(np.diff(places), np.diff(places[:2])[0] * np.diff(np.log2(groups[-len(places) :])))


def test_many_groups_have_room_for_their_numbers() -> None:
    points = Points(np.arange(1.0, 101), np.arange(100.0))
    (axes,) = curves.figure([("a", {"t": points})], ["t"], "groups").axes
    assert 6 <= len(axes.get_xticks()) <= 12


def test_a_group_without_a_number_is_a_gap() -> None:
    points = Points(np.array([1.0, 2, 4, 8]), np.array([0.1, np.nan, 0.3, np.inf]))
    figure = curves.figure([("a", {"t": points})], ["t"], "groups")
    (curve,) = figure.axes[0].lines
    np.testing.assert_array_equal(curve.get_xdata(), points.x)
    np.testing.assert_array_equal(curve.get_ydata(), [0.1, np.nan, 0.3, np.nan])
    assert figure.get_supxlabel() == "gaps: nan or inf"


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
