"""A checkpoint is on the disk whole, or not under its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longnet_kit import checkpoint_io, experiment, recipe

CUT_OFF = """
import os, signal, sys, torch
from longnet_kit.checkpoint_io import StagedCheckpointIO
save = torch.save
def half(checkpoint, file):
    save(checkpoint, file)
    file.truncate(file.tell() // 2)
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
torch.save = half
StagedCheckpointIO().save_checkpoint({"x": torch.ones(1000)}, sys.argv[1])
"""


def test_what_was_written_is_read(tmp_path: Path) -> None:
    target = tmp_path / "new" / "step_00000001.ckpt"
    checkpoint_io.StagedCheckpointIO().save_checkpoint({"x": torch.ones(3)}, target)
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    assert torch.equal(checkpoint_io.StagedCheckpointIO().load_checkpoint(target)["x"], torch.ones(3))


def test_a_write_that_is_killed_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    target = tmp_path / "step_00000001.ckpt"
    checkpoint_io.StagedCheckpointIO().save_checkpoint({"x": torch.zeros(1000)}, target)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "TMPDIR": str(tmp_path / "elsewhere")}
    ended = subprocess.run([sys.executable, "-c", CUT_OFF, str(target)], env=environment)
    assert ended.returncode == -signal.SIGKILL
    assert {path.name for path in tmp_path.iterdir()} == {target.name, f".{target.name}"}
    assert torch.equal(torch.load(target)["x"], torch.zeros(1000))
    checkpoint_io.remove_staged(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.parametrize("strategy", ["auto", "sequence_parallel_fsdp"])
def test_runs_write_so(strategy: str) -> None:
    trainer = experiment._trainer(recipe.load("quickstart", [f"strategy.name={strategy}", "trainer.accelerator=cpu"]))
    assert isinstance(trainer.strategy.checkpoint_io, checkpoint_io.StagedCheckpointIO)
