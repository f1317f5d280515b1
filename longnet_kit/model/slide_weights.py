"""Weights of Prov-GigaPath's slide encoder (github.com/prov-gigapath/prov-gigapath) as those of `SlideEncoder`.

The networks are the same function. torchscale, which GigaPath runs on, computes it with deviations that this kit does
not share: where a segment is not full or no multiple of the dilation rate, keys of zeros take softmax weight there, and
beyond a segment length that its rate does not divide, the following segments are shifted. Where the class token and the
tiles fill whole segments and every rate divides its length, both give the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from longnet_kit.errors import UserError
from longnet_kit.model import torchscale_layers as layers
from longnet_kit.model.slide_encoder import SlideEncoder, side_embedding

_PLACES = "pos_embed"


def is_slide_encoder(state: Mapping[Any, Any]) -> bool:
    """Whether a state dictionary is laid out as GigaPath's slide encoder."""
    return layers.is_encoder(state, embed_dims=2)


def convert(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The state dictionary for `network` of the same function.

    Args:
        state: GigaPath's, its keys with any prefix. The embedding of places may be among them or not; this kit computes
            it, and checks one that is given.
        network: the SlideEncoder that the result is to be loaded into: its sizes decide.

    Raises:
        UserError: keys are missing, left over, or of another shape (the first of each are named), the embedding of
            places is another one, or the network is no SlideEncoder.
    """
    if not isinstance(network, SlideEncoder):
        raise UserError(
            f"these are weights of a slide encoder, and this network is a {type(network).__name__}; load them into a "
            "longnet_kit.model.SlideEncoder"
        )
    prefix = layers.prefix(state, "encoder.")
    given = {key.removeprefix(prefix): x for key, x in state.items() if key.startswith(prefix)}
    dim = network.embed.out_features
    modules = {"encoder.layer_norm": "encoder_norm", "norm": "norm"}
    wanted: layers.Shapes = {
        "cls_token": (1, 1, dim),
        "patch_embed.proj.weight": (dim, network.in_dim),
        "patch_embed.proj.bias": (dim,),
        **{f"{there}.{kind}": (dim,) for there in modules for kind in ("weight", "bias")},
    }
    layers.check("the slide encoder's weights", given, wanted | layers.shapes(network.blocks, "encoder."), {_PLACES})
    if _PLACES in given:
        _check_places(given[_PLACES], network)
    converted = layers.convert(given, network.blocks, "encoder.")
    converted["cls_token"] = given["cls_token"].flatten()
    for kind in ("weight", "bias"):
        converted[f"embed.{kind}"] = given[f"patch_embed.proj.{kind}"]
        converted |= {f"{here}.{kind}": given[f"{there}.{kind}"] for there, here in modules.items()}
    return converted


def _check_places(table: Tensor, network: SlideEncoder) -> None:
    """Raise a UserError unless a table of places, (1, 1 + grid * grid, dim), holds what the network computes."""
    grid, dim = network.grid, network.embed.out_features
    if tuple(table.shape) != (1, 1 + grid * grid, dim):
        raise UserError(
            f"the slide encoder's weights do not fit: {_PLACES} is {tuple(table.shape)} there and "
            f"{(1, 1 + grid * grid, dim)} here; build the encoder with the grid that they were trained with"
        )
    side = side_embedding(grid, dim).to(table)
    tolerance = 5e-3  # of a table in bfloat16
    is_same = bool((table[0, 0].abs() <= tolerance).all())
    for row, places in enumerate(table[0, 1:].unflatten(0, (grid, grid))):  # one at a time: all are gigabytes
        second, first = places.chunk(2, dim=-1)
        is_same = is_same and bool(((second - side).abs() <= tolerance).all())
        is_same = is_same and bool(((first - side[row]).abs() <= tolerance).all())
    if not is_same:
        raise UserError(
            f"{_PLACES} there is not the sines and cosines of the tiles' places, which this encoder computes; such "
            "weights cannot be represented"
        )
