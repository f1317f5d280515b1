"""Two runs never write in one directory, and no dead one keeps it."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longnet_kit import cli, experiment, recipe, run_lock, runs
from tests.parallel import desk

ALONE = ["trainer.devices=1", "strategy.name=auto"]


def holding(directory: Path, then: str) -> subprocess.Popen[str]:
    """A process that holds a directory, says so, and goes on as told."""
    begin = f"import os, time, pathlib; from longnet_kit import run_lock; place = pathlib.Path({str(directory)!r})"
    script = f"{begin}\nwith run_lock.hold(place): {then}"
    started = subprocess.Popen(
        [sys.executable, "-c", script], env=desk.environment(), stdout=subprocess.PIPE, text=True
    )
    assert started.stdout is not None and started.stdout.readline() == "held\n"
    return started


def test_a_directory_is_held_once_and_left_as_it_was(tmp_path: Path) -> None:
    with run_lock.hold(tmp_path) as note:
        assert note == ""
        assert run_lock.holder(tmp_path) == f"process {os.getpid()} on {socket.gethostname()}"
        with pytest.raises(ValueError, match=rf"{tmp_path}: .*process {os.getpid()} on .*wait .*another name"):
            run_lock.hold(tmp_path).__enter__()
        with pytest.raises(ValueError, match="wait until it has ended"):
            run_lock.check_free(tmp_path)
    assert list(tmp_path.iterdir()) == [] and run_lock.holder(tmp_path) == ""
    with run_lock.hold(tmp_path):
        pass


def test_a_killed_process_holds_nothing(tmp_path: Path) -> None:
    other = holding(tmp_path, "print('held', flush=True); time.sleep(100)")
    with pytest.raises(ValueError, match=f"process {other.pid} on"):
        run_lock.hold(tmp_path).__enter__()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert (tmp_path / run_lock.LOCK).exists()
    run_lock.check_free(tmp_path)
    with run_lock.hold(tmp_path):
        assert run_lock.holder(tmp_path).startswith(f"process {os.getpid()} ")


@pytest.mark.skipif(sys.platform != "linux", reason="finds the worker in /proc")
def test_a_forked_worker_that_outlives_its_parent_holds_nothing(tmp_path: Path) -> None:
    """Here one that is not told, as a data loader would be in the end, that its parent is gone."""
    other = holding(tmp_path, "os.fork() and print('held', flush=True); time.sleep(100)")
    with pytest.raises(ValueError, match=f"process {other.pid} on"):
        run_lock.hold(tmp_path).__enter__()
    children = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    assert len(children) == 1
    os.kill(int(children[0]), 0)  # it lives
    with run_lock.hold(tmp_path):
        os.kill(int(children[0]), signal.SIGKILL)


def test_of_many_only_one_at_a_time_holds_it(tmp_path: Path) -> None:
    """However they meet: the file of a lock is removed while others wait for it."""
    inside: list[int] = []

    def turns(number: int) -> int:
        had = 0
        while had < 20:
            try:
                with run_lock.hold(tmp_path):
                    inside.append(number)
                    assert inside == [number]
                    time.sleep(0.001)
                    inside.remove(number)
                    had += 1
            except ValueError:
                continue
        return had

    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(turns, range(6))) == [20] * 6


def test_a_lock_on_a_file_that_was_removed_meanwhile_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_lock.hold(tmp_path)
    first.__enter__()
    lock = run_lock.try_lock

    def lock_late(descriptor: int) -> bool:
        monkeypatch.undo()
        first.__exit__(None, None, None)
        return lock(descriptor)

    monkeypatch.setattr(run_lock, "try_lock", lock_late)
    with run_lock.hold(tmp_path):
        assert run_lock.holder(tmp_path)


def test_what_is_let_go_late_takes_no_lock_of_another(tmp_path: Path) -> None:
    first = run_lock.hold(tmp_path)
    first.__enter__()
    (tmp_path / run_lock.LOCK).unlink()  # as with a run that is discarded, whose directory another makes anew
    with run_lock.hold(tmp_path):
        first.__exit__(None, None, None)
        assert run_lock.holder(tmp_path)


def test_where_there_are_no_locks_a_run_goes_on_with_a_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_lock.fcntl, "flock", refuse)
    with run_lock.hold(tmp_path) as note, run_lock.hold(tmp_path):
        assert "cannot be locked (No locks available)" in note
        assert run_lock.holder(tmp_path) == ""


def test_a_run_that_goes_on_elsewhere_cannot_be_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    desk.lay(tmp_path)
    assert cli.main(["fit", "tiny.yaml", *ALONE, "trainer.max_steps=2"]) == 0
    run = Path("runs/tiny/version_0")
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    other = holding(run.absolute(), "print('held', flush=True); time.sleep(100)")
    with monkeypatch.context() as patched:  # it is refused before anything is built
        patched.setattr(experiment, "build_task", lambda _: pytest.fail("built"))
        assert cli.main(["fit", "tiny.yaml", *ALONE, "resume=auto"]) == 2
    assert f"{run}: a run goes on there (process {other.pid} on" in capsys.readouterr().err
    assert cli.main(["fit", "tiny.yaml", *ALONE, "trainer.max_steps=2", "resume=auto"]) == 0  # it has finished those
    other.kill()
    other.wait()
    (run / run_lock.LOCK).unlink()
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    assert cli.main(["fit", "tiny.yaml", *ALONE, "resume=auto"]) == 0
    assert [path.name for path in run.parent.iterdir()] == ["version_0"]
    assert not (run / run_lock.LOCK).exists()


def test_a_run_holds_its_directory_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    desk.lay(tmp_path)
    held: list[str] = []
    write = runs.write_summary

    def written(run: Path, *rest: object) -> None:
        held.append(run_lock.holder(run))
        write(run, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(runs, "write_summary", written)
    run = experiment.run(recipe.load("tiny.yaml", [*ALONE, "trainer.max_steps=2"]))
    assert held == [f"process {os.getpid()} on {socket.gethostname()}"]
    assert run_lock.holder(run) == ""
