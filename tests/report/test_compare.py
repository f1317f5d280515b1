"""`longnet compare`: which runs, which columns, in which order, and the curves."""

from __future__ import annotations

import csv
import html
import json
import re
import subprocess
import sys
from pathlib import Path

import markdown
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.report import columns, history, table
from longnet_kit.report.compare import compare
from longnet_kit.report.table import Column


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(path: str, losses: list[float], lr: float = 0.1, extra: str = "", status: str | None = "finished") -> Path:
    """A run with a validation loss every 10 steps, and what training rows have."""
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    name = "/".join(folder.parts[1:-1])
    (folder / "recipe.yaml").write_text(
        f"name: {name}\ndescription: {path}\noptimizer: {{name: adamw, lr: {lr}}}\n{extra}"
    )
    rows = ["step,train/loss,train/peak_memory,train/seconds,train/tokens,train/tokens_per_second,val/loss"]
    for i, loss in enumerate(losses, 1):
        rows += [f"{10 * i},{loss + 1},2.5e9,{1800 * i},{4096 * i},{1000 * i},", f"{10 * i},,,,,,{loss}"]
    (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
    if status is not None:
        (folder / "summary.json").write_text(json.dumps({"status": status}))
    return folder


def cells(text: str) -> list[list[str]]:
    """The first block of a printed table."""
    return [line.split() for line in text.split("\n\n")[0].splitlines()]


def test_runs_are_ranked_beside_what_differs_in_their_recipes() -> None:
    make("runs/sweep/a/version_0", [3, 2.25, 2.5], lr=0.1)
    make("runs/sweep/b/version_0", [3, 2, 2], lr=0.01)
    assert cells(compare([])) == [
        ["run", "status", "steps", "lr", "val/loss", "best", "tokens/s", "memory", "time"],
        ["b", "finished", "30", "0.01", "2", "2", "3,000", "2.5", "GB", "1:30:00"],
        ["a", "finished", "30", "0.1", "2.5000", "2.2500", "3,000", "2.5", "GB", "1:30:00"],
    ]


@given(st.permutations([1.5, 2.0, 3.0, float("nan"), float("inf"), None]), st.booleans())
def test_the_best_final_value_comes_first_and_what_is_none_last(values: list[float | None], larger: bool) -> None:
    tag = "train/mfu" if larger else "val/loss"
    data = [f"step,{tag}\n1,0\n2,{value}\n".encode() if value is not None else b"" for value in values]
    made = [history.History(Path(), "finished", None, {}, {}, history.Metrics(content), None, []) for content in data]
    ranked = [run.final(tag) for run in sorted(made, key=lambda run: columns.rank(run, tag))]
    assert ranked[:3] == ([3.0, 2.0, 1.5] if larger else [1.5, 2.0, 3.0])
    assert not np.isfinite(ranked[3:5]).any() and ranked[5] is None  # type: ignore[arg-type]


def test_more_tokens_per_second_are_better_and_best_ignores_nan() -> None:
    make("runs/a/version_0", [3, float("nan"), 2.5])
    make("runs/b/version_0", [3, 2, 2, 1.5])
    text = compare([], sort="train/tokens_per_second", metrics=["val/loss"])
    assert [row[0] for row in cells(text)] == ["run", "b", "a"]
    assert cells(text)[0][3:6] == ["train/tokens_per_second", "best", "val/loss"]
    assert "tokens/s" not in text
    assert cells(compare([], sort="val/loss"))[2][3:5] == ["2.5000", "2.5000"]


def test_only_keys_that_say_something_are_columns() -> None:
    make("runs/a/version_0", [1], extra="extends: x\nresume: auto\ndata: {name: same, size: [1, 2]}\ninit_from: null\n")
    make("runs/a/version_1", [2], extra="extends: y\nimports: [z]\ndata: {name: other, size: [1, 3]}\ninit_from: old\n")
    rows = [columns.Row(str(i), history.read(Path(f"runs/a/version_{i}"))) for i in range(2)]
    keys = columns.differing(rows)
    assert {key.name: (key.title, list(key.texts)) for key in keys} == {
        "data.name": ("data.name", ["same", "other"]),  # the recipe and the optimizer have a name too
        "data.size": ("size", ["1, 2", "1, 3"]),
        "init_from": ("init_from", ["null", "old"]),
    }


def test_the_name_is_a_column_where_the_folders_do_not_tell_it() -> None:
    for i in range(2):
        make(f"runs/a{i}/version_0", [1])
    rows = [columns.Row(str(i), history.read(Path(f"runs/a{i}/version_0"))) for i in range(2)]
    assert columns.differing(rows) == []
    Path("runs/a0").rename("runs/moved")
    rows[0] = columns.Row("0", history.read(Path("runs/moved/version_0")))
    assert [key.name for key in columns.differing(rows)] == ["name"]


def test_a_run_without_a_recipe_makes_no_key_differ() -> None:
    for i in range(2):
        make(f"runs/a/version_{i}", [1], lr=0.1 * (i + 1))
    (make("runs/b/version_0", [1]) / "recipe.yaml").unlink()
    text = compare([])
    assert cells(text)[0][3] == "lr" and cells(text)[0][4] == "val/loss"
    assert "b/version_0: no recipe.yaml" in text


def test_values_of_a_recipe_are_written_as_in_yaml() -> None:
    assert [columns.plain(v) for v in (None, True, 1, 3e-4, 1.0, [1, [2.5]], "a\nb")] == [
        "null", "true", "1", "0.0003", "1", "1, 2.5", "a b",
    ]  # fmt: skip


def test_what_is_wrong_is_said_of_each_run_and_the_others_are_shown() -> None:
    make("runs/a/version_0", [2])
    make("runs/a/version_1", [1], status=None)
    with (make("runs/a/version_2", [3]) / "metrics.csv").open("a") as file:
        file.write("20,oops,,,,,\n30,1")
    Path("runs/a/version_3").mkdir()
    Path("runs/b").mkdir()
    text = compare(["runs/a/version_*", "runs/b"], metrics=["train/loss"])
    assert [row[0] for row in cells(text)[1:]] == ["version_1", "version_0", "version_2"]
    notes = text.split("\n\n")[1].splitlines()
    assert notes[0].startswith("version_1: running: last written ")
    assert "line 5 is cut off, and left out" in notes[1]
    assert notes[2].startswith("runs/b: no run in it")
    assert notes[3].startswith("runs/a/version_3: left out: running: last written 0 s ago; no recipe.yaml; no metrics")
    with pytest.raises(ValueError, match=r"(?s)there is no run to compare.*runs/a/version_3: left out.*no recipe.yaml"):
        compare(["runs/a/version_3"])


def test_a_tag_that_no_run_has_is_told_with_the_nearest() -> None:
    make("runs/a/version_0", [2])
    with pytest.raises(ValueError, match=r"--sort val/los: .*did you mean 'val/loss'\? known: .*train/tokens"):
        compare([], sort="val/los")
    with pytest.raises(ValueError, match="--metric nothing: no run has this tag; known: train/loss"):
        compare([], metrics=["val/loss", "nothing"])


def test_without_validation_runs_are_ranked_by_their_training_loss() -> None:
    for i, loss in enumerate((3, 2)):
        run = make(f"runs/a/version_{i}", [loss])
        (run / "metrics.csv").write_text(f"step,train/loss\n1,{loss}\n")
    text = compare([])
    assert cells(text)[0][3:5] == ["train/loss", "best"]
    assert cells(text)[1] == ["version_1", "finished", "1", "2", "2", "-", "-", "-"]  # logged by an older kit


def test_runs_without_any_number_are_listed() -> None:
    (make("runs/a/version_0", []) / "metrics.csv").unlink()
    text = compare([])
    assert cells(text)[1] == ["a/version_0", "finished", "-", "-", "-", "-"]
    assert "a/version_0: no metrics: there is no metrics.csv" in text
    with pytest.raises(ValueError, match="no run has any yet"):
        compare([], sort="val/loss")


def test_the_file_has_full_names_and_values() -> None:
    make("runs/a/version_0", [1 / 3, 1 / 7, float("nan")], lr=1 / 3)
    make("runs/a/version_1", [2], lr=1e-5, extra="model: {rates: [1, 2]}\n")
    assert compare([], csv=Path("table.csv")).endswith("wrote 2 rows to table.csv")
    with Path("table.csv").open(newline="") as file:
        second, first = csv.DictReader(file)
    assert first["run"] == "runs/a/version_0" and second["run"] == "runs/a/version_1"
    assert float(first["optimizer.lr"]) == pytest.approx(1 / 3, abs=0) and float(second["optimizer.lr"]) == 1e-5
    assert (first["val/loss"], float(first["best val/loss"])) == ("nan", 1 / 7)
    assert (first["model.rates"], second["model.rates"]) == ("", "1, 2")
    assert float(first["train/peak_memory"]) == 2.5e9 and float(first["train/seconds"]) == 5400
    with pytest.raises(ValueError, match="no/table.csv: cannot be written"):
        compare([], csv=Path("no/table.csv"))


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=y>",
        "a|b",
        r"a\|b",
        "`a`",
        "![a](http://x/y.png)",
        "[a][b]",
        "*a*",
        "~~a~~",
        "&lt;",
        "a_b [8, 32]",
    ],
)
def test_markdown_shows_a_cell_as_it_is(text: str) -> None:
    column = Column("run", "run", [text], [text], is_right=False)
    page = markdown.markdown(table.markdown([column, column]), extensions=["tables"])
    cells = re.findall("<td>(.*?)</td>", page)
    assert len(cells) == 2 and {html.unescape(cell) for cell in cells} == {text}
    assert re.search("<(img|a|em|code|del)", page) is None


