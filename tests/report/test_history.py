"""Runs read back, whole and broken."""

from __future__ import annotations

import csv
import io
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit import durable, runs
from longnet_kit.report import history
from longnet_kit.report.metrics_file import Metrics

NOW = 1_800_000_000.0
TAGS = ("train/loss", "train/lr", "val/loss", "val/loss, smooth")
CELLS = st.none() | st.floats(width=64) | st.integers(-5, 5)
ROWS = st.lists(st.tuples(st.integers(0, 20), *[CELLS] * len(TAGS)), min_size=1, max_size=12)
ENDS = st.sampled_from(["\n", "\r\n"])
FILE = (
    b"step,train/loss,train/lr,val/loss\r\n2,5.418259212747216,0.0003,\r\n2,,,4.25\r\n"
    b"step,train/loss,val/loss,z\r\n4,4.9,,1\r\n6,nan,3.5,-inf\r\n8,4.25e-05,,\r\n"
)


def written(rows: list[tuple], end: str = "\n", tags: tuple[str, ...] = TAGS) -> bytes:
    """A metrics.csv as csv.writer writes it."""
    text = io.StringIO()
    csv.writer(text, lineterminator=end).writerows([("step", *tags), *rows])
    return text.getvalue().encode()


def make(
    folder: Path, recipe: str | None = "name: a\n", summary: str | None = None, metrics: bytes | None = None
) -> Path:
    """A run directory of these files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("recipe.yaml", recipe), ("summary.json", summary), ("metrics.csv", metrics)):
        if content is not None:
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


@given(ROWS, ENDS)
def test_every_column_is_what_the_csv_module_reads(rows: list[tuple], end: str) -> None:
    data = written(rows, end)
    metrics = Metrics(data)
    assert metrics.problems == [] and tuple(metrics.tags) == TAGS
    assert metrics.last_step == max(row[0] for row in rows)
    for tag in TAGS:
        read = [(float(r["step"]), float(r[tag])) for r in csv.DictReader(io.StringIO(data.decode())) if r[tag]]
        series = metrics.series(tag)
        np.testing.assert_array_equal(np.stack(series, axis=1), np.reshape(read, (-1, 2)))
        np.testing.assert_equal(metrics.last(tag), read[-1][1] if read else None)
    assert metrics.problems == []


def assert_part_of(part: Metrics, whole: Metrics) -> None:
    """Every value of a part is the whole file's, in its place."""
    assert set(part.tags) <= set(whole.tags)
    for tag in part.tags:
        for some, every in zip(part.series(tag), whole.series(tag), strict=True):
            np.testing.assert_array_equal(some, every[: len(some)])
        values = part.series(tag).values
        np.testing.assert_equal(part.last(tag), values[-1] if len(values) else None)


def assert_cut_is_told(data: bytes, offset: int) -> None:
    part = Metrics(data[:offset])
    assert_part_of(part, Metrics(data))
    if offset and data[offset - 1 : offset] != b"\n":
        line = data[:offset].count(b"\n") + 1
        assert f"line {line} is cut off, and left out" in part.problems
    else:
        assert not any("cut off" in problem for problem in part.problems)


@pytest.mark.parametrize("offset", range(len(FILE) + 1))
def test_a_file_cut_at_any_byte_gives_whole_lines_and_says_so(offset: int) -> None:
    assert_cut_is_told(FILE, offset)


@given(ROWS, ENDS, st.data())
def test_any_file_cut_anywhere_gives_whole_lines_and_says_so(rows: list[tuple], end: str, draw: st.DataObject) -> None:
    data = written(rows, end)
    assert_cut_is_told(data, draw.draw(st.integers(0, len(data))))


def test_rows_under_another_header_are_read_by_it() -> None:
    metrics = Metrics(FILE)
    assert metrics.problems == ["line 4 is another header, by which the lines after it are read"]
    np.testing.assert_array_equal(
        metrics.series("train/loss"), [[2, 4, 6, 8], [5.418259212747216, 4.9, np.nan, 4.25e-5]]
    )
    np.testing.assert_array_equal(metrics.series("val/loss"), [[2, 6], [4.25, 3.5]])
    np.testing.assert_array_equal(metrics.series("train/lr"), [[2], [0.0003]])
    assert (metrics.last("val/loss"), metrics.last("z"), metrics.last("train/lr")) == (3.5, -np.inf, 0.0003)
    assert metrics.last("nothing") is None and not len(metrics.series("nothing").values)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", None),
        (b"step,a\n", None),
        (b"\xef\xbb\xbfstep,a\n1,2\n\n", None),
        (b"step,a\n1,2\n2,3,4\n3,4\n", "line 3 has 3 cells, not 2"),
        (b"step,a\n1,2\n2\n2,3,4\n3,4\n", "line 3 has 1 cell, not 2 (1 more cannot be read)"),
        (b"step,a\n1,2\n,5\n3,4\n", "line 3 has no step that is a whole number"),
        (b"step,a\n1,2\nnan,5\n3,4\n", "line 3 has no step that is a whole number"),
        (b"step,a\n1,2\n2.5,5\n3,4\n", "line 3 has no step that is a whole number"),
        (b"step,a\n1,2\n2,x\xff\n3,4\n", "line 3 a is 'x\ufffd', not a number"),
        (b"step,a\n1,2\n2,1\x002\n3,4\n", "line 3 a is '1\\x002', not a number"),
        (b"step,a\n1,2\n" + bytes(50) + b"\n3,4\n", "line 3 has 1 cell, not 2"),
        (b"0,7\nstep,a\n1,2\n3,4\n", "line 1 stands before the header"),
        (b"a,b\n1,2\n", "no line is a header that names a 'step' column"),
        (bytes(range(256)) * 4, "no line is a header that names a 'step' column"),
    ],
)
def test_what_cannot_be_read_is_told_and_the_rest_is_used(data: bytes, problem: str | None) -> None:
    metrics = Metrics(data)
    series = metrics.series("a")
    if b"3,4" in data:
        np.testing.assert_array_equal(series, [[1, 3], [2, 4]])
    assert (problem in metrics.problems) if problem else not metrics.problems


