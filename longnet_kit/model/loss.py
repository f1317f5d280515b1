"""Cross entropy per token without the logits of the whole sequence in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longnet_kit.errors import UserError

IGNORED = -100
"""A target that has no loss."""

MAX_LOGITS = 2**26
"""Logits in memory at once by default: 256 MiB in float32."""


def token_losses(hidden: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int | None = None) -> Tensor:
    """-log p of each target, in nats; 0 where it is ignored.

    Tokens are taken in chunks, and the backward pass computes a chunk's logits again, so that no more than one chunk of
    logits is ever held. What fits in one chunk is not computed twice.

    Args:
        hidden: (B, N, dim), the states before the head.
        weight: (V, dim), the head.
        targets: (B, N) int64; -100 is ignored.
        chunk_tokens: tokens per chunk; by default as many as make 2^26 logits.

    Returns:
        (B, N), float32 (float64 where hidden is).

    Raises:
        UserError: chunk_tokens is below 1.
    """
    if chunk_tokens is None:
        chunk_tokens = default_chunk(weight)
    if chunk_tokens < 1:
        raise UserError(f"chunk_tokens is {chunk_tokens}, expected at least 1")
    if targets.numel() <= chunk_tokens:
        return _losses(hidden.flatten(0, 1), weight, targets.flatten()).view(targets.shape)
    chunks = zip(hidden.flatten(0, 1).split(chunk_tokens), targets.flatten().split(chunk_tokens), strict=True)
    losses = [checkpoint(_losses, h, weight, t, use_reentrant=False, preserve_rng_state=False) for h, t in chunks]
    return torch.cat(losses).view(targets.shape)


def default_chunk(weight: Tensor) -> int:
    """As many tokens as make `MAX_LOGITS` logits, for a head (V, dim)."""
    return max(1, MAX_LOGITS // weight.shape[0])


def _losses(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logits = F.linear(hidden, weight)
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(exact, targets, ignore_index=IGNORED, reduction="none")
