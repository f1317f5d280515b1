"""Weights of torchscale's LongNet decoder (github.com/microsoft/torchscale, MIT) as those of this kit's Transformer.

The networks are the same function of other parameters: torchscale keeps q, k and v apart, rotates neighbouring
dimensions where this kit rotates the two halves, and multiplies embeddings by sqrt(dim), which this kit undoes after
the last layer norm. Build the network with `head_offsets: grouped` and, for weights that were trained with it,
`positions: xpos`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longnet_kit.errors import UserError
from longnet_kit.model import torchscale_layers as layers
from longnet_kit.model.positions import XPos
from longnet_kit.model.transformer import Transformer


def is_decoder(state: Mapping[Any, Any]) -> bool:
    """Whether a state dictionary is laid out as torchscale's decoder."""
    names = [key for key in state if isinstance(key, str)]
    return any(key.endswith(layers.FIRST) for key in names) and any(
        key.endswith("embed_tokens.weight") for key in names
    )


def convert(state: Mapping[str, Tensor], network: nn.Module, *, scale_embedding: bool = True) -> dict[str, Tensor]:
    """The state dictionary for `network` of the same function.

    Args:
        state: torchscale's, its keys with any prefix (`decoder.`, `model.decoder.`, ...).
        network: the Transformer that the result is to be loaded into: its sizes decide.
        scale_embedding: whether embeddings are multiplied by sqrt(dim) there (`no_scale_embedding` not given).

    Raises:
        UserError: keys are missing, left over, or of another shape (the first of each are named), the output
            projection is not the embedding, the position embeddings differ, or the network is no Transformer.
    """
    if not isinstance(network, Transformer):
        raise UserError(
            f"these are weights of torchscale's decoder, and this network is a {type(network).__name__}; load them "
            "into a Transformer"
        )
    prefix = layers.prefix(state)
    given = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    _check(given, network)
    converted = {"embedding.weight": given["embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        converted[f"norm.{kind}"] = given[f"layer_norm.{kind}"]
    converted |= layers.convert(given, network.blocks, arrange=None if network.positions is None else _halves)
    if scale_embedding:
        scale = math.sqrt(network.embedding.embedding_dim)
        converted["embedding.weight"] = converted["embedding.weight"] * scale
        for kind in ("weight", "bias"):
            converted[f"norm.{kind}"] = converted[f"norm.{kind}"] / scale
    return converted


def _halves(x: Tensor, heads: int) -> Tensor:
    """Rows of q or k so that the members of each rotated pair stand half a head apart, not side by side."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _check(given: Mapping[str, Tensor], network: Transformer) -> None:
    """Raise a UserError unless these are the weights of such a network."""
    has_xpos = "layers.0.self_attn.xpos.scale" in given
    if has_xpos != isinstance(network.positions, XPos):
        there, here = ("with", "without") if has_xpos else ("without", "with")
        raise UserError(
            f"torchscale's weights were trained {there} xPos and this model is {here} it; set model.positions to "
            f"{'xpos' if has_xpos else 'none'}"
        )
    dim, vocab = network.embedding.embedding_dim, network.embedding.num_embeddings
    wanted: layers.Shapes = {
        "embed_tokens.weight": (vocab, dim),
        "layer_norm.weight": (dim,),
        "layer_norm.bias": (dim,),
    }
    others = {f"layers.{i}.self_attn.xpos.scale" for i in range(len(network.blocks))}
    others |= {"output_projection.weight", "version"}
    layers.check("torchscale's weights", given, wanted | layers.shapes(network.blocks), others)
    projection = given.get("output_projection.weight")
    if projection is not None and not torch.equal(projection, given["embed_tokens.weight"]):
        raise UserError("torchscale's output projection is not its embedding, and this model's head is its embedding")
