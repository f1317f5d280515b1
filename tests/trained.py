"""A working directory in which something small was trained."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

from longnet_kit import experiment, export, recipe

EXPORTED = "tiny.safetensors"


def train(folder: Path, text: str) -> Path:
    """Put a recipe named tiny, the text that it is about, its run and its exported weights into a folder."""
    with contextlib.chdir(folder):
        Path("text.txt").write_text("".join(f"{random.Random(i).random()} is number {i}\n" for i in range(500)))
        Path("tiny.yaml").write_text(text)
        experiment.run(recipe.load("tiny.yaml"))
        export.export("runs/tiny", EXPORTED)
    return folder
