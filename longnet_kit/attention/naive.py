"""Attention with the score matrix in memory, for any pattern: the reference that every other backend answers to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longnet_kit.attention import patterns, register
from longnet_kit.attention.backend import AttentionBackend
from longnet_kit.attention.maps import weigh


@register("naive")
class Naive(AttentionBackend):
    """softmax(q k^T / sqrt(D) + log m) v, with m the pattern's multiplicity. Memory grows with N squared.

    Args:
        pattern: `{kind: dense}` (the default), `{kind: dilated, ...}` or `{kind: block_sparse, ...}`.

    Raises:
        ValueError: the pattern is unknown or its arguments do not fit.
    """

    head_dependent = True

    def __init__(self, pattern: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._pattern = patterns.build(pattern or {"kind": "dense"})

    @property
    def pattern(self) -> patterns.Pattern:
        return self._pattern

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        first_head: int = 0,
        total_heads: int | None = None,
    ) -> Tensor:
        _, seq_len, heads, _ = q.shape
        total_heads = heads if total_heads is None else total_heads
        m = self._pattern.multiplicity(seq_len, total_heads, causal)[first_head : first_head + heads].to(q.device)
        real = None
        if key_padding_mask is not None:
            # NaN times zero is NaN, so padding must be gone from the products, not only from the weights.
            q, k, v = (x.masked_fill(~key_padding_mask[:, :, None, None], 0) for x in (q, k, v))
            real = key_padding_mask[:, :, None] & key_padding_mask[:, None, :]
        return torch.einsum("bhpk,bkhd->bphd", weigh(q, k, m, real).to(v.dtype), v)
