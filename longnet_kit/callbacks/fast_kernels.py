"""Kernels that a process has to ask for before attention can use them."""

from __future__ import annotations

from lightning import Callback, LightningModule, Trainer

from longnet_kit.attention import routes


class FastKernels(Callback):
    """Take FlashAttention-3 where it is installed and the GPU is one that it is for."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        routes.use_flash_attention_3(trainer.strategy.root_device)
