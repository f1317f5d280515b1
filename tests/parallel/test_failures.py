"""A rank that dies or hangs brings the job down, with a message, within the timeout and 10 seconds; a signal to any
rank ends the job at a checkpoint."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet_kit import runs
from tests.parallel import desk, ranks

pytestmark = pytest.mark.timeout(300)
TIMEOUT = 15
"""Long enough for ranks that start at different moments on a busy machine."""
ENDLESS = ["fit", "tiny.yaml", "trainer.max_steps=1000000", "trainer.val_check_interval=1000000"]
ENDLESS += ["checkpoint.every_n_steps=1000000", f"strategy.timeout={TIMEOUT}"]


class Job:
    """A training of two ranks that would go on for long; `pids` are theirs, in order."""

    def __init__(self, folder: Path, by_command: bool, own_group: bool = False) -> None:
        self.log = folder / "log.txt"
        command = [sys.executable, "-m", "longnet_kit.cli", *ENDLESS]
        shared = desk.environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(ranks.free_port()), NODE_RANK="0")
        own = [{}] if by_command else [{"LOCAL_RANK": str(rank)} for rank in (0, 1)]
        with self.log.open("w") as log:
            output: Any = {"stdout": log, "stderr": subprocess.STDOUT}
            self.started = [
                subprocess.Popen(command, cwd=folder, env=shared | more, start_new_session=own_group, **output)
                for more in own
            ]
        metrics = folder / "runs/tiny/version_0/metrics.csv"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) > 3, 120)
        self.pids = [process.pid for process in self.started]
        if by_command:
            children = Path(f"/proc/{self.pids[0]}/task/{self.pids[0]}/children").read_text().split()
            self.pids += [pid for pid in map(int, children) if b"longnet_kit.cli" in cmdline(pid)]
        assert len(self.pids) == 2

    def is_gone(self, rank: int) -> bool:
        for process in self.started:
            process.poll()
        return not os.path.exists(f"/proc/{self.pids[rank]}")

    def end(self) -> None:
        for rank, pid in enumerate(self.pids):
            if not self.is_gone(rank):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            process.wait()


def cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


def wait_until(true: Callable[[], bool], seconds: float) -> float:
    """Seconds until it was true."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it did not happen"
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.fixture
def jobs(tmp_path: Path) -> Iterator[Callable[[bool], Job]]:
    desk.lay(tmp_path)
    made: list[Job] = []
    yield lambda by_command: made.append(Job(tmp_path, by_command)) or made[-1]
    for job in made:
        job.end()


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks of a job in /proc")
@pytest.mark.parametrize(
    ("by_command", "how", "victim"),
    [
        pytest.param(
            by_command,
            how,
            victim,
            id=f"rank {victim} {what}, started by {starter}",
            marks=[pytest.mark.soak] if what == "hangs" and (victim, by_command) != (0, True) else [],
        )
        for by_command, starter in ((True, "the command"), (False, "others"))
        for how, what in ((signal.SIGKILL, "dies"), (signal.SIGSTOP, "hangs"))
        for victim in (0, 1)
        if by_command or (how, victim) != (signal.SIGSTOP, 0)
    ],
)
def test_a_lost_rank_ends_the_job(
    victim: int, how: signal.Signals, by_command: bool, jobs: Callable[[bool], Job]
) -> None:
    job = jobs(by_command)
    os.kill(job.pids[victim], how)
    other = 1 - victim
    wait_until(lambda: job.is_gone(other), TIMEOUT + 10)
    if by_command:  # a job that starts its ranks leaves none behind
        wait_until(lambda: job.is_gone(victim), 10)
    log = job.log.read_text()
    assert f"longnet_kit: rank {other} of 2 ends: another rank died, or did not answer within {TIMEOUT} s" in log
    assert "Traceback" not in log
    for process, rank in zip(job.started, (0, 1), strict=False):
        if rank == other:
            assert process.wait() == 1
        elif job.is_gone(rank):  # the system's code of what was killed
            assert process.wait() == -signal.SIGKILL


@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks of a job in /proc")
@pytest.mark.parametrize("by_command", [True, False], ids=["started by the command", "started by others"])
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_rank_ends_all_at_one_checkpoint(
    asked: int, by_command: bool, jobs: Callable[[bool], Job]
) -> None:
    job = jobs(by_command)
    os.kill(job.pids[asked], signal.SIGTERM)
    wait_until(lambda: job.is_gone(0) and job.is_gone(1), TIMEOUT)
    log = job.log.read_text()
    run = job.log.parent / "runs/tiny/version_0"
    saved = runs.checkpoint(run)
    step = runs.step_of(saved)
    assert f"longnet: SIGTERM ended the run after step {step}" in log
    assert "Traceback" not in log and "another rank died" not in log
    assert torch.load(saved, weights_only=True)["global_step"] == step
    last = int(runs.metrics_until(run, 10**9)[-1]["step"])
    assert step - 1 <= last <= step, "no step is lost; every second one is logged"
    assert [process.wait() for process in job.started] == [143] * len(job.started)


LONG_STEP = """
import os, time
from pathlib import Path
from longnet_kit.tasks import LanguageModeling

step = LanguageModeling.training_step

def slow(self, batch, batch_idx):
    if os.environ.get("LOCAL_RANK", "0") == "0" and Path("hang").exists():
        Path("in_step").touch()
        time.sleep(100)
    return step(self, batch, batch_idx)

LanguageModeling.training_step = slow
"""


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks of a job in /proc")
def test_a_rank_that_is_lost_during_a_long_step_of_the_first_ends_the_command_with_1(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(LONG_STEP)
    desk.lay(tmp_path)
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(recipe.read_text() + "imports: [slow]\n")
    job = Job(tmp_path, by_command=True)
    try:
        (tmp_path / "hang").touch()
        wait_until((tmp_path / "in_step").exists, 60)
        os.kill(job.pids[1], signal.SIGKILL)
        wait_until(lambda: job.is_gone(0), 30)
        assert job.started[0].wait() == 1, job.log.read_text()
        assert f"another rank (process {job.pids[1]}) has ended with code -9: ends too" in job.log.read_text()
    finally:
        job.end()


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="finds the ranks of a job in /proc")
@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_to_the_group_of_a_command_with_two_ranks_has_its_exit_code(
    number: str, code: int, tmp_path: Path
) -> None:
    desk.lay(tmp_path)
    job = Job(tmp_path, by_command=True, own_group=True)
    try:
        os.killpg(job.pids[0], getattr(signal, number))
        wait_until(lambda: job.is_gone(0) and job.is_gone(1), TIMEOUT)
        assert job.started[0].wait() == code, job.log.read_text()
        assert f"longnet: {number} ended the run after step" in job.log.read_text()
    finally:
        job.end()
