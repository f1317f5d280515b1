"""The figure of loss by position, after each validation."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import TensorBoardLogger

from longnet_kit.report import figures


class LossByPosition(Callback):
    """Draws the task's `loss_by_position` into TensorBoard as `val/loss_by_position`, where the task measures it."""

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = getattr(pl_module, "loss_by_position", None)
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if trainer.sanity_checking or losses is None or not boards or losses.isnan().all():
            return
        model: Any = pl_module.model
        shared = -(-model.seq_len // len(losses))
        image = figures.pixels(figures.loss_by_position(losses.numpy(), positions_per_loss=shared))
        for board in boards:
            board.experiment.add_image("val/loss_by_position", image, trainer.global_step, dataformats="HWC")
