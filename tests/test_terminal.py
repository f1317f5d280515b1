"""A console that goes away while a run goes on."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from longnet_kit import cli, runs, terminal
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


HOSTILE = "a\x1b[2Jb\x07\x9b31m\r\u202ec\x7f\u2028\udc80"
SHOWN = r"a\u001b[2Jb\u0007\u009b31m\u000d\u202ec\u007f\u2028\udc80"


def test_what_could_act_on_a_terminal_is_escaped() -> None:
    assert terminal.printable(HOSTILE) == SHOWN
    assert terminal.printable("two\nlines\tand a tab") == "two\nlines\tand a tab"
    assert terminal.printable("two\nlines", keep="") == r"two\u000alines"
    assert terminal.printable("Grüße, 世界 👩\u200d💻 e\u0301") == "Grüße, 世界 👩\u200d💻 e\u0301"


def test_verbs_escape_what_files_and_arguments_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    hostile = HOSTILE.replace("\r", "")  # which YAML takes for the end of a line
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "a\x1b[2J.yaml").write_text('name: x\ndescription: "b\\e[2J\\x9b"\n')
    directory = tmp_path / "runs" / hostile / "version_0"
    directory.mkdir(parents=True)
    (directory / "recipe.yaml").write_text('name: "x\\e[2J"\n')
    (directory / "metrics.csv").write_text("step,val/loss\n5,1.5\n")
    for line in (["list"], ["compare"], ["test", hostile], [hostile], ["compare", "--csv", "runs.csv"]):
        cli.main(line)
        captured = capsys.readouterr()
        told = captured.out + captured.err
        assert "[2J" in told and terminal.printable(told) == told, line
        assert "\\u001b" in told or "\\x1b" in told


@pytest.mark.parametrize("is_terminal", [True, False])
def test_data_is_escaped_for_terminals_alone(
    is_terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: is_terminal, raising=False)
    terminal.say("\x1b[2J\n\t", end="", is_data=True)
    assert capsys.readouterr().out == ("\\u001b[2J\n\t" if is_terminal else "\x1b[2J\n\t")


def test_a_full_disk_behind_standard_output_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-m", "longnet_kit.cli", "list"]
    with open("/dev/full", "w") as full:
        ended = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 2
    assert "standard output cannot be written (No space left on device)" in ended.stderr
    assert "Traceback" not in ended.stderr


def test_what_an_encoding_does_not_have_is_escaped() -> None:
    code = "from longnet_kit import terminal; terminal.say('d\u00e9'); terminal.tell('\u4e00')"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert (ended.stdout, ended.stderr) == ("d\\xe9\n", "\\u4e00\n")