def test_a_cell_stays_on_its_line_in_text_and_in_markdown() -> None:
    column = Column("run", "run", ["x"], ["a\nb\x1b[2J"], is_right=False)
    assert table.text([column]) == "run\n" + r"a\u000ab\u001b[2J"
    assert table.markdown([column]).splitlines()[2:] == ["| a&#92;u000ab&#92;u001b[2J |"]


def test_a_fence_is_longer_than_those_in_its_text() -> None:
    text = "a\n```\n<img src=x>\n`````\nb"
    page = markdown.markdown(table.fenced(text, "yaml"), extensions=["fenced_code"])
    assert page.startswith("<pre>") and "<img" not in page and html.unescape(page).count(text) == 1


def test_markdown_is_one_table_and_a_list() -> None:
    make("runs/a/version_0", [1], extra="data: {source: a|b}\n")
    make("runs/a/version_1", [2], status=None)
    lines = compare([], markdown=True).splitlines()
    assert lines[1].replace("-", "").replace(":", "").replace("|", "").strip() == ""
    assert lines[2].startswith(r"| version_0 | finished | 10 | a\|b | 1 |") and lines[5].startswith(
        "- version_1: running"
    )
    assert len({line.replace(r"\|", "").count("|") for line in lines[:4]}) == 1


