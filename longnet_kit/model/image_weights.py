"""Weights of LongViT (github.com/microsoft/torchscale, MIT, examples/longvit) as those of the networks for images here.

A pre-trained file has the backbone, a norm, and the head of DINO's loss, which nothing here needs; a fine-tuned one has
the backbone, a norm of its own and a linear head. The networks are the same function, but for torchscale's deviations
that `longnet_kit.model.slide_weights` names: here, where the patches fill whole segments, both give the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from longnet_kit.errors import UserError
from longnet_kit.model import torchscale_layers as layers
from longnet_kit.model.image_encoder import ImageClassifier, ImageEncoder, LongViT

_PLACES = "pos_embed"
_LOSS = ("head.mlp.", "head.last_layer.")
"""What keys of DINO's head begin with."""
_TOPS = ("norm.", "fc_norm.", "head.")
"""What keys begin with that are not the backbone's."""


def is_longvit(state: Mapping[Any, Any]) -> bool:
    """Whether a state dictionary is laid out as LongViT, with or without what stands on it."""
    return layers.is_encoder(state, embed_dims=4)


def convert(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The state dictionary for `network` of the same function.

    A table of positions for images of another side is resized, bicubically, as LongViT does before it is fine-tuned.

    Args:
        state: torchscale's, its keys with any prefix.
        network: what the result is to be loaded into, its sizes decide: an ImageEncoder for a pre-trained file, an
            ImageClassifier for a fine-tuned one, or a LongViT for either, of which then the rest is left out.

    Raises:
        UserError: keys are missing, left over, or of another shape (the first of each are named), or the network is
            of another kind.
    """
    if not isinstance(network, LongViT | ImageEncoder | ImageClassifier):
        raise UserError(
            f"these are weights of LongViT, and this network is a {type(network).__name__}; load them into a "
            "longnet_kit.model.ImageEncoder, ImageClassifier or LongViT"
        )
    given = _plain(state)
    _check_kind(given, network)
    backbone = network if isinstance(network, LongViT) else network.backbone
    tops = _tops(network)
    wanted = _shapes(given, backbone) | {
        f"{there}.{kind}": tuple(network.get_parameter(f"{here}.{kind}").shape)
        for there, here in tops.items()
        for kind in ("weight", "bias")
    }
    left_out = _TOPS if isinstance(network, LongViT) else _LOSS
    layers.check("LongViT's weights", given, wanted, {key for key in given if key.startswith(left_out)})
    converted = layers.convert(given, backbone.blocks, "encoder.")
    converted["places"] = _resized(given[_PLACES], len(backbone.places))
    for kind in ("weight", "bias"):
        converted[f"embed.{kind}"] = given[f"patch_embed.proj.{kind}"]
    if isinstance(network, LongViT):
        return converted
    converted = {f"backbone.{name}": x for name, x in converted.items()}
    for kind in ("weight", "bias"):
        converted |= {f"{here}.{kind}": given[f"{there}.{kind}"] for there, here in tops.items()}
    return converted


def _plain(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The backbone's keys and those beside it, without what stands before them.

    The backbone is a module of its own, `backbone` or `model`, or is all there is.
    """
    prefix = layers.prefix(state, "encoder.")
    outer = prefix.removesuffix(prefix.removesuffix(".").rpartition(".")[2] + ".")
    return {
        key.removeprefix(prefix if key.startswith(prefix) else outer): x
        for key, x in state.items()
        if key.startswith(outer)
    }


def _tops(network: nn.Module) -> dict[str, str]:
    """The modules on the backbone, there and here."""
    if isinstance(network, ImageClassifier):
        return {"fc_norm": "norm", "head": "head"}
    return {"norm": "norm"} if isinstance(network, ImageEncoder) else {}


def _check_kind(given: Mapping[str, Tensor], network: nn.Module) -> None:
    """Raise a UserError for a classifier's weights in an encoder, and the other way round."""
    is_classifier = any(key.startswith("fc_norm.") for key in given)
    if isinstance(network, ImageEncoder) and is_classifier:
        raise UserError(
            "these are weights of a LongViT that was fine-tuned (fc_norm, head), and this network is an ImageEncoder; "
            "load them into an ImageClassifier, or into the encoder's backbone alone"
        )
    if isinstance(network, ImageClassifier) and not is_classifier:
        raise UserError(
            "these are weights of a LongViT without a classifier (fc_norm, head), and this network is an "
            "ImageClassifier; load them into its backbone, and train the rest"
        )


def _shapes(given: Mapping[str, Tensor], backbone: LongViT) -> layers.Shapes:
    """The shape of every tensor that such a backbone has there; a square table of positions is of any side."""
    places, dim = len(backbone.places) ** 2, backbone.dim
    table = given.get(_PLACES)
    if table is not None and table.dim() == 3 and math.isqrt(table.shape[1]) ** 2 == table.shape[1] > 0:
        places = table.shape[1]
    return {
        _PLACES: (1, places, dim),
        "patch_embed.proj.weight": tuple(backbone.embed.weight.shape),
        "patch_embed.proj.bias": (dim,),
        **layers.shapes(backbone.blocks, "encoder."),
    }


def _resized(table: Tensor, side: int) -> Tensor:
    """A table of positions, (1, any square, dim), for images of `side` patches a side: (side, side, dim)."""
    there = math.isqrt(table.shape[1])
    grid = table[0].unflatten(0, (there, there))
    if there == side:
        return grid
    grid = grid.to(torch.promote_types(table.dtype, torch.float32)).permute(2, 0, 1)[None]
    return F.interpolate(grid, size=(side, side), mode="bicubic")[0].permute(1, 2, 0)
