"""Attention over a multiset of keys, written out: what every backend with a pattern is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_kit.attention.patterns import Pattern


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
