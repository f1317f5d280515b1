"""Language modelling: the next token's loss over the global batch, and what is measured of it.

Scalars: train/loss, train/grad_norm, train/lr; val/ and test/: loss, perplexity, bits_per_byte, perplexity@<context>.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from longnet_kit.attention.sharding import bound
from longnet_kit.data import tokenizers
from longnet_kit.errors import UserError
from longnet_kit.model import Transformer
from longnet_kit.model import build as network_of
from longnet_kit.model.loss import IGNORED, token_losses
from longnet_kit.tasks import register, windows
from longnet_kit.tasks.metrics import LossByPosition, MeanLoss
from longnet_kit.tasks.scalars import record
from longnet_kit.tasks.training import Batch, Training

if TYPE_CHECKING:
    from longnet_kit import recipe


@register("language_modeling")
class LanguageModeling(Training):
    """Train a network to predict each token from those before it.

    A batch holds `tokens` and `targets`, (B, N) int64 each; a target of -100 has no loss, and does not count in the
    mean over the tokens of an optimizer step.

    Args:
        model: the bare network.
        optimizer: a recipe's `optimizer` section.
        max_steps: optimizer steps that the learning-rate schedule spans.
        eval_contexts: window lengths at which validation and test also measure perplexity, in tokens.

    Raises:
        UserError: an evaluation context that no sequence holds.
    """

    takes: tuple[str, ...] = ("text", "answers")
    """The kinds of data that it can be trained on, see `data.Source.supplies`."""

    @classmethod
    def build_network(cls, r: recipe.Recipe, dtype: torch.dtype) -> Transformer:
        """The bare network of a recipe; `dtype` is that of its matrix products."""
        return network_of(r.model, tokenizers.build(r.data.tokenizer).vocab_size, r.data.seq_len, dtype=dtype)

    def __init__(
        self, model: Transformer, optimizer: recipe.Optimizer, *, max_steps: int, eval_contexts: Sequence[int] = ()
    ) -> None:
        if not all(1 <= context <= model.seq_len for context in eval_contexts):
            given = list(eval_contexts)
            raise UserError(f"eval_contexts is {given}, expected lengths of 1 to seq_len, {model.seq_len}")
        contexts = sorted(set(eval_contexts))
        super().__init__(model, optimizer, max_steps=max_steps, eval_contexts=contexts)
        self.eval_contexts = contexts
        self.loss_by_position: Tensor | None = None
        """Mean loss in nats at each position, (seq_len,), of the latest validation or test."""
        self.tokens_by_position: Tensor | None = None
        """How many tokens each of these is the mean of, (seq_len,) int64."""

    def forward(self, tokens: Tensor, **options: Tensor | None) -> Tensor:
        """Logits, (B, N, V); see `Transformer.forward`."""
        return self.model(tokens, **options)

    def blank_batch(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        """See `Training.blank_batch`."""
        sizes = batch_size, seq_len
        batch = {name: torch.empty(sizes, dtype=torch.int64) for name in ("tokens", "targets")}
        return batch | {"index": torch.empty(batch_size, dtype=torch.int64)}

    def _batch_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self._losses(batch["tokens"], batch["targets"])

    def _losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token, and whether it counts: (B, N) each."""
        model = self.model
        losses = token_losses(model.hidden(tokens), model.head_weight, targets, model.loss_chunk)
        return losses, targets != IGNORED

    def _start_evaluation(self) -> None:
        self._metrics["whole"] = LossByPosition(self.model.seq_len).to(self.device)
        for context in self.eval_contexts:
            self._metrics[f"@{context}"] = MeanLoss().to(self.device)

    def _evaluate(self, batch: Batch) -> None:
        tokens, targets = batch["tokens"], batch["targets"]
        shard = self.model.shard
        whole = self._losses(tokens, targets)
        n = tokens.shape[1]
        self._metrics["whole"].update(*whole, 0 if shard is None else shard.first_position(n))
        for context in self.eval_contexts:
            if context == n * (1 if shard is None else shard.size):
                self._metrics[f"@{context}"].update(*whole)
                continue
            cut = windows.cut(tokens, targets, context, shard)
            if cut is not None:
                with bound(self.model, cut.shard):
                    self._metrics[f"@{context}"].update(*self._losses(cut.tokens, cut.targets))

    def _finish_evaluation(self, stage: str) -> None:
        if self.trainer.sanity_checking:
            return
        mean, by_position, tokens = self._metrics["whole"].compute()
        self.loss_by_position, self.tokens_by_position = by_position.cpu(), tokens.cpu()
        scalars = {f"{stage}/loss": mean, f"{stage}/perplexity": mean.exp()}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", {}).get(stage)
        if bytes_per_token is not None:
            scalars[f"{stage}/bits_per_byte"] = mean / math.log(2) / bytes_per_token
        for context in self.eval_contexts:
            scalars[f"{stage}/perplexity@{context}"] = self._metrics[f"@{context}"].compute().exp()
        record(self, scalars, self.trainer.global_step)
