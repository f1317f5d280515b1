"""A file is replaced whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from longnet_kit import durable


@pytest.fixture
def target(tmp_path: Path) -> Path:
    file = tmp_path / "file.txt"
    file.write_text("old")
    return file


def test_a_file_has_its_name_once_it_is_on_the_disk(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, sync = [], os.fsync
    monkeypatch.setattr("os.fsync", lambda descriptor: (synced.append(target.read_text()), sync(descriptor)))
    with durable.replacing(target) as staged:
        staged.write_text("new")
        assert staged.parent == target.parent and target.read_text() == "old"
    assert synced == ["old", "new"], "the file before it has its name, then the folder"
    assert list(target.parent.iterdir()) == [target]


def test_a_file_that_was_not_there_is_made(tmp_path: Path) -> None:
    with durable.replacing(tmp_path / "file.txt") as staged:
        staged.write_text("new")
    assert (tmp_path / "file.txt").read_text() == "new"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_file_before_and_nothing_else(error: BaseException, target: Path) -> None:
    with pytest.raises(type(error)), durable.replacing(target) as staged:
        staged.write_text("half of the n")
        raise error
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_disk_that_fails_leaves_the_file_before(call: str, target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, call, failing)
    with pytest.raises(OSError, match="Input/output error"), durable.replacing(target) as staged:
        staged.write_text("new")
    assert target.read_text() == "old" and list(target.parent.iterdir()) == [target]


KILLED = """
import os, signal, sys
from pathlib import Path
from longnet_kit import durable
with durable.replacing(Path(sys.argv[1])) as staged:
    staged.write_text("half of the n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="its processes are not ended by signals")
def test_a_kill_leaves_the_file_before_and_the_next_time_does_not_mind(target: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", KILLED, str(target)], env=environment)
    assert ended.returncode == -signal.SIGKILL and target.read_text() == "old"
    with durable.replacing(target) as staged:
        staged.write_text("new")
    assert target.read_text() == "new" and list(target.parent.iterdir()) == [target]
