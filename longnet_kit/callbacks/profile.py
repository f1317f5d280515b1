"""A trace of a few optimizer steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from longnet_kit.callbacks.board import boards


class Profile(Callback):
    """Traces optimizer steps of the first rank, and writes `trace.json.gz` into the run directory.

    The file is for chrome://tracing or Perfetto. Lightning's own profiler of torch would start anew after every
    validation, and write a trace each time.

    Args:
        first: the first step that is traced, counted from where a run starts or goes on; those before warm up.
        steps: how many are traced.
    """

    def __init__(self, first: int = 3, steps: int = 3) -> None:
        self._first, self._steps = first, steps
        self._began_at = 0
        self._profiler: profile | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._began_at = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        done = trainer.global_step - self._began_at
        if self._profiler is None and boards(trainer) and done == self._first - 1:
            activities = [ProfilerActivity.CPU]
            if pl_module.device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profiler = profile(activities=activities, record_shapes=True)
            self._profiler.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step - self._began_at >= self._first - 1 + self._steps:
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        """Write what was traced, if anything was and is not written yet."""
        if self._profiler is None:
            return
        self._profiler.stop()
        self._profiler.export_chrome_trace(str(Path(boards(trainer)[0].log_dir) / "trace.json.gz"))
        self._profiler, self._first = None, 0  # once
