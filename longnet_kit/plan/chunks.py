"""Work that is done in chunks of tokens, without a loop over all of them: a billion tokens make a hundred thousand.

A few chunks are computed as they are. All others would only repeat them: what they leave behind is made at once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longnet_kit.model import Transformer
from longnet_kit.model.blocks import FeedForward
from longnet_kit.model.loss import IGNORED, default_chunk, token_losses
from longnet_kit.plan.ledger import Ledger

CHUNKS = 3
"""Computed as they are."""


def losses(model: Transformer, ledger: Ledger, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """What `LanguageModeling` computes of a batch: the loss of each token, and whether it counts; (B, n) each."""
    hidden, weight = model.hidden(tokens), model.head_weight
    counted = targets != IGNORED
    chunk = model.loss_chunk or default_chunk(weight)
    few = CHUNKS * chunk
    if targets.numel() <= 2 * few:
        return token_losses(hidden, weight, targets, chunk), counted
    first, others = hidden.flatten(0, 1).tensor_split((few,))
    computed = token_losses(first[None], weight, targets.flatten()[None, :few], chunk).flatten()
    like = computed.new_empty(len(others))
    flops = 2 * others.numel() * weight.shape[0]
    skipped = _Skipped.apply(others, like, flops, flops, ledger)
    return torch.cat((computed, skipped)).view(targets.shape), counted


def feed_forward(layers: FeedForward, ledger: Ledger, x: Tensor) -> Tensor:
    """What the feed-forward layers make of (B, n, dim) in chunks."""
    assert layers.chunk is not None
    few = CHUNKS * layers.chunk
    if x.shape[0] * x.shape[1] <= 2 * few:
        return FeedForward.forward(layers, x)
    first, others = x.flatten(0, 1).tensor_split((few,))
    computed = FeedForward.forward(layers, first[None])[0]
    like = torch.empty_like(others, dtype=computed.dtype)
    first_product, second_product = (2 * len(others) * fc.weight.numel() for fc in (layers.fc1, layers.fc2))
    skipped = _Skipped.apply(others, like, first_product + second_product, first_product, ledger)
    return torch.cat((computed, skipped)).view(x.shape)


class _Skipped(torch.autograd.Function):
    """The results of further tokens and the gradients of their states; the weights' exist for the first chunks.

    `again` are the FLOPs of what the backward pass computes again: what no gradient needs it leaves out.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, results: Tensor, flops: int, again: int, ledger: Ledger) -> Tensor:
        ctx.save_for_backward(states)
        ctx.ledger, ctx.flops, ctx.again = ledger, flops, again
        ledger.flops[ledger.work] += flops
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:  # type: ignore[override]
        (states,) = ctx.saved_tensors
        ctx.ledger.flops["recomputed"] += ctx.again
        ctx.ledger.flops["backward"] += 2 * ctx.flops
        return torch.empty_like(states), None, None, None, None
