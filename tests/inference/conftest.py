"""A run and its exported file to read and generate with, at a desk of each test's own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.trained import train

RECIPE = """
name: tiny
model: {dim: 16, layers: 2, heads: 2, ffn_dim: 32,
        attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 4}
optimizer: {lr: 1.0e-2, warmup_steps: 2}
trainer: {max_steps: 4, limit_val_batches: 0, enable_progress_bar: false, accelerator: cpu}
"""


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with a recipe, a text, a run and its exported weights."""
    return train(tmp_path_factory.mktemp("trained"), RECIPE)


@pytest.fixture
def desk(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which a test may spoil."""
    desk = shutil.copytree(trained, tmp_path / "desk")
    monkeypatch.chdir(desk)
    return desk
