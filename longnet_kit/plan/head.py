"""The loss of many tokens without a loop over all of its chunks: a billion tokens make a hundred thousand of them.

A few chunks are computed as they are. All others would only repeat them: what they leave behind is made at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet_kit.model import Transformer
from longnet_kit.model.loss import IGNORED, default_chunk, token_losses
from longnet_kit.plan.ledger import Ledger

CHUNKS = 3
"""Computed as they are."""


def in_few_chunks(model: Transformer, ledger: Ledger, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `LanguageModeling` computes of a batch: the loss of each token, and whether it counts; (B, n) each."""
    hidden, weight = model.hidden(tokens), model.embedding.weight
    counted = targets != IGNORED
    chunk = model.loss_chunk or default_chunk(weight)
    few = CHUNKS * chunk
    if targets.numel() <= 2 * few:
        return token_losses(hidden, weight, targets, chunk), counted
    first, others = hidden.flatten(0, 1).tensor_split((few,))
    losses = token_losses(first[None], weight, targets.flatten()[None, :few], chunk).flatten()
    return torch.cat((losses, _Others.apply(others, weight.shape[0], ledger))).view(targets.shape), counted


class _Others(torch.autograd.Function):
    """The losses of tokens and the gradients of their states; the weight's gradient exists for the first chunks."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, vocab_size: int, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(hidden)
        ctx.ledger, ctx.flops = ledger, 2 * hidden.numel() * vocab_size
        ledger.flops["forward"] += ctx.flops
        return hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (hidden,) = ctx.saved_tensors
        ctx.ledger.flops["recomputed"] += ctx.flops
        ctx.ledger.flops["backward"] += 2 * ctx.flops
        return torch.empty_like(hidden), None, None
