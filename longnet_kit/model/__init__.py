"""The network: transformer blocks around an attention backend, position embeddings, the chunked loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from longnet_kit.model.image_encoder import ImageClassifier, ImageEncoder, LongViT
from longnet_kit.model.precision import compute_dtype, weight_dtype
from longnet_kit.model.slide_encoder import SlideEncoder
from longnet_kit.model.transformer import Transformer

if TYPE_CHECKING:
    from longnet_kit import recipe

__all__ = [
    "ImageClassifier",
    "ImageEncoder",
    "LongViT",
    "SlideEncoder",
    "Transformer",
    "build",
    "compute_dtype",
    "weight_dtype",
]


def build(model: recipe.Model, vocab_size: int, seq_len: int, dtype: torch.dtype = torch.float32) -> Transformer:
    """Make the network of a recipe.

    Args:
        model: the recipe's `model` section.
        vocab_size: the tokenizer's.
        seq_len: the recipe's `data.seq_len`.
        dtype: the dtype in which matrix products will run, for xPos's range check.

    Raises:
        UserError: settings that do not go together.
    """
    return Transformer(
        vocab_size,
        dim=model.dim,
        layers=model.layers,
        heads=model.heads,
        ffn_dim=model.ffn_dim,
        dropout=model.dropout,
        positions=model.positions,
        causal=model.causal,
        seq_len=seq_len,
        attention=model.attention,
        activation_checkpointing=model.activation_checkpointing,
        ffn_chunk=model.ffn_chunk,
        loss_chunk=model.loss_chunk,
        compute_dtype=dtype,
    )
