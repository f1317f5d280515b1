"""A trace of a few optimizer steps."""

from __future__ import annotations

import warnings
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
        self._is_tracing = False

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
            self._is_tracing = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if self._is_tracing and trainer.global_step - self._began_at >= self._first - 1 + self._steps:
            self._stop()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._profiler is None and boards(trainer):
            steps = trainer.global_step - self._began_at
            warnings.warn(
                f"no trace: the run did {steps} steps, and tracing begins with step {self._first}; raise "
                "trainer.max_steps", stacklevel=2,
            )  # fmt: skip
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _stop(self) -> None:
        assert self._profiler is not None
        self._profiler.stop()
        self._is_tracing = False

    def _write(self, trainer: Trainer) -> None:
        """Write what was traced, if anything was: at the end, since it takes its time."""
        if self._profiler is None:
            return
        if self._is_tracing:
            self._stop()
        self._profiler.export_chrome_trace(str(Path(boards(trainer)[0].log_dir) / "trace.json.gz"))
        self._profiler = None
