"""Weights of torchscale's LongNet decoder (github.com/microsoft/torchscale, MIT) as those of this kit's Transformer.

The networks are the same function of other parameters: torchscale keeps q, k and v apart, rotates neighbouring
dimensions where this kit rotates the two halves, and multiplies embeddings by sqrt(dim), which this kit undoes after
the last layer norm. Build the network with `head_offsets: grouped` and, for weights that were trained with it,
`positions: xpos`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longnet_kit.model.positions import XPos
from longnet_kit.model.transformer import Transformer

_LAYER = {
    "self_attn_layer_norm": "attention.norm",
    "self_attn.inner_attn_ln": "attention.inner_norm",
    "self_attn.out_proj": "attention.out",
    "final_layer_norm": "feed_forward.norm",
    "ffn.fc1": "feed_forward.fc1",
    "ffn.ffn_layernorm": "feed_forward.inner_norm",
    "ffn.fc2": "feed_forward.fc2",
}
"""Modules of a layer there and here; q, k and v are joined apart from them."""
_MARK = "layers.0.self_attn.q_proj.weight"


def is_decoder(state: Mapping[Any, Any]) -> bool:
    """Whether a state dictionary is laid out as torchscale's decoder."""
    names = [key for key in state if isinstance(key, str)]
    return any(key.endswith(_MARK) for key in names) and any(key.endswith("embed_tokens.weight") for key in names)


def convert(state: Mapping[str, Tensor], network: Transformer, *, scale_embedding: bool = True) -> dict[str, Tensor]:
    """The state dictionary for `network` of the same function.

    Args:
        state: torchscale's, its keys with any prefix (`decoder.`, `model.decoder.`, ...).
        network: what the result is to be loaded into: its sizes decide.
        scale_embedding: whether embeddings are multiplied by sqrt(dim) there (`no_scale_embedding` not given).

    Raises:
        ValueError: keys are missing, left over, or of another shape (the first of each are named), the output
            projection is not the embedding, or the position embeddings differ.
    """
    prefix = next(key for key in state if key.endswith(_MARK)).removesuffix(_MARK)
    given = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    _check_positions(given, network)
    _check_keys(given, network)
    converted = {"embedding.weight": given["embed_tokens.weight"]}
    for kind in ("weight", "bias"):
        converted[f"norm.{kind}"] = given[f"layer_norm.{kind}"]
    for i, block in enumerate(network.blocks):
        there, here = f"layers.{i}", f"blocks.{i}"
        for kind in ("weight", "bias"):
            q, k, v = (given[f"{there}.self_attn.{name}_proj.{kind}"] for name in "qkv")
            if network.positions is not None:
                q, k = (_halves(x, block.attention.heads) for x in (q, k))
            converted[f"{here}.attention.qkv.{kind}"] = torch.cat((q, k, v))
            for name, own in _LAYER.items():
                converted[f"{here}.{own}.{kind}"] = given[f"{there}.{name}.{kind}"]
    if scale_embedding:
        scale = math.sqrt(network.embedding.embedding_dim)
        converted["embedding.weight"] = converted["embedding.weight"] * scale
        for kind in ("weight", "bias"):
            converted[f"norm.{kind}"] = converted[f"norm.{kind}"] / scale
    return converted


def _halves(x: Tensor, heads: int) -> Tensor:
    """Rows of q or k so that the members of each rotated pair stand half a head apart, not side by side."""
    return x.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def _check_positions(given: Mapping[str, Tensor], network: Transformer) -> None:
    has_xpos = "layers.0.self_attn.xpos.scale" in given
    if has_xpos != isinstance(network.positions, XPos):
        there, here = ("with", "without") if has_xpos else ("without", "with")
        raise ValueError(
            f"torchscale's weights were trained {there} xPos and this model is {here} it; set model.positions to "
            f"{'xpos' if has_xpos else 'none'}"
        )


def _check_keys(given: Mapping[str, Tensor], network: Transformer) -> None:
    """Raise a ValueError unless there is exactly what the network takes, in the right shapes."""
    dim, vocab = network.embedding.embedding_dim, network.embedding.num_embeddings
    wanted = {"embed_tokens.weight": (vocab, dim), "layer_norm.weight": (dim,), "layer_norm.bias": (dim,)}
    own = network.state_dict()
    for i in range(len(network.blocks)):
        for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
            wanted |= {f"layers.{i}.self_attn.{name}_proj.{kind}": shape for name in "qkv"}
            wanted |= {
                f"layers.{i}.{name}.{kind}": tuple(own[f"blocks.{i}.{here}.{kind}"].shape)
                for name, here in _LAYER.items()
            }
    known = re.compile(r"layers\.\d+\.self_attn\.xpos\.scale|output_projection\.weight|version")
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted and not (known.fullmatch(key) and _exists(key, network))]
    other = [
        f"{key} is {tuple(given[key].shape)} there and {shape} here"
        for key, shape in wanted.items()
        if key in given and tuple(given[key].shape) != shape
    ]
    for words, found in (("are missing", missing), ("are left over", unexpected), ("do not fit", other)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(f"torchscale's weights {words}: {', '.join(found[:3])}{more}")
    projection = given.get("output_projection.weight")
    if projection is not None and not torch.equal(projection, given["embed_tokens.weight"]):
        raise ValueError("torchscale's output projection is not its embedding, and this model's head is its embedding")


def _exists(key: str, network: Transformer) -> bool:
    """Whether a key that is not needed is at least of a layer that the network has."""
    layer = re.match(r"layers\.(\d+)\.", key)
    return layer is None or int(layer[1]) < len(network.blocks)
