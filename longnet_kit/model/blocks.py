"""MAGNETO blocks (arXiv 2210.06423) around any attention backend.

A block is x + W_o LN(attention(LN x)), then x + W_2 LN(GELU(W_1 LN x)): a layer norm before each sublayer and another
before its last projection (sub-LN).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from longnet_kit import attention as backends
from longnet_kit.attention import AttentionBackend, Cache
from longnet_kit.model.dropout import Dropout
from longnet_kit.model.positions import rotate

Tables = tuple[Tensor, Tensor]


class Block(nn.Module):
    """Attention, then the feed-forward network, each added to the residual stream."""

    def __init__(
        self,
        dim: int,
        heads: int,
        ffn_dim: int,
        dropout: float,
        causal: bool,
        attention: Mapping[str, Any],
        ffn_chunk: int | None,
    ) -> None:
        super().__init__()
        self.attention = SelfAttention(dim, heads, causal, backends.build(attention))
        self.feed_forward = FeedForward(dim, ffn_dim, ffn_chunk)
        self.dropout = Dropout(dropout)

    def forward(
        self, x: Tensor, tables: Tables | None, key_padding_mask: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        x = x + self.dropout(self.attention(x, tables, key_padding_mask, cache))
        return x + self.dropout(self.feed_forward(x))

    def reset_parameters(self, gain: float) -> None:
        self.attention.reset_parameters(gain)
        self.feed_forward.reset_parameters(gain)

    def flops(self, seq_len: int) -> int | None:
        """Of one forward over one sequence: two per weight of a matrix and token, and the backend's."""
        attention = self.attention
        head_dim = attention.out.in_features // attention.heads
        pairs = attention.backend.flops(seq_len, attention.heads, head_dim, attention.causal)
        if pairs is None:
            return None
        linear = (m for m in self.modules() if isinstance(m, nn.Linear))
        return pairs + sum(2 * seq_len * m.weight.numel() for m in linear)


class SelfAttention(nn.Module):
    """W_o LN(attention(LN x)); (B, N, dim) in and out."""

    def __init__(self, dim: int, heads: int, causal: bool, backend: AttentionBackend) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
        self.norm = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.backend = backend
        self.inner_norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, dim)

    def forward(
        self, x: Tensor, tables: Tables | None, key_padding_mask: Tensor | None, cache: Cache | None = None
    ) -> Tensor:
        qkv = self.qkv(self.norm(x)).unflatten(-1, (3, self.heads, -1))  # (B, N, 3, H, D)
        qk, v = qkv.split((2, 1), dim=2)
        if tables is not None:
            qk = rotate(qk, tables)
        (q, k), v = qk.unbind(2), v.squeeze(2)
        out = self.backend(q, k, v, causal=self.causal, key_padding_mask=key_padding_mask, cache=cache)
        return self.out(self.inner_norm(out.flatten(2)))

    def new_cache(self, batch_size: int, **factory: Any) -> Cache:
        """The backend's, see `Transformer.new_cache`."""
        return self.backend.new_cache(batch_size, self.heads, self.out.in_features // self.heads, **factory)

    def reset_parameters(self, gain: float) -> None:
        """Xavier normal, q, k and v as matrices of their own; q and k keep gain 1. Learned branches weigh the same."""
        for part, part_gain in zip(self.qkv.weight.chunk(3), (1.0, 1.0, gain), strict=True):
            nn.init.xavier_normal_(part, part_gain)
        nn.init.zeros_(self.qkv.bias)
        if isinstance(logits := self.backend.branch_logits, nn.Parameter):
            nn.init.zeros_(logits)
        _reset_linear(self.out, gain)
        self.norm.reset_parameters()
        self.inner_norm.reset_parameters()


class FeedForward(nn.Module):
    """W_2 LN(GELU(W_1 LN x)); (B, N, dim) in and out.

    Args:
        chunk: tokens that are taken at a time, so that of the wide states between the layers no more are ever in
            memory: the backward pass computes them again. None: all, and nothing twice.
    """

    def __init__(self, dim: int, ffn_dim: int, chunk: int | None = None) -> None:
        super().__init__()
        self.chunk = chunk
        self.norm = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, ffn_dim)
        self.inner_norm = nn.LayerNorm(ffn_dim)
        self.fc2 = nn.Linear(ffn_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        if self.chunk is None or len(tokens) <= self.chunk:
            return self._layers(x)
        parts = tokens.split(self.chunk)
        if torch.is_grad_enabled():
            parts = [checkpoint(self._layers, part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        else:
            parts = [self._layers(part) for part in parts]
        return torch.cat(parts).view(x.shape)

    def _layers(self, x: Tensor) -> Tensor:
        return self.fc2(self.inner_norm(F.gelu(self.fc1(self.norm(x)))))

    def reset_parameters(self, gain: float) -> None:
        _reset_linear(self.fc1, gain)
        _reset_linear(self.fc2, gain)
        self.norm.reset_parameters()
        self.inner_norm.reset_parameters()


def _reset_linear(linear: nn.Linear, gain: float) -> None:
    nn.init.xavier_normal_(linear.weight, gain)
    nn.init.zeros_(linear.bias)