@given(st.integers(20, 200), st.lists(st.integers(1, 30), min_size=1, max_size=8))
def test_no_line_is_broken_where_each_column_fits_beside_the_first(width: int, widths: list[int]) -> None:
    made = [Column("run", "run", ["a"], ["a"], is_right=False)]
    made += [Column(f"c{i}", f"c{i}", [0], ["x" * n]) for i, n in enumerate(widths)]
    text = table.text(made, width)
    assert all(len(line) <= max(width, 3 + 2 + max(widths)) for line in text.splitlines())
    assert sum(text.count("x" * n) >= 1 for n in widths) == len(widths)
    assert len(table.text(made).splitlines()) == 2


@pytest.mark.parametrize(
    ("value", "text"),
    [(2.0, "2"), (3.63686, "3.6369"), (12345.6, "12,346"), (3e-4, "0.0003"), (1.23e12, "1.23e+12"), (0.0, "0"),
     (float("nan"), "nan"), (float("-inf"), "-inf")],
)  # fmt: skip
def test_numbers_keep_the_digits_that_say_something(value: float, text: str) -> None:
    assert table.number(value) == text


def test_sizes_and_times_are_written_for_people() -> None:
    assert [table.size(n) for n in (999, 1.5e3, 23.456e9)] == ["999 B", "1.5 kB", "23.46 GB"]
    assert [table.duration(s) for s in (0, 61.6, 360_000)] == ["0:00:00", "0:01:02", "100:00:00"]


def test_importing_and_comparing_needs_neither_torch_nor_matplotlib() -> None:
    make("runs/a/version_0", [1])
    code = (
        "import sys; from longnet_kit.report.compare import compare; compare([]); "
        "sys.exit(bool({'torch', 'lightning', 'matplotlib'} & set(sys.modules)))"
    )
    root = str(Path(__file__).parents[2])
    assert subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": root}).returncode == 0


def test_many_long_runs_are_compared_and_drawn_and_columns_not_asked_for_are_not_read() -> None:
    others = [f"other/{i}" for i in range(11)]
    rows = [f"step,train/loss,val/loss,{','.join(others)}"]
    rows += [
        f"{i},{5 - i / 3000!r},{1000 / i!r},{','.join(['0.123456789' if i > 1 else 'oops'] * 11)}"
        for i in range(1, 10_001)
    ]
    for i in range(50):
        folder = make(f"runs/sweep/{i}/version_0", [], lr=i + 1)
        (folder / "metrics.csv").unlink()
        if i == 0:
            (folder / "metrics.csv").write_text("\n".join(rows) + "\n")
        else:
            (folder / "metrics.csv").hardlink_to("runs/sweep/0/version_0/metrics.csv")
    text = compare([], metrics=["val/loss", "other/3"], plot=Path("curves.png"))
    assert len(cells(text)) == 51 and cells(text)[7][:7] == [
        "6",
        "finished",
        "10000",
        "7",
        "0.1000",
        "0.1000",
        "0.1235",
    ]
    assert text.count("line 2 other/3 is 'oops', not a number") == 50  # drawn, so read
    assert "other/4" not in text
    assert Path("curves.png").stat().st_size > 10_000
