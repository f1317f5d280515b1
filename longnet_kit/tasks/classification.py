"""Classification of whole sequences: the class's loss over the global batch, and how often it is the right one.

Scalars: train/loss, train/grad_norm, train/lr, train/accuracy; val/ and test/: loss, accuracy, macro_accuracy,
majority.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy, MulticlassConfusionMatrix

from longnet_kit import data
from longnet_kit.data import tokenizers
from longnet_kit.errors import UserError
from longnet_kit.model.classifier import Classifier
from longnet_kit.model.loss import IGNORED
from longnet_kit.tasks import register
from longnet_kit.tasks.metrics import MeanLoss
from longnet_kit.tasks.scalars import record
from longnet_kit.tasks.training import Batch, Training

if TYPE_CHECKING:
    from longnet_kit import recipe


@register("classification")
class Classification(Training):
    """Train a network to name the class of each sequence.

    A batch holds `tokens` (B, N) int64, `key_padding_mask` (B, N) bool, True where the token is real, and `labels` (B,)
    int64; in validation and test a label of -100 does not count. The loss of an optimizer step is the mean over all its
    sequences, however long each is.

    `accuracy` is the share of sequences whose class is right, `macro_accuracy` the mean over classes of their own
    shares (classes that have no sequence left out), `majority` what the most frequent class would get if it were always
    the answer.

    Args:
        model: the bare network.
        optimizer: a recipe's `optimizer` section.
        max_steps: optimizer steps that the learning-rate schedule spans.
        eval_contexts: none; they are language modelling's.

    Raises:
        UserError: there are evaluation contexts.
    """

    model: Classifier
    takes: tuple[str, ...] = ("labels",)
    """The kinds of data that it can be trained on, see `data.Source.supplies`."""
    predicts_tokens = False

    @classmethod
    def build_network(cls, r: recipe.Recipe, dtype: torch.dtype) -> Classifier:
        """The bare network of a recipe, with a class for each of its source's; `dtype` is that of matrix products.

        Raises:
            UserError: settings that do not go together, or a source that cannot be used.
        """
        source = data.build_source(r.data)
        if not isinstance(source, data.LabelledSource):
            raise UserError(
                f"data.source {r.data.source}: {type(source).__name__} says that it supplies labels, but is no "
                "longnet_kit.data.LabelledSource; derive it from that"
            )
        options = {key: value for key, value in vars(r.model).items() if key != "attention"}
        return Classifier(
            tokenizers.build(r.data.tokenizer).vocab_size,
            classes=len(source.classes),
            seq_len=r.data.seq_len,
            attention=r.model.attention,
            compute_dtype=dtype,
            **options,
        )

    def __init__(
        self, model: Classifier, optimizer: recipe.Optimizer, *, max_steps: int, eval_contexts: Sequence[int] = ()
    ) -> None:
        if eval_contexts:
            raise UserError(
                f"data.eval_contexts is {list(eval_contexts)}, but the task classification reads whole sequences and "
                "has no perplexity; leave it out"
            )
        super().__init__(model, optimizer, max_steps=max_steps)
        self.confusion: Tensor | None = None
        """How often sequences of class i (row) were given class j, (C, C) int64, in the latest validation or test."""

    def forward(self, tokens: Tensor, **options: Tensor | None) -> Tensor:
        """Logits, (B, C); see `Classifier.forward`."""
        return self.model(tokens, **options)

    def blank_batch(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        """See `Training.blank_batch`."""
        return {
            "tokens": torch.empty(batch_size, seq_len, dtype=torch.int64),
            "key_padding_mask": torch.empty(batch_size, seq_len, dtype=torch.bool),
            "labels": torch.empty(batch_size, dtype=torch.int64),
            "index": torch.empty(batch_size, dtype=torch.int64),
        }

    def on_train_start(self) -> None:
        super().on_train_start()
        right = MulticlassAccuracy(self._classes, average="micro", validate_args=False)
        self._metrics["right"] = right.to(self.device)

    def _batch_losses(self, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, losses, counted = self._measured(batch)
        self._metrics["right"].update(logits.detach(), batch["labels"])
        return losses, counted

    def _more_train_scalars(self) -> dict[str, Tensor | float]:
        return {"train/accuracy": self._metrics["right"].compute()}

    def _start_step(self) -> None:
        super()._start_step()
        self._metrics["right"].reset()

    def _start_evaluation(self) -> None:
        self._metrics["whole"] = MeanLoss().to(self.device)
        confusion = MulticlassConfusionMatrix(self._classes, ignore_index=IGNORED)
        self._metrics["confusion"] = confusion.to(self.device)

    def _evaluate(self, batch: Batch) -> None:
        logits, losses, counted = self._measured(batch)
        self._metrics["whole"].update(losses, counted)
        self._metrics["confusion"].update(logits, batch["labels"])

    def _finish_evaluation(self, stage: str) -> None:
        if self.trainer.sanity_checking:
            return
        self.confusion = confusion = self._metrics["confusion"].compute().cpu()
        of_class, right = confusion.sum(1).double(), confusion.diag()
        scalars = {
            f"{stage}/loss": self._metrics["whole"].compute(),
            f"{stage}/accuracy": right.sum() / of_class.sum(),
            f"{stage}/macro_accuracy": (right / of_class).nanmean(),
            f"{stage}/majority": of_class.max() / of_class.sum(),
        }
        record(self, scalars, self.trainer.global_step)

    def _measured(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (B, C), the loss of each sequence, and whether it counts; (B,) each."""
        labels = batch["labels"]
        logits = self.model(batch["tokens"], key_padding_mask=batch["key_padding_mask"])
        exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
        losses = F.cross_entropy(exact, labels, ignore_index=IGNORED, reduction="none")
        return logits, losses, labels != IGNORED

    @property
    def _classes(self) -> int:
        return self.model.head.out_features
