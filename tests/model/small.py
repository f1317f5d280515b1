"""Small networks for the tests."""

from __future__ import annotations

from typing import Any

import torch

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
