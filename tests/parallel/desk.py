"""A working directory with a small recipe for several processes, and the command line run in it."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

from tests.parallel.ranks import ROOT

RECIPE = """
name: tiny
model: {dim: 16, layers: 2, heads: 2, ffn_dim: 32,
        attention: {backend: dilated, segment_lengths: [8, 32], dilation_rates: [1, 2]}}
data: {source: files, paths: [text.txt], tokenizer: bytes, seq_len: 32, batch_size: 4, eval_contexts: [6, 16]}
optimizer: {lr: 1.0e-2}
trainer: {max_steps: 6, limit_val_batches: 2, val_check_interval: 4, log_every_n_steps: 2, num_sanity_val_steps: 0,
          devices: 2, accelerator: cpu}
checkpoint: {every_n_steps: 2, keep: 2}
strategy: {name: sequence_parallel, sequence_parallel_size: 2, timeout: 60}
"""


def lay(folder: Path) -> None:
    """Put tiny.yaml and its text into a folder."""
    words = random.Random(0)
    lines = (f"def f{words.randrange(99)}(x):\n    return x + {words.randrange(9)}\n" for _ in range(1500))
    (folder / "text.txt").write_text("".join(lines))
    (folder / "tiny.yaml").write_text(RECIPE)


def environment(**variables: str) -> dict[str, str]:
    """This process's environment for a new job: nothing in it says that the job is running already."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE", "NODE_RANK")}
    return inherited | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def longnet(folder: Path, *arguments: str, expect: int = 0, **variables: str) -> str:
    """Run the command in a folder; its output."""
    done = subprocess.run(
        [sys.executable, "-m", "longnet_kit.cli", *arguments],
        cwd=folder,
        env=environment(**variables),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=280,
    )
    assert done.returncode == expect, f"exit code {done.returncode}\n{done.stdout}"
    return done.stdout


def summary(folder: Path, run: str = "runs/tiny/version_0") -> dict[str, float]:
    return json.loads((folder / run / "summary.json").read_text())
