"""How a checkpoint gets onto the disk: whole, or not under its name at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO


class StagedCheckpointIO(TorchCheckpointIO):
    """Writes beside the target under a hidden name, waits for the disk, and renames.

    Lightning's own writing stages in the temporary directory; from another filesystem, its last act is a copy that a
    kill can cut off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with staged(target).open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged(target), target)


def staged(target: Path) -> Path:
    """Where a checkpoint is until it is whole."""
    return target.with_name(f".{target.name}")


def remove_staged(folder: Path) -> None:
    """Remove what a write that was cut off has left in a folder."""
    for left_over in folder.glob(".*.ckpt"):
        left_over.unlink()
