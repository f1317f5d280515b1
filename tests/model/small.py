"""Small networks for the tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longnet_kit.model import Transformer

VOCAB, SEQ_LEN = 41, 32
BRANCHES = {"segment_lengths": [8, 12, 32], "dilation_rates": [1, 2, 4]}
DILATED = {"backend": "dilated", **BRANCHES}
NAIVE_DILATED = {"backend": "naive", "pattern": {"kind": "dilated", **BRANCHES}}


def network(seed: int = 0, **options: Any) -> Transformer:
    """A Transformer of two layers, 4 heads of 8, sequences of 32."""
    settings: dict[str, Any] = {"dim": 32, "layers": 2, "heads": 4, "ffn_dim": 48, "seq_len": SEQ_LEN}
    settings |= {"attention": DILATED} | options
    torch.manual_seed(seed)
    return Transformer(VOCAB, **settings)


def some_tokens(batch: int = 2, seq_len: int = SEQ_LEN, seed: int = 1) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, seq_len), generator=torch.Generator().manual_seed(seed))


class LoraEmbedding(nn.Module):
    """An embedding with a low-rank addition, which replaces the module as peft's does: `.weight` lacks the addition."""

    def __init__(self, base: nn.Embedding, rank: int = 2) -> None:
        super().__init__()
        self.base_layer = base
        self.first = nn.Parameter(torch.randn(rank, base.num_embeddings))
        self.second = nn.Parameter(torch.randn(base.embedding_dim, rank))

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.base_layer(tokens) + self.first.T[tokens] @ self.second.T

    def merged(self) -> nn.Embedding:
        """The base with the addition in its weight."""
        with torch.no_grad():
            self.base_layer.weight += (self.second @ self.first).T
        return self.base_layer
