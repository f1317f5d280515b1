"""What torchscale's decoders and encoders share: sub-LN layers, their names there and here, the check of what is given.

A layer of torchscale with `subln` (its default) is this kit's `Block`: layer norms before each sublayer and before its
last projection, epsilon 1e-5, the exact GELU. q, k and v are projections of their own there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longnet_kit.errors import UserError
from longnet_kit.model.blocks import Block

FIRST = "layers.0.self_attn.q_proj.weight"
"""A key that every one of them has, behind some prefix."""
_MODULES = {
    "self_attn_layer_norm": "attention.norm",
    "self_attn.inner_attn_ln": "attention.inner_norm",
    "self_attn.out_proj": "attention.out",
    "final_layer_norm": "feed_forward.norm",
    "ffn.fc1": "feed_forward.fc1",
    "ffn.ffn_layernorm": "feed_forward.inner_norm",
    "ffn.fc2": "feed_forward.fc2",
}
"""Modules of a layer there and here; q, k and v are joined apart from them."""

Shapes = dict[str, tuple[int, ...]]


def is_encoder(state: Mapping[Any, Any], embed_dims: int) -> bool:
    """Whether a state dictionary is laid out as an encoder of patches, embedded by a weight of so many dimensions."""
    embeds = [x for key, x in state.items() if isinstance(key, str) and key.endswith("patch_embed.proj.weight")]
    is_embedded = any(isinstance(x, Tensor) and x.dim() == embed_dims for x in embeds)
    return is_embedded and any(isinstance(key, str) and key.endswith(f"encoder.{FIRST}") for key in state)


def prefix(state: Mapping[str, Tensor], below: str = "") -> str:
    """What stands before `<below>layers.<i>.<...>` in the keys of one of them."""
    own = below + FIRST
    return next(key for key in state if key.endswith(own)).removesuffix(own)


def shapes(blocks: Sequence[Block], prefix: str = "") -> Shapes:
    """The shape of every tensor that torchscale has for these blocks, by its key there: `<prefix>layers.<i>.<...>`."""
    found: Shapes = {}
    for i, block in enumerate(blocks):
        own, dim = block.state_dict(), block.attention.out.in_features
        for kind, shape in (("weight", (dim, dim)), ("bias", (dim,))):
            found |= {f"{prefix}layers.{i}.self_attn.{name}_proj.{kind}": shape for name in "qkv"}
            for there, here in _MODULES.items():
                found[f"{prefix}layers.{i}.{there}.{kind}"] = tuple(own[f"{here}.{kind}"].shape)
    return found


def convert(
    given: Mapping[str, Tensor],
    blocks: Sequence[Block],
    prefix: str = "",
    arrange: Callable[[Tensor, int], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The state dictionary of these blocks, `blocks.<i>.<...>`.

    Args:
        given: torchscale's, with every key of `shapes(blocks, prefix)`.
        arrange: what makes, of the rows of q or k there and the number of heads, those here; None: they are the same.
    """
    converted = {}
    for i, block in enumerate(blocks):
        for kind in ("weight", "bias"):
            q, k, v = (given[f"{prefix}layers.{i}.self_attn.{name}_proj.{kind}"] for name in "qkv")
            if arrange is not None:
                q, k = (arrange(x, block.attention.heads) for x in (q, k))
            converted[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat((q, k, v))
            for there, here in _MODULES.items():
                converted[f"blocks.{i}.{here}.{kind}"] = given[f"{prefix}layers.{i}.{there}.{kind}"]
    return converted


def check(whose: str, given: Mapping[str, Tensor], wanted: Shapes, others: Collection[str] = ()) -> None:
    """Raise a UserError unless there is exactly what is wanted, in the right shapes; the first misfits are named.

    Args:
        whose: the weights, in words.
        others: keys that may be there and are not needed.
    """
    missing = [key for key in wanted if key not in given]
    unexpected = [key for key in given if key not in wanted and key not in others]
    misfits = []
    for key, shape in wanted.items():
        x: Any = given.get(key)
        if x is not None and not isinstance(x, Tensor):
            misfits.append(f"{key} is a {type(x).__name__} there and a tensor here")
        elif x is not None and tuple(x.shape) != shape:
            misfits.append(f"{key} is {tuple(x.shape)} there and {shape} here")
    for words, found in (("are missing", missing), ("are left over", unexpected), ("do not fit", misfits)):
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise UserError(f"{whose} {words}: {', '.join(found[:3])}{more}")
