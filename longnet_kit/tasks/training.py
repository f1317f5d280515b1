"""What every task does alike: the mean loss over all that counts in an optimizer step, and when things are logged.

Scalars: train/loss, train/grad_norm, train/lr, and what a task adds to them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from lightning import LightningModule
from lightning.fabric.utilities.seed import reset_seed
from torch import Tensor

from longnet_kit.model import Transformer
from longnet_kit.tasks import optimization
from longnet_kit.tasks.metrics import MeanLoss
from longnet_kit.tasks.scalars import due, record

if TYPE_CHECKING:
    from longnet_kit import recipe

Batch = Mapping[str, Tensor]


class Training(LightningModule):
    """Train a network on losses of which each counts or does not: of tokens, or of whole sequences.

    The gradient of an optimizer step is that of the mean over everything that counts in it: all ranks, all accumulated
    batches, however unevenly they are filled. A task writes `_batch_losses`, and `_start_evaluation`, `_evaluate` and
    `_finish_evaluation` for validation and test.

    Args:
        model: the bare network.
        optimizer: a recipe's `optimizer` section.
        max_steps: optimizer steps that the learning-rate schedule spans.
        hyper: further hyper-parameters, for checkpoints to name.
    """

    model: Transformer
    predicts_tokens: bool = True
    """Whether its network gives logits of the next token, so that text can be generated and streamed."""

    def __init__(self, model: Transformer, optimizer: recipe.Optimizer, *, max_steps: int, **hyper: Any) -> None:
        super().__init__()
        self.model = model
        self.optimizer_options = optimizer
        self.max_steps = max_steps
        self.save_hyperparameters(
            {"model": model.config, "optimizer": optimization.as_dict(optimizer), "max_steps": max_steps, **hyper},
            logger=False,
        )
        # In a dictionary, not as submodules: a precision that casts the model would cast the sums in the metrics.
        self._metrics: dict[str, Any] = {}
        self._denominator: Tensor | None = None

    def blank_batch(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        """A batch as `training_step` takes it, shapes and dtypes alone: its numbers are whatever was in memory."""
        raise NotImplementedError(f"{type(self).__name__} must write blank_batch(batch_size, seq_len)")

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
        """The loss whose gradient, averaged over ranks and accumulated batches, is that of the mean over all of them.

        The sum over what this rank has is divided by the count over all ranks in the first batch of the optimizer step;
        once the later batches' counts are known, `_weigh_by_count` corrects for them.
        """
        losses, counted = self._batch_losses(batch)
        total, count = losses.sum(), counted.sum()
        if self._denominator is None:
            self._denominator = self._over_ranks(count).clamp(min=1)
            self._count = torch.zeros_like(count)
        self._count += count
        self._metrics["train"].update(losses.detach(), counted)
        return total * self.trainer.world_size / self._denominator

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.trainer.accumulate_grad_batches > 1:
            self._weigh_by_count()
        step = self.trainer.global_step + 1
        if due(self.trainer, step):
            scalars = {
                "train/loss": self._metrics["train"].compute(),
                "train/grad_norm": optimization.gradient_norm(self),
                "train/lr": optimizer.param_groups[0]["lr"],
            }
            record(self, scalars | self._more_train_scalars(), step)
        self._start_step()

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

    def _batch_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The losses of a training batch in nats, 0 where one does not count, and whether each counts; of one shape."""
        raise NotImplementedError(f"{type(self).__name__} must write _batch_losses(batch)")

    def _more_train_scalars(self) -> dict[str, Tensor | float]:
        """What is logged of the optimizer step beside the loss; asked on all ranks, just before `_start_step`."""
        return {}

    def _start_step(self) -> None:
        """Forget what was summed up over an optimizer step."""
        self._metrics["train"].reset()
        self._denominator = None

    def _start_evaluation(self) -> None:
        """Make the metrics of a validation or test anew."""
        raise NotImplementedError(f"{type(self).__name__} must write _start_evaluation()")

    def _evaluate(self, batch: Batch) -> None:
        """Measure a batch of a validation or test."""
        raise NotImplementedError(f"{type(self).__name__} must write _evaluate(batch)")

    def _finish_evaluation(self, stage: str) -> None:
        """Record everything measured under `stage`, `val` or `test`."""
        raise NotImplementedError(f"{type(self).__name__} must write _finish_evaluation(stage)")

    def _over_ranks(self, count: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(count.clone(), reduce_op="sum")

    def _weigh_by_count(self) -> None:
        """Scale the accumulated gradients from the first batch's count to that of the whole optimizer step."""
        assert self._denominator is not None
        given = self.trainer.accumulate_grad_batches * int(self._denominator)
        factor = given / max(1, int(self._over_ranks(self._count)))
        if factor != 1:
            for parameter in self.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(factor)
