"""A signal ends a run at a checkpoint, with the exit code that the command's documentation says."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import signal
import stat
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet_kit import runs, signals
from tests.parallel import desk

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="its processes are not ended by signals")

ENDLESS = ["trainer.max_steps=1000000", "checkpoint.every_n_steps=1000000", "trainer.val_check_interval=1000000"]
ALONE = ["trainer.devices=1", "strategy.name=auto", "strategy.sequence_parallel_size=1", "trainer.log_every_n_steps=1"]
SLOW = """
import time
from pathlib import Path
from longnet_kit.tasks import LanguageModeling

step = LanguageModeling.validation_step

def slow(self, batch, batch_idx):
    step(self, batch, batch_idx)
    Path("validating").touch()
    if not Path("done").exists():
        time.sleep(1)

LanguageModeling.validation_step = slow
"""
"""A plug-in whose validations, the sanity check too, are slow until there is a file called `done`."""


class Run:
    """A training by the command, in a process group of its own."""

    def __init__(self, folder: Path, *overrides: str, **variables: str) -> None:
        command = [sys.executable, "-m", "longnet_kit.cli", "fit", "tiny.yaml", *ENDLESS, *ALONE, *overrides]
        self.directory = folder / "runs/tiny/version_0"
        self.process = subprocess.Popen(
            command, cwd=folder, env=desk.environment(**variables), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a shell's job may ignore it
        )  # fmt: skip

    def rows(self) -> int:
        metrics = self.directory / runs.METRICS
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    def wait_for(self, true: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 120
        while not true():
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.communicate()[0]
            time.sleep(0.01)

    def ended(self) -> tuple[int, str]:
        """Exit code and output."""
        output = self.process.communicate(timeout=60)[0]
        return self.process.returncode, output

    def saved(self) -> int:
        """The step of the checkpoint, whose content says the same; it must be whole."""
        checkpoint = runs.checkpoint(self.directory)
        assert torch.load(checkpoint, weights_only=True)["global_step"] == runs.step_of(checkpoint)
        return runs.step_of(checkpoint)

    def logged(self) -> int:
        """The last step in metrics.csv."""
        return int(runs.metrics_until(self.directory, 10**9)[-1]["step"])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Run]]:
    desk.lay(tmp_path)
    made: list[Run] = []

    def run(*overrides: str, **variables: str) -> Run:
        made.append(Run(tmp_path, *overrides, **variables))
        return made[-1]

    yield run
    for one in made:
        one.process.kill()
        one.process.wait()


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_a_signal_saves_and_ends_the_run(number: str, code: int, start: Callable[..., Run]) -> None:
    run = start()
    run.wait_for(lambda: run.rows() > 8)
    os.kill(run.process.pid, getattr(signal, number))
    found, output = run.ended()
    assert found == code, output
    assert run.saved() == run.logged(), "no step is lost"
    assert f"longnet: {number} ended the run after step {run.saved()}" in output
    assert f"resume=auto goes on from {runs.checkpoint(run.directory).relative_to(run.directory.parents[2])}" in output
    assert "Traceback" not in output
    assert runs.read_summary(run.directory)["status"] == "stopped"


@pytest.mark.parametrize("is_ignored", [False, pytest.param(True, marks=pytest.mark.soak)])
def test_a_run_on_a_terminal_that_is_closed_is_saved(is_ignored: bool, tmp_path: Path) -> None:
    """It ends with 129; with SIGHUP ignored, as under nohup, it goes on to its last step."""
    desk.lay(tmp_path)
    master, slave = pty.openpty()

    def take_terminal() -> None:
        fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)

    steps = ["trainer.max_steps=200"] if is_ignored else []
    process = subprocess.Popen(
        [sys.executable, "-m", "longnet_kit.cli", "fit", "tiny.yaml", *ENDLESS, *ALONE, *steps],
        cwd=tmp_path, env=desk.environment(), stdin=slave, stdout=slave, stderr=slave,
        start_new_session=True, preexec_fn=take_terminal,
    )  # fmt: skip
    os.close(slave)
    shown, deadline = b"", time.monotonic() + 120
    while b"tokens/s" not in shown:
        assert time.monotonic() < deadline, shown
        shown += os.read(master, 1 << 12)
    assert b"\x1b[" in shown, "a bar is drawn"
    os.close(master)
    assert process.wait(timeout=60) == (0 if is_ignored else 129)
    run = tmp_path / "runs/tiny/version_0"
    last = int(runs.metrics_until(run, 10**9)[-1]["step"])
    assert runs.step_of(runs.checkpoint(run)) == last == (200 if is_ignored else last)
    assert runs.read_summary(run)["status"] == ("finished" if is_ignored else "stopped")


def test_a_signal_to_all_processes_of_a_run_with_loaders_saves_too(start: Callable[..., Run]) -> None:
    run = start("data.num_workers=2")
    run.wait_for(lambda: run.rows() > 8)
    os.killpg(run.process.pid, signal.SIGTERM)
    code, output = run.ended()
    assert (code, run.saved()) == (143, run.logged()), output


def test_a_signal_in_the_sanity_check_ends_the_run_after_its_first_step(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    run = start("imports=[slow]", "trainer.num_sanity_val_steps=2")
    run.wait_for((tmp_path / "validating").exists)
    os.kill(run.process.pid, signal.SIGTERM)
    code, output = run.ended()
    assert (code, run.saved()) == (143, 1), output


def test_a_second_sigint_ends_the_run_at_once(start: Callable[..., Run]) -> None:
    """Also where a step takes long: the main thread does not come back from it."""
    run = start("imports=[slow]", "data.num_workers=2")
    (run.directory.parents[2] / "slow.py").write_text(
        "import hashlib\nfrom pathlib import Path\nfrom longnet_kit.tasks import LanguageModeling\n"
        "def step(self, batch, batch_idx):\n    Path('in_step').touch()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)\n"
        "LanguageModeling.training_step = step\n"
    )
    run.wait_for((run.directory.parents[2] / "in_step").exists)
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(0.3)
    assert run.process.poll() is None
    began = time.monotonic()
    os.killpg(run.process.pid, signal.SIGINT)
    code, output = run.ended()
    assert code == 130 and time.monotonic() - began < 2, output
    assert "once more ends it at once" in output and "interrupted twice" in output


def test_a_signal_in_a_validation_saves_the_step_before_and_the_validation_comes_again(
    start: Callable[..., Run], tmp_path: Path
) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    steps = ["trainer.max_steps=5", "trainer.val_check_interval=3", "trainer.limit_val_batches=4"]
    run = start("imports=[slow]", *steps)
    run.wait_for((tmp_path / "validating").exists)
    os.kill(run.process.pid, signal.SIGTERM)
    code, output = run.ended()
    assert (code, run.saved(), run.logged()) == (143, 3, 3), output
    assert not any("val/loss" in row for row in runs.metrics_until(run.directory, 10))
    (tmp_path / "done").touch()
    again = start("imports=[slow]", *steps, "resume=auto")
    assert again.ended()[0] == 0
    validated = [int(row["step"]) for row in runs.metrics_until(run.directory, 10) if "val/loss" in row]
    assert validated == [3, 5]


def test_slurm_is_asked_to_requeue_a_run_that_goes_on(start: Callable[..., Run], tmp_path: Path) -> None:
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(scontrol.stat().st_mode | stat.S_IXUSR)
    path = f"{scontrol.parent}{os.pathsep}{os.environ['PATH']}"
    run = start("resume=auto", PATH=path, SLURM_JOB_ID="17")
    run.wait_for(lambda: run.rows() > 4)
    os.kill(run.process.pid, signal.SIGUSR1)
    code, output = run.ended()
    assert code == 138 and "SLURM job 17 is requeued" in output
    assert (tmp_path / "asked").read_text() == "requeue 17\n"


@pytest.mark.parametrize("error", [OSError("no such program"), subprocess.TimeoutExpired("scontrol", 60)])
def test_a_slurm_that_does_not_answer_is_told_of(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(command: list[str], **_: Any) -> None:
        assert command == ["scontrol", "requeue", "5_2"]
        raise error

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", failing)
    told: list[str] = []
    signals.requeue(told.append, goes_on=True)
    assert "SLURM job 5_2 could not be requeued" in told[0] and str(error) in told[0]


def test_a_job_that_would_start_from_scratch_is_not_requeued(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("it was asked"))
    told: list[str] = []
    signals.requeue(told.append, goes_on=False)
    assert told == ["SLURM job 17 is not requeued: without resume=auto it would start from scratch"]


def test_handlers_are_put_back_and_ignored_signals_stay_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    def own(*_: Any) -> None:
        """Somebody else's handler."""

    before = [signal.signal(signal.SIGTERM, own), signal.signal(signal.SIGUSR1, signal.SIG_IGN)]
    try:
        with signals.Listener().listening() as listener:
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(0.1)
            assert listener.received == 0
            os.kill(os.getpid(), signal.SIGTERM)
            deadline = time.monotonic() + 10
            while not listener.received and time.monotonic() < deadline:
                time.sleep(0.01)
            assert listener.received == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is own
        assert signal.getsignal(signal.SIGUSR1) == signal.SIG_IGN
        assert signal.set_wakeup_fd(-1) == -1
        deadline = time.monotonic() + 10
        while any(thread.name == "signals" for thread in threading.enumerate()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not any(thread.name == "signals" for thread in threading.enumerate())
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGUSR1, before[1])


def test_a_thread_listens_to_nothing_and_does_no_harm() -> None:
    errors: list[BaseException] = []

    def listen() -> None:
        try:
            with signals.Listener().listening():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert errors == []
