"""A validation at the last step, wherever the interval falls."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class FinalValidation(Callback):
    """Validate after the last optimizer step, also where `val_check_interval` does not divide the run.

    Lightning validates when a stop is asked for; so one is asked for at the last step, and taken back once it has
    worked, so that nobody takes the run for one that was stopped.
    """

    def __init__(self) -> None:
        self._asked = False

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if trainer.global_step == trainer.max_steps and not trainer.should_stop:
            trainer.should_stop = self._asked = True

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._take_back(trainer)

    def _take_back(self, trainer: Trainer) -> None:
        if self._asked:
            trainer.should_stop = self._asked = False
