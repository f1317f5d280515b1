"""Which runs a path means, and what runs are called beside each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longnet_kit.report import run_paths


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(path: str) -> None:
    """A run directory with a recipe and metrics."""
    Path(path).mkdir(parents=True)
    (Path(path) / "recipe.yaml").write_text("name: a\n")
    (Path(path) / "metrics.csv").touch()


def test_paths_mean_runs_as_the_other_verbs_mean_them() -> None:
    for name in ("a/version_0", "a/version_2", "a/version_10", "sweep/b/version_0", "sweep/c/version_0"):
        make(f"runs/{name}")

    def found(*paths: str) -> list[str]:
        return [run.as_posix().removeprefix("runs/") for run in run_paths.expand(paths)[0]]

    everything = ["a/version_0", "a/version_2", "a/version_10", "sweep/b/version_0", "sweep/c/version_0"]
    assert found() == found("runs") == everything
    assert found("runs/a") == ["a/version_10"]
    assert found("runs/a/version_2/") == ["a/version_2"]
    assert found("runs/sweep") == found("runs/sweep/*") == found("runs/s*/*/version_0") == everything[3:]
    assert found("runs/sweep/c", "runs/sweep", str(Path("runs/sweep/b/version_0").absolute())) == everything[:2:-1]
    assert sorted(found("runs/**")) == sorted(everything)
    Path("elsewhere").symlink_to("runs/sweep")
    Path("runs/sweep/loop").symlink_to("..")
    assert found("elsewhere", "runs/sweep")[:2] == ["elsewhere/b/version_0", "elsewhere/c/version_0"]


def test_a_path_that_is_not_there_is_told_with_what_is() -> None:
    with pytest.raises(ValueError, match="runs: there is no such folder here; train a run"):
        run_paths.expand([])
    make("runs/quickstart/version_0")
    with pytest.raises(ValueError, match=r"runs/quickstrat: there is no such .*did you mean 'runs/quickstart'\?"):
        run_paths.expand(["runs", "runs/quickstrat"])
    with pytest.raises(ValueError, match=r"runs/x\*: the pattern matches no .*there are: runs/quickstart"):
        run_paths.expand(["runs/x*"])
    with pytest.raises(ValueError, match="metrics.csv: is a file"):
        run_paths.expand(["runs/quickstart/version_0/metrics.csv"])


def test_labels_are_the_shortest_paths_that_tell_runs_apart() -> None:
    def labels(*paths: str) -> list[str]:
        return run_paths.labels([Path(path) for path in paths])

    assert labels("runs/a/version_0") == ["a/version_0"]
    assert labels("runs/a/version_0", "runs/a/version_1") == ["version_0", "version_1"]
    assert labels("runs/s/a/version_0", "runs/s/b/version_0") == ["a", "b"]
    assert labels("runs/a/version_0", "runs/a/version_1", "runs/b/version_0") == [
        "a/version_0", "a/version_1", "b/version_0",
    ]  # fmt: skip


PARTS = st.lists(st.sampled_from("ab"), min_size=1, max_size=5).map("/".join)


@given(st.lists(PARTS, min_size=1, max_size=6, unique=True))
def test_labels_always_tell_runs_apart(paths: list[str]) -> None:
    labels = run_paths.labels([Path(path) for path in paths])
    assert len(set(labels)) == len(paths) and all(labels)


def test_a_name_without_any_recipe_means_its_newest_version(place: Path) -> None:
    for number in (2, 10):
        Path(f"runs/a/version_{number}").mkdir(parents=True)
    assert run_paths.expand(["runs/a"])[0] == [Path("runs/a/version_10")]


def test_the_working_directory_can_be_meant(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make("runs/a/version_0")
    for folder in (".", "runs", "runs/a", "runs/a/version_0"):
        monkeypatch.chdir(place / folder)
        (run,) = run_paths.expand(["."])[0]
        assert run.resolve() == place / "runs/a/version_0"


def test_a_folder_without_runs_is_passed_over() -> None:
    make("runs/a/version_0")
    Path("other/deep").mkdir(parents=True)
    found, passed_over = run_paths.expand(["other", "runs"])
    assert found == [Path("runs/a/version_0")]
    assert passed_over == ["other: no run in it (no recipe.yaml or metrics.csv, no version_<n>)"]
