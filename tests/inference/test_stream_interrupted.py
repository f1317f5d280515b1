"""A stream that signals end, or that a second one would disturb."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from longnet_kit.inference.stream import stream

pytestmark = pytest.mark.usefixtures("desk")


def launch(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "longnet_kit.cli", "stream", "runs/tiny", "text.txt", *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # as on a terminal
    )  # fmt: skip


def wait_for_points(directory: str, count: int) -> None:
    deadline = time.monotonic() + 60
    path = Path(directory, "curve.csv")
    while not path.is_file() or len(path.read_text().splitlines()) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "code"),
    [
        (signal.SIGTERM, 143),
        (signal.SIGINT, 130),
        pytest.param(signal.SIGHUP, 129, marks=pytest.mark.soak),
        (signal.SIGKILL, -9),
    ],
)
def test_signals_end_it_and_the_same_command_goes_on(
    number: int, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that is killed had no time to save, and begins anew."""
    options = ["--tokens", "40000", "--repeat", "--chunk", "20"]
    process = launch(*options, "--output", "out")
    wait_for_points("out", 4)
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    if number != signal.SIGKILL:
        assert "the same command goes on from here" in out
        assert json.loads(Path("out/summary.json").read_text())["status"] == "stopped"
    for folder in ("undisturbed", "out"):
        stream("runs/tiny", ["text.txt"], tokens=40_000, repeat=True, chunk=20, output=folder)
    assert ("goes on     after" in capsys.readouterr().out) == (number != signal.SIGKILL)
    summaries = [json.loads(Path(name, "summary.json").read_text()) for name in ("undisturbed", "out")]
    same = {key for key in summaries[0] if key not in ("seconds", "tokens_per_second", "memory")}
    assert {key: summaries[0][key] for key in same} == {key: summaries[1][key] for key in same}


def test_two_streams_never_write_into_one_folder() -> None:
    first = launch("--tokens", "100000", "--repeat", "--chunk", "10", "--output", "out")
    wait_for_points("out", 2)
    second = launch("--tokens", "100000", "--repeat", "--chunk", "10", "--output", "out")
    out, _ = second.communicate(timeout=60)
    first.kill()
    first.communicate()
    assert second.returncode == 2 and re.search(r"longnet: out.*process", out), out