@given(ROWS, st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=12)), min_size=1, max_size=4))
def test_garbage_in_a_file_never_raises(rows: list[tuple], scribbles: list[tuple[int, bytes]]) -> None:
    data = bytearray(written(rows))
    for at, garbage in scribbles:
        place = at % len(data)
        data[place : place + len(garbage)] = garbage
    metrics = Metrics(bytes(data))
    for tag in metrics.tags:
        series = metrics.series(tag)
        assert len(series.steps) == len(series.values)
        np.testing.assert_equal(metrics.last(tag), series.values[-1] if len(series.values) else None)


def test_a_long_column_with_its_only_value_far_up_is_found() -> None:
    rows = "".join(f"{i},{'1.5' if i == 3 else ''},1\n" for i in range(1000))
    assert Metrics(f"step,a,b\n{rows}".encode()).last("a") == 1.5


@pytest.mark.parametrize(
    ("summary", "age", "status"),
    [
        ('{"status": "finished"}', 9e6, "finished"),
        ('{"status": "stopped"}', 0, "stopped"),
        ('{"status": "failed"}', 0, "failed"),
        (None, 3, "running"),
        (None, -500, "running"),
        (None, 301, "killed"),
        ("{", 3, "killed"),  # it is written at the end, so the run has ended
        ("[1]", 301, "killed"),
    ],
)
def test_a_run_without_a_summary_runs_while_it_writes(
    tmp_path: Path, summary: str | None, age: float, status: str
) -> None:
    run = make(tmp_path / "run", summary=summary, metrics=b"step,a\n1,2\n")
    for path in (*run.iterdir(), run):
        os.utime(path, (NOW - age, NOW - age))
    read = history.read(run, NOW)
    assert read.status == status
    is_told = any(note.startswith(f"{status}: last written ") for note in read.notes())
    assert is_told == (status in ("running", "killed"))
    (run / "checkpoints").mkdir()
    os.utime(run / "checkpoints", (NOW, NOW))
    os.utime(run, (NOW - age, NOW - age))
    assert history.read(run, NOW).status == ("running" if summary is None else status)


def test_seconds_are_told_in_a_unit_that_fits() -> None:
    assert [history.ago(s) for s in (3, 119, 120, 7300, 3 * 86400)] == [
        "3 s ago", "119 s ago", "2 min ago", "2 h ago", "3 days ago",
    ]  # fmt: skip


def test_a_whole_run_has_its_values_and_no_notes(tmp_path: Path) -> None:
    recipe = (
        "name: a\nimports: [gone_plugin]\noptimizer: {lr: 3e-4, betas: [0.9, 0.98]}\nmodel: {attention: {x: null}}\n"
    )
    metrics = b"step,train/loss,val/loss\n2,5.0,\n4,nan,\n4,,3.0\n6,4.5,\n6,,3.5\n"
    run = make(tmp_path / "run", recipe, '{"status": "finished", "test/loss": 2, "val/loss": 2.5}', metrics)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step_00000007.ckpt").touch()
    read = history.read(run)
    assert read.recipe == {
        "name": "a", "imports": ["gone_plugin"], "optimizer.lr": 3e-4, "optimizer.betas": [0.9, 0.98],
        "model.attention.x": None,
    }  # fmt: skip
    assert (read.steps, read.status, read.notes()) == (7, "finished", [])
    assert [read.final(tag) for tag in ("val/loss", "train/loss", "test/loss", "nothing")] == [2.5, 4.5, 2.0, None]
    assert (read.best("val/loss", largest=False), read.best("train/loss", largest=True)) == (2.5, 5.0)
    assert read.best("test/loss", largest=False) == 2.0
    assert read.tags == ["train/loss", "val/loss", "test/loss"]


