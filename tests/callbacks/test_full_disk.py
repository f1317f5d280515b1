"""Where scalars cannot be written, that is told once, and they are written when they can be."""

from __future__ import annotations

import itertools
import re
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from longnet_kit import runs
from longnet_kit.callbacks import Board, MetricsTable, board

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits the size of files")


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def told_once(pattern: str) -> Iterator[None]:
    """Within, there is one warning, which says this."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        yield
    assert [bool(re.search(pattern, str(warning.message))) for warning in told] == [True]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    made = tmp_path / "runs" / "tiny" / "version_0"
    made.mkdir(parents=True)
    return made


def steps(run: Path, tag: str = "loss") -> list[int]:
    return [int(row["step"]) for row in runs.metrics_until(run, 10**9) if tag in row]


def test_a_table_reads_back_as_it_was_logged(run: Path) -> None:
    table = MetricsTable(run / "metrics.csv")
    table.log_metrics({"loss": 0.1 + 0.2}, 1)
    table.save()
    table.log_metrics({"loss": float("nan"), "a, b": 2}, 2)
    table.log_metrics({"loss": 1e-300}, 3)
    table.save()
    assert (run / "metrics.csv").read_text().splitlines() == [
        'step,"a, b",loss', "1,,0.30000000000000004", "2,2.0,nan", "3,,1e-300"
    ]  # fmt: skip
    assert [path.name for path in run.iterdir()] == ["metrics.csv"]


def test_a_table_that_goes_on_holds_the_earlier_rows_from_the_start(run: Path) -> None:
    table = MetricsTable(run / "metrics.csv")
    for step in range(1, 6):
        table.log_metrics({"loss": step}, step)
        table.save()
    table = MetricsTable(run / "metrics.csv", runs.metrics_until(run, 3))
    assert steps(run) == [1, 2, 3]
    table.log_metrics({"loss": 4.0}, 4)
    table.save()
    assert steps(run) == [1, 2, 3, 4]


@pytest.mark.parametrize("has_new_column", [False, True])
def test_rows_wait_until_the_table_can_be_written(run: Path, has_new_column: bool) -> None:
    table = MetricsTable(run / "metrics.csv")
    table.log_metrics({"loss": 1.0}, 1)
    table.save()
    before = (run / "metrics.csv").read_bytes()
    with told_once("cannot be written.*kept until"), files_of_at_most(len(before) + 3):
        for step in (2, 3):
            table.log_metrics({"loss": 1 / step, **({"new": 1.0} if has_new_column else {})}, step)
            table.save()
            assert (run / "metrics.csv").read_bytes() == before, "no half row"
    table.log_metrics({"loss": 0.25}, 4)
    table.save()
    assert steps(run) == [1, 2, 3, 4]
    assert [path.name for path in run.iterdir()] == ["metrics.csv"]


def test_a_new_column_keeps_the_rows_of_a_damaged_table_that_can_be_read(run: Path) -> None:
    table = MetricsTable(run / "metrics.csv")
    for step in (1, 2, 3):
        table.log_metrics({"loss": 1 / step}, step)
    table.save()
    (run / "metrics.csv").write_bytes((run / "metrics.csv").read_bytes().replace(b"2,0.5", b"2,\0,0.5"))
    table.log_metrics({"new": 1.0}, 4)
    with told_once("line 3 has 3 cells, not 2.*metrics.csv.damaged"):
        table.save()
    assert runs.metrics_until(run, 9) == [
        {"step": "1", "loss": "1.0"}, {"step": "3", "loss": repr(1 / 3)}, {"step": "4", "new": "1.0"}
    ]  # fmt: skip


def test_a_last_row_that_a_kill_has_cut_off_is_left_out(run: Path) -> None:
    table = MetricsTable(run / "metrics.csv")
    for step in (1, 12):
        table.log_metrics({"loss": 123.5, "other": 7.25}, step)
    table.save()
    whole = (run / "metrics.csv").read_bytes()
    first_row = whole.index(b"\n1,") + 1
    end_of_first = whole.index(b"\n", first_row) + 1
    for cut in range(end_of_first, len(whole)):
        (run / "metrics.csv").write_bytes(whole[:cut])
        assert runs.metrics_until(run, 100) == [{"step": "1", "loss": "123.5", "other": "7.25"}]


def points(run: Path) -> dict[int, float]:
    found: dict[int, float] = {}
    for file in sorted(run.glob("events*")):
        events = EventAccumulator(str(file)).Reload()
        if "loss" in events.Tags()["scalars"]:
            found |= {event.step: event.value for event in events.Scalars("loss")}
    return found


def test_events_wait_for_room(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = Board(run)
    logger.describe({"x": 1}, "name: x")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    files = sorted(run.iterdir())
    with monkeypatch.context() as patched, told_once("no space left.*kept until"):
        patched.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=board.ROOM - 1))
        for step in (2, 3):
            logger.log_metrics({"loss": float(step)}, step)
            logger.save()
    assert points(run) == {1: 1.0}
    logger.log_metrics({"loss": 4.0}, 4)
    logger.save()
    assert points(run) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0} and sorted(run.iterdir()) == files
    logger.finalize("success")


def test_earlier_points_that_are_missing_are_drawn_once_and_in_order(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(1_800_000_000, 10)
    monkeypatch.setattr(time, "time", lambda: float(next(seconds)))  # event files are read in the order of their times
    logger = Board(run)
    for step in (1, 2, 4, 5, 6):
        logger.log_metrics({"loss": float(step)}, step)
        logger.save()
    logger.finalize("success")
    whole = [board.Point("loss", step, float(step)) for step in range(1, 6)]
    for _ in range(2):  # the second finds nothing missing
        logger = Board(run, 6, whole)
        logger.save()
        logger.finalize("success")
        events = EventAccumulator(str(run)).Reload().Scalars("loss")
        assert [(event.step, event.value) for event in events] == [(x.step, x.value) for x in whole]


def test_events_go_on_in_another_file_where_writing_has_failed(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("threading.excepthook", lambda *_: None)  # of TensorBoard's thread
    logger = Board(run, purge_step=1)
    logger.describe({"x": 1}, "name: x")
    logger.log_metrics({"loss": 1.0}, 1)
    logger.save()
    with files_of_at_most(10), told_once("File too large"):
        for step in (2, 3):
            logger.log_metrics({"loss": float(step)}, step)
            logger.save()
    count = len(list(run.iterdir()))
    logger.log_metrics({"loss": 4.0}, 4)
    logger.save()
    assert len(list(run.iterdir())) == count, "it is too soon to try again"
    monkeypatch.setattr(board, "RETRY", 0.0)
    logger.save()
    assert points(run) == {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0}
    whole = EventAccumulator(str(run)).Reload()
    assert [event.step for event in whole.Scalars("loss")] == [1, 2, 3, 4], "the new file hides nothing"
    logger.finalize("success")
