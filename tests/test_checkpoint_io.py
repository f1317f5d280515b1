"""A checkpoint is on the disk whole, or not under its name; and its bytes are those that were written."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from longnet_kit import checkpoint_io, recipe, trainers
from longnet_kit.checkpoint_io import StagedCheckpointIO

ROOT = Path(__file__).parents[1]
CONTENT = {"x": torch.arange(1000.0), "step": 3}


@pytest.fixture
def written(tmp_path: Path) -> Path:
    target = tmp_path / "new" / "step_00000001.ckpt"
    io = StagedCheckpointIO()
    io.save_checkpoint(CONTENT, target)
    assert io.problem == ""
    return target


def test_what_was_written_is_read(written: Path) -> None:
    assert {path.name for path in written.parent.iterdir()} == {written.name, f"{written.name}.sha256"}
    assert torch.equal(StagedCheckpointIO().load_checkpoint(written)["x"], CONTENT["x"])
    assert checkpoint_io.damage(written) == ""


def test_the_checksum_is_one_that_other_tools_check(written: Path) -> None:
    ended = subprocess.run(["sha256sum", "--check", f"{written.name}.sha256"], cwd=written.parent, capture_output=True)
    assert ended.returncode == 0, ended


def changed(file: Path, content: bytes) -> None:
    """Write other bytes, at another time than the last."""
    before = file.stat().st_mtime_ns
    file.write_bytes(content)
    os.utime(file, ns=(before + 1, before + 1))


@pytest.mark.parametrize("has_checksum", [True, False])
def test_damage_is_found(written: Path, has_checksum: bool) -> None:
    sound = written.read_bytes()
    if not has_checksum:
        checkpoint_io.checksum_file(written).unlink()
        changed(written, sound)
        assert checkpoint_io.damage(written) == ""
    places = random.Random(0)
    start = sound.find(CONTENT["x"].numpy().tobytes()) if not has_checksum else 0
    stop = start + 4000 if not has_checksum else len(sound)  # between its parts a zip file has bytes that nobody reads
    for _ in range(25):
        flipped = bytearray(sound)
        flipped[places.randrange(start, stop)] ^= 1 << places.randrange(8)
        changed(written, bytes(flipped))
        assert checkpoint_io.damage(written)
    for content in (sound[:-1], sound[: len(sound) // 2], b"", b"not a checkpoint"):
        changed(written, content)
        assert checkpoint_io.damage(written)
    changed(written, sound)
    assert checkpoint_io.damage(written) == ""
    written.unlink()
    assert "no such file" in checkpoint_io.damage(written)


def test_a_link_is_held_against_the_checksum_of_its_target(written: Path) -> None:
    link = written.with_name("latest.ckpt")
    link.symlink_to(written.name)
    assert checkpoint_io.damage(link) == ""
    changed(written, written.read_bytes()[:-1] + b"?")
    assert checkpoint_io.damage(link)


LIMITED = """
import resource, sys, torch
from longnet_kit.checkpoint_io import StagedCheckpointIO
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
io = StagedCheckpointIO()
io.save_checkpoint({"x": torch.ones(1_000_000)}, sys.argv[1])
print(io.problem)
"""


def test_a_failed_write_is_told_and_leaves_nothing(written: Path) -> None:
    new = written.with_name("step_00000002.ckpt")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    ended = subprocess.run([sys.executable, "-c", LIMITED, str(new)], env=environment, capture_output=True, text=True)
    assert ended.stdout.strip() == "File too large", ended.stderr
    assert {path.name for path in written.parent.iterdir()} == {written.name, f"{written.name}.sha256"}


def test_a_folder_that_cannot_be_made_is_told(written: Path) -> None:
    io = StagedCheckpointIO()
    io.save_checkpoint(CONTENT, written / "below a file" / "step_00000002.ckpt")
    assert io.problem


def test_what_cannot_be_pickled_is_the_programmers_error(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="pickle"):
        StagedCheckpointIO().save_checkpoint({"x": lambda: None}, tmp_path / "step_00000001.ckpt")


def test_leftovers_are_removed_and_nothing_else(written: Path) -> None:
    folder = written.parent
    for name in (".step_00000002.ckpt", ".step_00000002.ckpt.sha256", "step_00000002.ckpt.sha256", "notes.txt"):
        (folder / name).write_text("")
    checkpoint_io.remove_staged(folder)
    assert {path.name for path in folder.iterdir()} == {written.name, f"{written.name}.sha256", "notes.txt"}


def test_a_damaged_checkpoint_is_set_aside_with_its_checksum(written: Path) -> None:
    aside = checkpoint_io.set_aside(written)
    assert {path.name for path in written.parent.iterdir()} == {aside.name, f"{aside.name}.sha256"}
    assert not list(written.parent.glob("step_*.ckpt"))


@pytest.mark.parametrize("strategy", ["auto", "sequence_parallel_fsdp"])
def test_runs_write_so(strategy: str) -> None:
    r = recipe.load("quickstart", [f"strategy.name={strategy}", "trainer.accelerator=cpu"])
    io: Any = trainers.build(r, []).strategy.checkpoint_io
    assert isinstance(io, StagedCheckpointIO)
