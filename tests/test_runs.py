from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longnet_kit import runs


def test_versions_are_claimed_once_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        claimed = list(pool.map(lambda _: runs.claim("a", tmp_path), range(24)))
    assert sorted(claimed) == sorted({tmp_path / "a" / f"version_{n}" for n in range(24)})
    assert runs.versions("a", tmp_path)[-1].name == "version_23"  # by number, not by text


def test_a_run_is_found_by_its_directory_or_by_its_name(tmp_path: Path) -> None:
    for number in (2, 10):
        directory = tmp_path / "a" / f"version_{number}"
        directory.mkdir(parents=True)
        (directory / "recipe.yaml").touch()
    (tmp_path / "a" / "version_11").mkdir()  # nothing in it
    assert runs.find(tmp_path / "a") == tmp_path / "a" / "version_10"
    assert runs.find(tmp_path / "a" / "version_2") == tmp_path / "a" / "version_2"
    with pytest.raises(ValueError, match=r"no run here.*there are: .*/a/version_2"):
        runs.find(tmp_path / "b")


def test_a_run_without_a_checkpoint_does_not_hide_an_older_one_that_has_some(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / "a" / f"version_{number}" / "checkpoints").mkdir(parents=True)
        (tmp_path / "a" / f"version_{number}" / "recipe.yaml").touch()
    assert runs.find(tmp_path / "a").name == "version_2"  # none has one: told of the newest
    (tmp_path / "a" / "version_1" / "checkpoints" / "step_00000004.ckpt").touch()
    assert runs.find(tmp_path / "a").name == "version_1"


def test_a_discarded_run_takes_only_empty_folders_with_it(tmp_path: Path) -> None:
    first, second = runs.claim("a", tmp_path / "runs"), runs.claim("a", tmp_path / "runs")
    runs.discard(second)
    assert first.is_dir() and not second.exists()
    runs.discard(first)
    assert list(tmp_path.iterdir()) == []


def test_the_newest_checkpoint_is_that_of_the_highest_step(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no checkpoint"):
        runs.checkpoint(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    for step in (900, 1000, 20):
        (tmp_path / "checkpoints" / f"step_{step:08d}.ckpt").touch()
    assert runs.checkpoint(tmp_path).name == "step_00001000.ckpt"


def test_a_summary_is_plain_json(tmp_path: Path) -> None:
    assert runs.read_summary(tmp_path) == {}
    runs.write_summary(tmp_path, "finished", {"val/loss": 1.5, "train/loss": float("nan")})
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "status": "finished",
        "train/loss": None,
        "val/loss": 1.5,
    }
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_metrics_are_kept_up_to_a_step(tmp_path: Path) -> None:
    assert runs.metrics_until(tmp_path, 10) == []
    (tmp_path / "metrics.csv").write_text("step,train/loss,val/loss\n10,2.5,\n10,,2.0\n20,2.0,\n")
    assert runs.metrics_until(tmp_path, 10) == [{"step": "10", "train/loss": "2.5"}, {"step": "10", "val/loss": "2.0"}]


def version(folder: Path, number: int, status: str, step: int) -> Path:
    """A run directory as a training leaves it; without a status it was killed, at step 0 before its first save."""
    directory = folder / f"version_{number}"
    (directory / "checkpoints").mkdir(parents=True)
    (directory / "recipe.yaml").touch()
    if status:
        runs.write_summary(directory, status, {})
    if step:
        runs.checkpoint_of(directory / "checkpoints", step).touch()
    return directory


def test_a_finished_version_is_read_rather_than_a_newer_one_and_a_note_says_so(tmp_path: Path) -> None:
    version(tmp_path / "a", 0, "finished", 6)
    finished = version(tmp_path / "a", 1, "finished", 8)
    told: list[str] = []
    assert runs.newest(tmp_path / "a", told.append) == finished / "checkpoints" / "step_00000008.ckpt"
    assert told == [f"reads {finished}/checkpoints/step_00000008.ckpt"], "nothing was passed over"
    stopped = version(tmp_path / "a", 2, "stopped", 4)
    killed = version(tmp_path / "a", 3, "", 0)
    told.clear()
    assert runs.find(tmp_path / "a", told.append) == finished
    assert told == [
        f"note: {tmp_path / 'a'} means version_1 here (finished, step 8); newer: version_2 (stopped, step 4), "
        f"version_3 (killed, or under way, no checkpoint). To use that, give {killed}"
    ]
    told.clear()
    assert runs.find(stopped, told.append) == stopped and told == []


def test_of_versions_that_are_not_finished_the_newest_that_has_a_checkpoint_is_read(tmp_path: Path) -> None:
    version(tmp_path / "a", 0, "stopped", 8)
    saved = version(tmp_path / "a", 1, "", 2)
    version(tmp_path / "a", 2, "failed", 0)
    told: list[str] = []
    assert runs.find(tmp_path / "a", told.append) == saved
    assert "means version_1 here (killed, or under way, step 2); newer: version_2 (failed, no checkpoint)" in told[0]
