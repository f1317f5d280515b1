"""Dilated attention under the calling convention of `torch.nn.MultiheadAttention`, whose weights it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_kit.attention import derivatives
from longnet_kit.attention.dilated import DilatedAttention
from longnet_kit.attention.patterns import HeadOffsets
from longnet_kit.errors import UserError


class MultiheadDilatedAttention(nn.Module):
    """Self-attention of LongNet in the place of a `torch.nn.MultiheadAttention`.

    Parameters are named and shaped as there (`in_proj_weight`, `in_proj_bias`, `out_proj`), so state dictionaries go
    both ways. With one branch (w, 1), w at least the length, it computes the same.

    Args:
        embed_dim, num_heads, bias, batch_first, device, dtype: as of torch's.
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        head_offsets: see `DilatedAttention`.

    Raises:
        UserError: sizes or branches that do not go together.
    """

    _qkv_same_embed_dim = False
    """For torch's encoder layers, which ask: if True they would run dense attention on these weights in evaluation."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        segment_lengths: Sequence[int] = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[int] = (1, 2, 4, 6, 12),
        *,
        head_offsets: HeadOffsets = "interleaved",
        bias: bool = True,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
            raise UserError(f"embed_dim is {embed_dim} and num_heads is {num_heads}; the first must be a multiple")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.batch_first = batch_first
        self.attention = DilatedAttention(segment_lengths, dilation_rates, head_offsets)
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim, device=device, dtype=dtype))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * embed_dim, device=device, dtype=dtype)) if bias else None
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew, as torch does."""
        nn.init.xavier_uniform_(self.in_proj_weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query, key, value: (N, B, E), (B, N, E) with `batch_first`, or (N, E); of one length.
            key_padding_mask: (B, N), or (N,): bool, True where a key is not to be seen, or float, -inf there and 0
                elsewhere. What padded queries output means nothing.
            need_weights: return the weights too, exact; a gradient through them raises. Memory grows with N squared;
                pass False for long sequences.
            attn_mask: None, or the causal mask of `torch.nn.Transformer.generate_square_subsequent_mask`, bool or
                float: what a token sees is the branches' business.
            average_attn_weights: the weights' mean over the heads, not each head's.
            is_causal: a token sees none after it. It needs no `attn_mask`, and allows the causal one alone.

        Returns:
            The output, shaped as query, and (B, N, N) or (B, H, N, N) weights, without B where query has none; None
            where they are not needed.

        Raises:
            UserError: lengths that differ, or a mask that the branches cannot honour.
        """
        if not query.shape == key.shape == value.shape or query.dim() not in (2, 3):
            shapes = ", ".join(str(tuple(x.shape)) for x in (query, key, value))
            raise UserError(f"query, key and value have shapes {shapes}; expected one of two or three dimensions")
        is_batched = query.dim() == 3
        q, k, v = (self._batch_first(x) for x in (query, key, value))  # (B, N, E)
        real = _real(key_padding_mask, q)
        causal = _is_causal(attn_mask, q.shape[1]) or is_causal  # the mask is checked in any case
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        parts = zip((q, k, v), self.in_proj_weight.chunk(3), biases, strict=True)
        q, k, v = (F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)) for x, weight, bias in parts)
        out = self.out_proj(self.attention(q, k, v, causal, real).flatten(2))
        weights = None
        if need_weights:
            weights = self.attention.attention_map(q, k, causal=causal, key_padding_mask=real).to(q.dtype)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = derivatives.without_gradient("the weights of MultiheadDilatedAttention", weights, q, k)
        if not is_batched:
            return out[0], None if weights is None else weights[0]
        return out if self.batch_first else out.transpose(0, 1), weights

    def _batch_first(self, x: Tensor) -> Tensor:
        if x.dim() == 2:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)


def _real(key_padding_mask: Tensor | None, x: Tensor) -> Tensor | None:
    """torch's padding mask as the kit has it: (B, N) bool, True where the token is real."""
    if key_padding_mask is None:
        return None
    mask = key_padding_mask if key_padding_mask.dim() == 2 else key_padding_mask[None]
    if mask.is_floating_point():
        if not ((mask == 0) | (mask == -torch.inf)).all():
            raise UserError("key_padding_mask holds values other than 0 and -inf; keys can be hidden, not weighed")
        mask = mask == -torch.inf
    if mask.dtype != torch.bool or mask.shape != x.shape[:2]:
        raise UserError(
            f"key_padding_mask is {mask.dtype} of shape {tuple(mask.shape)}, expected bool or float of "
            f"{tuple(x.shape[:2])}"
        )
    return ~mask


def _is_causal(attn_mask: Tensor | None, length: int) -> bool:
    """Whether there is a mask; UserError unless it is the causal one."""
    if attn_mask is None:
        return False
    hidden = attn_mask if attn_mask.dtype == torch.bool else attn_mask == -torch.inf
    causal = torch.ones(length, length, dtype=torch.bool, device=attn_mask.device).triu(1)
    is_plain = attn_mask.dtype == torch.bool or bool(((attn_mask == 0) | hidden).all())
    if not is_plain or hidden.shape != causal.shape or not torch.equal(hidden, causal):
        raise UserError(
            f"attn_mask, {tuple(attn_mask.shape)}, is not the causal mask of {length} tokens; which keys a token sees "
            "is what segment_lengths and dilation_rates say: leave it out, or pass is_causal=True"
        )
    return True
