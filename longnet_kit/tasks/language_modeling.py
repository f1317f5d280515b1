"""Language modelling: the next token's loss over the global batch, and what is measured of it.

Scalars: train/loss, train/grad_norm, train/lr; val/ and test/: loss, perplexity, bits_per_byte, perplexity@<context>.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from lightning.fabric.utilities.seed import reset_seed
from torch import Tensor

from longnet_kit.attention.sharding import bound
from longnet_kit.data import tokenizers
from longnet_kit.model import Transformer
from longnet_kit.model import build as network_of
from longnet_kit.model.loss import IGNORED, token_losses
from longnet_kit.tasks import optimization, register, windows
from longnet_kit.tasks.metrics import LossByPosition, MeanLoss
from longnet_kit.tasks.scalars import due, record

if TYPE_CHECKING:
    from longnet_kit import recipe

Batch = Mapping[str, Tensor]


@register("language_modeling")
class LanguageModeling(LightningModule):
    """Train a network to predict each token from those before it.

    A batch holds `tokens` and `targets`, (B, N) int64 each; a target of -100 has no loss. The gradient of an optimizer
    step is that of the mean loss over all its tokens: all ranks, all accumulated batches, however unevenly their
    targets are ignored.

    Args:
        model: the bare network.
        optimizer: a recipe's `optimizer` section.
        max_steps: optimizer steps that the learning-rate schedule spans.
        eval_contexts: window lengths at which validation and test also measure perplexity, in tokens.

    Raises:
        ValueError: an evaluation context that no sequence holds.
    """

    model: Transformer
    takes: tuple[str, ...] = ("text", "answers")
    """The kinds of data that it can be trained on, see `data.Source.supplies`."""

    @classmethod
    def build_network(cls, r: recipe.Recipe, dtype: torch.dtype) -> Transformer:
        """The bare network of a recipe; `dtype` is that of its matrix products."""
        return network_of(r.model, tokenizers.build(r.data.tokenizer).vocab_size, r.data.seq_len, dtype=dtype)

    def __init__(
        self, model: Transformer, optimizer: recipe.Optimizer, *, max_steps: int, eval_contexts: Sequence[int] = ()
    ) -> None:
        super().__init__()
        if not all(1 <= context <= model.seq_len for context in eval_contexts):
            given = list(eval_contexts)
            raise ValueError(f"eval_contexts is {given}, expected lengths of 1 to seq_len, {model.seq_len}")
        self.model = model
        self.optimizer_options = optimizer
        self.max_steps = max_steps
        self.eval_contexts = sorted(set(eval_contexts))
        self.save_hyperparameters(
            {
                "model": model.config,
                "optimizer": optimization.as_dict(optimizer),
                "max_steps": max_steps,
                "eval_contexts": self.eval_contexts,
            },
            logger=False,
        )
        self.loss_by_position: Tensor | None = None
        """Mean loss in nats at each position, (seq_len,), of the latest validation or test."""
        # In a dictionary, not as submodules: a precision that casts the model would cast the sums in the metrics.
        self._metrics: dict[str, Any] = {}
        self._denominator: Tensor | None = None

    def forward(self, tokens: Tensor, **options: Tensor | None) -> Tensor:
        """Logits, (B, N, V); see `Transformer.forward`."""
        return self.model(tokens, **options)

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule by the step; see `tasks.optimization`."""
        optimizer = optimization.build(self.optimizer_options, self.model)
        scheduler = optimization.schedule(self.optimizer_options, optimizer, self.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the dtype of the saved weights: Lightning restores them before it casts, and would round float64."""
        saved = checkpoint["state_dict"].get("model.embedding.weight", self.model.embedding.weight)
        self.model.to(saved.dtype)

    def on_fit_start(self) -> None:
        reset_seed()  # what is drawn in training must not depend on what was drawn to start one process or many

    def on_train_start(self) -> None:
        self._metrics["train"] = MeanLoss().to(self.device)
        self._denominator = None

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """The loss whose gradient, averaged over ranks and accumulated batches, is that of the mean over all tokens.

        The sum over this rank's tokens is divided by the count over all ranks in the first batch of the optimizer step;
        once the later batches' counts are known, `_weigh_by_tokens` corrects for them.
        """
        losses, counted = self._losses(batch["tokens"], batch["targets"])
        total, count = losses.sum(), counted.sum()
        if self._denominator is None:
            self._denominator = self._over_ranks(count).clamp(min=1)
            self._count = torch.zeros_like(count)
        self._count += count
        self._metrics["train"].update(losses.detach(), counted)
        return total * self.trainer.world_size / self._denominator

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.accumulate_grad_batches > 1:
            self._weigh_by_tokens()
        step = self.trainer.global_step + 1
        if due(self.trainer, step):
            scalars = {
                "train/loss": self._metrics["train"].compute(),
                "train/grad_norm": optimization.gradient_norm(self),
                "train/lr": optimizer.param_groups[0]["lr"],
            }
            record(self, scalars, step)
        self._metrics["train"].reset()
        self._denominator = None

    def on_validation_epoch_start(self) -> None:
        self._start_evaluation()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._finish_evaluation("val")

    def on_test_epoch_start(self) -> None:
        self._start_evaluation()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._finish_evaluation("test")

    def _losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of each token, and whether it counts: (B, N) each."""
        model = self.model
        losses = token_losses(model.hidden(tokens), model.embedding.weight, targets, model.loss_chunk)
        return losses, targets != IGNORED

    def _over_ranks(self, count: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(count.clone(), reduce_op="sum")

    def _weigh_by_tokens(self) -> None:
        """Scale the accumulated gradients from the first batch's token count to that of the whole optimizer step."""
        assert self._denominator is not None
        given = self.trainer.accumulate_grad_batches * int(self._denominator)
        factor = given / max(1, int(self._over_ranks(self._count)))
        if factor != 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)

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
        """Record everything measured under `stage`, `val` or `test`."""
        if self.trainer.sanity_checking:
            return
        mean, by_position = self._metrics["whole"].compute()
        self.loss_by_position = by_position.cpu()
        scalars = {f"{stage}/loss": mean, f"{stage}/perplexity": mean.exp()}
        bytes_per_token = getattr(getattr(self.trainer, "datamodule", None), "bytes_per_token", {}).get(stage)
        if bytes_per_token is not None:
            scalars[f"{stage}/bits_per_byte"] = mean / math.log(2) / bytes_per_token
        for context in self.eval_contexts:
            scalars[f"{stage}/perplexity@{context}"] = self._metrics[f"@{context}"].compute().exp()
        record(self, scalars, self.trainer.global_step)
