"""Figures of a model's attention: its pattern, once, and the share of each branch in the mixture, per validation."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from longnet_kit.attention import AttentionBackend
from longnet_kit.attention.patterns import Dilated
from longnet_kit.callbacks.board import Board, boards, draw
from longnet_kit.report import figures, pattern_figures
from longnet_kit.report.pattern import OWN_WEIGHTS

DRAWN = 2048
"""Tokens that the figure of a pattern shows at most."""


class AttentionPattern(Callback):
    """Draws which keys each query sees, per branch and head, into TensorBoard as `attention_pattern`.

    It is that of the first layer, of whole sequences or their first 2,048 tokens; drawn when a run starts.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        layers = backends(pl_module)
        if not boards(trainer) or trainer.global_step or not layers or layers[0].pattern is None:
            return
        model: Any = pl_module.model
        length = min(model.seq_len, DRAWN)
        heads, causal = model.config["heads"], model.causal
        note = "" if layers[0].branch_logits is None else OWN_WEIGHTS
        figure = pattern_figures.pattern_figure(layers[0].pattern, length, heads, causal, note)
        draw(trainer, "attention_pattern", figure)


class BranchWeights(Callback):
    """Draws the mean share of each branch in the mixture, per layer, into TensorBoard as `val/branch_weights`.

    The mean is over all heads and tokens of a validation's first batch, as far as some branch keeps them; padding does
    not count. A model whose attention has no branches gets no figure.
    """

    def __init__(self) -> None:
        self._sums: dict[int, Tensor] = {}

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if (
            batch_idx
            or dataloader_idx
            or trainer.sanity_checking
            or not any(isinstance(x, Board) for x in trainer.loggers)
        ):
            return
        self._sums = {}
        for layer, backend in enumerate(backends(pl_module)):
            if isinstance(backend.pattern, Dilated):
                backend.watch = partial(self._look, layer, backend)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._sums:
            return
        sums = torch.stack([self._sums[layer] for layer in sorted(self._sums)])  # (layers, branches + 1)
        sums, self._sums = trainer.strategy.reduce(sums, reduce_op="sum"), {}
        shares = (sums[:, :-1] / sums[:, -1:]).cpu().numpy()
        if boards(trainer):
            pattern = next(x.pattern for x in backends(pl_module) if isinstance(x.pattern, Dilated))
            draw(trainer, "val/branch_weights", figures.branch_weights(shares, pattern.branches))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        for backend in backends(pl_module):
            backend.watch = None

    def _look(
        self, layer: int, backend: AttentionBackend, q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None
    ) -> None:
        """Add up what the layer's first attention of the batch mixes; it is the one over whole sequences."""
        backend.watch = None
        shares = backend.branch_weights(q, k, causal, key_padding_mask)  # (branches, B, N, H)
        covered = shares.sum(0) > 0
        sums = [*shares.flatten(1).sum(1, dtype=torch.float64), covered.sum().to(torch.float64)]
        self._sums[layer] = torch.stack(sums)


def backends(module: LightningModule) -> list[AttentionBackend]:
    """The attention backend of each layer; [] where the task's model does not say."""
    return list(getattr(getattr(module, "model", None), "attention_backends", []))
