"""A console that goes away while a run goes on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from longnet_kit import cli, runs
from tests.parallel import desk

COMMAND = f"{sys.executable} -m longnet_kit.cli"
ALONE = "trainer.devices=1 strategy.name=auto strategy.sequence_parallel_size=1"
TALKING = """
import os, sys
from longnet_kit import terminal
terminal.open_closed()
with terminal.outliving():
    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        for line in range(3):
            print(name, line, file=stream, flush=True)
            if os.path.exists("wait"):
                sys.stdin.readline()
    os.system("echo a child; echo a child >&2")
    open("done", "w").write("done")
"""
"""A program that writes a file at its end, whatever becomes of its output."""


def shell(folder: Path, line: str) -> list[int]:
    """The exit codes of the commands of a pipeline."""
    done = subprocess.run(
        ["bash", "-c", f"{line}; echo ${{PIPESTATUS[@]}} > codes"],
        cwd=folder, env=desk.environment(), capture_output=True, timeout=200,
    )  # fmt: skip
    assert b"Traceback" not in done.stdout + done.stderr, done
    return [int(code) for code in (folder / "codes").read_text().split()]


@pytest.mark.parametrize(
    "output",
    ["| true", "2>&1 | true", ">&- 2>&-", "0<&- >&- 2>&-", ">/dev/full 2>&1"]
    if os.path.exists("/dev/full")
    else ["| true"],
)
def test_work_goes_on_without_its_console(output: str, tmp_path: Path) -> None:
    (tmp_path / "talking.py").write_text(TALKING)
    assert shell(tmp_path, f"{sys.executable} talking.py {output}")[0] == 0
    assert (tmp_path / "done").read_text() == "done", "no output went into a file of its own"


def test_work_goes_on_when_its_terminal_is_closed(tmp_path: Path) -> None:
    (tmp_path / "wait").touch()
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", TALKING], cwd=tmp_path, env=desk.environment(),
        stdin=subprocess.PIPE, stdout=slave, stderr=slave,
    )  # fmt: skip
    os.close(slave)
    assert os.read(master, 3) == b"out"
    os.close(master)
    process.communicate(b"\n" * 9, timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").exists()


def test_a_fit_whose_reader_goes_away_is_finished_and_saved(tmp_path: Path) -> None:
    desk.lay(tmp_path)
    assert shell(tmp_path, f"{COMMAND} fit tiny.yaml {ALONE} 2>&1 | head -1")[0] == 0
    run = tmp_path / "runs/tiny/version_0"
    assert runs.step_of(runs.checkpoint(run)) == 6
    assert runs.read_summary(run)["status"] == "finished"


@pytest.mark.soak
def test_sweeps_streams_and_runs_of_several_processes_go_on_without_their_readers(tmp_path: Path) -> None:
    desk.lay(tmp_path)
    assert shell(tmp_path, f"{COMMAND} sweep tiny.yaml {ALONE} seed=1,2 2>&1 | head -1")[0] == 0
    assert len(list(tmp_path.glob("runs/*/*/checkpoints/step_00000006.ckpt"))) == 2
    assert shell(tmp_path, f"{COMMAND} fit tiny.yaml 2>&1 | head -1")[0] == 0
    assert runs.read_summary(tmp_path / "runs/tiny/version_0")["status"] == "finished"
    assert shell(tmp_path, f"{COMMAND} stream runs/tiny text.txt --output read 2>&1 | head -1")[0] == 0
    assert runs.read_summary(tmp_path / "read")["status"] == "finished"


def test_a_list_whose_reader_goes_away_ends(tmp_path: Path) -> None:
    assert shell(tmp_path, f"{COMMAND} list | true")[0] == cli.NO_READER


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "0<&-"])
def test_a_command_without_a_standard_stream_does_its_work(closed: str, tmp_path: Path) -> None:
    assert shell(tmp_path, f"{COMMAND} list {closed}") == [0]
    assert shell(tmp_path, f"{COMMAND} lisst {closed}") == [2]
