"""Figures of a validation: loss by position in the context, perplexity by its length, classes given for classes."""

from __future__ import annotations

import re
from typing import Any

from lightning import Callback, LightningModule, Trainer

from longnet_kit.callbacks.board import boards, draw
from longnet_kit.report import figures

MOST_CLASSES = 50
_CONTEXT = re.compile(r"val/perplexity@(\d+)")


class LossByPosition(Callback):
    """Draws the task's `loss_by_position` into TensorBoard as `val/loss_by_position`, where the task measures it."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        losses = getattr(pl_module, "loss_by_position", None)
        if trainer.sanity_checking or losses is None or not boards(trainer) or losses.isnan().all():
            return
        model: Any = pl_module.model
        shared = -(-model.seq_len // len(losses))
        tokens = getattr(pl_module, "tokens_by_position", None)
        tokens = None if tokens is None else tokens.numpy()
        draw(trainer, "val/loss_by_position", figures.loss_by_position(losses.numpy(), tokens, shared))


class PerplexityByContext(Callback):
    """Draws the scalars `val/perplexity@<context>` into TensorBoard as `val/perplexity_by_context`, if there are two.

    The perplexity of whole sequences, `val/perplexity`, stands at their length.
    """

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not boards(trainer):
            return
        scalars = trainer.callback_metrics
        found = {int(m[1]): float(scalars[m[0]]) for m in map(_CONTEXT.fullmatch, scalars) if m}
        seq_len = getattr(pl_module.model, "seq_len", None)
        if seq_len is not None and "val/perplexity" in scalars:
            found.setdefault(seq_len, float(scalars["val/perplexity"]))
        if len(found) > 1:
            draw(trainer, "val/perplexity_by_context", figures.perplexity_by_context(found))


class Confusion(Callback):
    """Draws the task's `confusion` into TensorBoard as `val/confusion`, where it classifies into at most 50 classes."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        counts = getattr(pl_module, "confusion", None)
        classes = getattr(getattr(getattr(trainer, "datamodule", None), "source", None), "classes", ())
        if trainer.sanity_checking or counts is None or not boards(trainer) or not 0 < len(classes) <= MOST_CLASSES:
            return
        draw(trainer, "val/confusion", figures.confusion(counts.cpu().numpy(), list(classes)))
