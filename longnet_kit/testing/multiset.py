"""Attention over a pattern's keys, written out: what every backend with a pattern is compared with."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from longnet_kit.attention import patterns
from longnet_kit.attention.patterns import Dilated, Pattern


def reference(
    pattern: Pattern, q: Tensor, k: Tensor, v: Tensor, causal: bool, key_padding_mask: Tensor | None = None
) -> Tensor:
    """The softmax over the multiset of keys that `pattern` shows each query, written out.

    Args:
        q, k, v: (B, N, H, D).
        key_padding_mask: (B, N) bool, True where the token is real.

    Returns:
        (B, N, H, D); 0 for padded queries and for queries that see nothing.
    """
    batch, seq_len, heads, head_dim = q.shape
    real = torch.ones(batch, seq_len, dtype=torch.bool) if key_padding_mask is None else key_padding_mask.cpu()
    m = pattern.multiplicity(seq_len, heads, causal)
    m = m * real[:, None, None, :] * real[:, None, :, None]  # (B, H, N, N)
    m = m.to(q)
    q, k, v = (torch.where(real[:, :, None, None].to(x.device), x, 0) for x in (q, k, v))
    scores = (torch.einsum("bphd,bkhd->bhpk", q, k) / head_dim**0.5).masked_fill(m == 0, -torch.inf)
    largest = scores.amax(-1, keepdim=True).detach().clamp(min=torch.finfo(scores.dtype).min)
    weights = m * (scores - largest).exp()
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhpk,bkhd->bphd", weights / torch.where(total == 0, 1, total), v)


def mixed_reference(
    pattern: Dilated,
    logits: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """A softmax for each branch, mixed by a softmax of `logits`, (branches,), over those that keep the position.

    Args and result as of `reference`.
    """
    _, seq_len, heads, _ = q.shape
    mixed, total = torch.zeros_like(q), q.new_zeros(seq_len, heads)
    largest = logits.max().detach()
    for (w, r), logit in zip(pattern.branches, logits.to(q), strict=True):
        alone = _alone(pattern, w, r)
        weight = (logit - largest).exp() * alone.keeps((w, r), seq_len, heads).T.to(q)  # (N, H)
        mixed = mixed + weight[..., None] * reference(alone, q, k, v, causal, key_padding_mask)
        total = total + weight
    return mixed / torch.where(total == 0, 1, total)[..., None]


def _alone(pattern: Dilated, w: int, r: int) -> Dilated:
    """A pattern of one of its branches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it keeps some positions only
        return patterns.Dilated([w], [r], pattern.head_offsets)