def test_what_kept_the_kit_a_summary_is_read_back(tmp_path: Path) -> None:
    runs.write_summary(make(tmp_path / "run"), "stopped", {"val/loss": 1.5, "train/loss": float("inf")})
    read = history.read(tmp_path / "run")
    assert read.status == "stopped" and read.final("val/loss") == 1.5
    assert np.isnan(read.final("train/loss") or 0.0)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("recipe.yaml", None, "no recipe.yaml"),
        ("recipe.yaml", b"a: [1\nb: }", "recipe.yaml: not YAML"),
        ("recipe.yaml", b"\xff\xfe\x00", "recipe.yaml: not YAML"),
        ("recipe.yaml", b"!!python/object:os.system {}", "recipe.yaml: not YAML"),
        ("recipe.yaml", b"[" * 100_000, "recipe.yaml: not YAML"),
        ("recipe.yaml", b"a: &x\n  b: *x\n", "recipe.yaml: not YAML"),
        ("recipe.yaml", b"a: !!bool x", "recipe.yaml: not YAML"),
        ("recipe.yaml", b"a: !!timestamp x", "recipe.yaml: not YAML"),
        ("recipe.yaml", b"? [a]\n: 1", "recipe.yaml: not YAML"),
        ("recipe.yaml", b"", "recipe.yaml: holds no keys"),
        ("recipe.yaml", b"[1, 2]", "recipe.yaml: holds no keys"),
        ("summary.json", b'{"status": "fini', "summary.json: not JSON"),
        ("summary.json", b"\xff", "summary.json: not JSON"),
        ("summary.json", b"[" * 100_000, "summary.json: not JSON"),
        ("summary.json", b"[]", "summary.json: holds no keys"),
        ("summary.json", b'{"val/loss": 1}', "summary.json: has no status"),
        ("metrics.csv", None, "no metrics: there is no metrics.csv"),
        ("metrics.csv", b"", "no metrics: metrics.csv is empty"),
        ("metrics.csv", b"step,a\n", "no metrics: metrics.csv has no row"),
        ("metrics.csv", b"step,a\n1,2\n2,", "metrics.csv: line 3 is cut off, and left out"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    run = make(tmp_path / "run", summary='{"status": "finished", "b": 2}', metrics=b"step,a\n1,2\n")
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    read = history.read(run)
    assert any(note.startswith(words) for note in read.notes()), read.notes()
    assert read.is_usable
    assert (read.recipe == {}) == (name == "recipe.yaml")
    assert name in ("metrics.csv",) or read.final("a") == 2
    assert name == "summary.json" or read.final("b") == 2


def test_a_run_that_has_not_logged_yet_is_told_so(tmp_path: Path) -> None:
    read = history.read(make(tmp_path / "run"))
    assert read.notes() == ["running: last written 0 s ago", "no metrics yet: there is no metrics.csv"]
    assert read.is_usable and read.steps is None and read.tags == []
    assert not history.read(tmp_path / "nothing").is_usable


def test_a_file_that_may_not_be_read_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = make(tmp_path / "run", summary='{"status": "finished"}', metrics=b"step,a\n1,2\n")
    read = durable.read

    def refuse(path: Path, *rest: int) -> bytes:
        if path.name == "metrics.csv":
            raise PermissionError(13, "Permission denied")
        return read(path, *rest)

    monkeypatch.setattr(durable, "read", refuse)
    assert history.read(run).notes() == ["metrics.csv: cannot be read (Permission denied)"]
    monkeypatch.undo()
    (run / "recipe.yaml").unlink()
    (run / "recipe.yaml").mkdir()
    assert history.read(run).notes() == ["recipe.yaml: cannot be read (it is a directory, not a regular file)"]


def test_broken_runs_of_any_kind_are_read_without_an_error(tmp_path: Path) -> None:
    draws = random.Random(0)
    recipe = b"name: a\nmodel: {dim: 4, attention: {backend: dilated, rates: [1, 2]}}\noptimizer:\n  lr: 0.1\n"
    whole = {
        "recipe.yaml": recipe,
        "summary.json": json.dumps({"status": "finished", "a": 1.5}).encode(),
        "metrics.csv": FILE,
    }
    for i in range(300):
        run = tmp_path / str(i)
        run.mkdir()
        for name, content in whole.items():
            kind = draws.choice(["whole", "cut", "scribbled", "missing", "zeros"])
            at = draws.randrange(len(content))
            content = {
                "cut": content[:at], "scribbled": content[:at] + draws.randbytes(9) + content[at + 9 :],
                "zeros": content[:at] + bytes(len(content) - at),
            }.get(kind, content)  # fmt: skip
            if kind != "missing":
                (run / name).write_bytes(content)
        read = history.read(run)
        for tag in read.tags:
            assert read.final(tag) is not None
            read.best(tag, largest=True)
        assert all(isinstance(note, str) and "\n" not in note for note in read.notes())
