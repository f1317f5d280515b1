"""Learning to answer from the context: of a text only the answers' tokens are learnt, and accuracy is by their group.

Scalars: those of language modelling, of the answers' tokens; val/ and test/: accuracy, accuracy@<group>.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from longnet_kit.attention.sharding import whole_sequence
from longnet_kit.errors import UserError
from longnet_kit.model import Transformer
from longnet_kit.model.loss import IGNORED, default_chunk, token_losses
from longnet_kit.tasks import register
from longnet_kit.tasks.answer_accuracy import AnswerAccuracy
from longnet_kit.tasks.language_modeling import LanguageModeling
from longnet_kit.tasks.scalars import record
from longnet_kit.tasks.training import Batch

if TYPE_CHECKING:
    from longnet_kit import recipe


@register("in_context")
class InContext(LanguageModeling):
    """Train a network to predict the answers in a text, and measure how many it gets right.

    A batch holds `tokens`, `targets` and `groups`, (B, N) int64 each, see `data.answers_data.AnswersData`. An answer is
    right if each of its tokens is the most probable one, given the right ones before it. Logits are made of answers'
    tokens only.

    Args:
        model: the bare network, a causal one.
        optimizer: a recipe's `optimizer` section.
        max_steps: optimizer steps that the learning-rate schedule spans.
        eval_contexts: none; a shorter window would part questions from what they ask for.

    Raises:
        UserError: the network is not causal, or there are evaluation contexts.
    """

    takes = ("answers",)

    def __init__(
        self, model: Transformer, optimizer: recipe.Optimizer, *, max_steps: int, eval_contexts: Sequence[int] = ()
    ) -> None:
        if not model.causal:
            raise UserError(
                "model.causal: got false, but in_context predicts the next token, which such a model sees; set it to "
                "true"
            )
        if eval_contexts:
            raise UserError(
                f"data.eval_contexts: got {list(eval_contexts)}, but in_context measures accuracy by the distances or "
                "numbers of examples of its data; leave it out"
            )
        super().__init__(model, optimizer, max_steps=max_steps)

    def blank_batch(self, batch_size: int, seq_len: int) -> dict[str, Tensor]:
        """See `Training.blank_batch`."""
        groups = torch.empty(batch_size, seq_len, dtype=torch.int64)
        return super().blank_batch(batch_size, seq_len) | {"groups": groups}

    def _losses(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        losses, counted, _ = self._answered(tokens, targets)
        return losses, counted

    def _answered(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The loss of each token and whether it counts, (B, N) each, and the (A, dim) states of the A that count."""
        counted = targets != IGNORED
        hidden = self.model.hidden(tokens)[counted]
        weight = self.model.head_weight
        of_answers = token_losses(hidden[None], weight, targets[counted][None], self.model.loss_chunk)[0]
        losses = of_answers.new_zeros(targets.shape).masked_scatter(counted, of_answers)
        return losses, counted, hidden

    def _start_evaluation(self) -> None:
        super()._start_evaluation()
        groups = getattr(getattr(self.trainer, "datamodule", None), "groups", None)
        if groups is None:
            raise UserError("in_context reports accuracy by the `groups` of its data module; give it an AnswersData")
        self._metrics["accuracy"] = AnswerAccuracy(groups).to(self.device)

    def _evaluate(self, batch: Batch) -> None:
        tokens, targets, groups = batch["tokens"], batch["targets"], batch["groups"]
        shard = self.model.shard
        losses, counted, hidden = self._answered(tokens, targets)
        first = 0 if shard is None else shard.first_position(tokens.shape[1])
        self._metrics["whole"].update(losses, counted, first)
        weight = self.model.head_weight
        logits = (F.linear(part, weight) for part in hidden.split(self.model.loss_chunk or default_chunk(weight)))
        predicted = torch.cat([part.argmax(-1) for part in logits])
        wrong = torch.zeros_like(counted).masked_scatter(counted, predicted != targets[counted])
        if shard is not None and shard.size > 1:  # an answer may lie on two ranks: one of them counts whole sequences
            both = whole_sequence(torch.stack((wrong.long(), groups), dim=-1), shard)
            wrong, groups = both[..., 0] > 0, both[..., 1]
            if shard.rank > 0:
                return
        self._metrics["accuracy"].update(wrong, groups)

    def _finish_evaluation(self, stage: str) -> None:
        super()._finish_evaluation(stage)
        if self.trainer.sanity_checking:
            return
        of_all, of_groups = self._metrics["accuracy"].compute()
        scalars = {f"{stage}/accuracy": of_all}
        for group, accuracy in zip(self._metrics["accuracy"].groups, of_groups, strict=True):
            scalars[f"{stage}/accuracy@{group}"] = accuracy
        record(self, scalars, self.trainer.global_step)
