"""Which attention kernel runs on a CUDA device: the fastest that is there, by a table that a benchmark writes.

The table, cuda_routes.json, orders the kernels of `longnet_kit.attention.flash` by speed for a GPU's compute capability
and a kind of dtype. What a kernel can run at all is said here. Plain matrix products (`math`) run everywhere.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

TABLE = Path(__file__).with_name("cuda_routes.json")
HALF = (torch.float16, torch.bfloat16)
CUDNN_LENGTHS = 128
"""Numbers of queries and keys that cuDNN is given are multiples of it. It builds a graph for each shape, in 0.05 to 0.1
seconds (an H200): no good for what a stream asks for, whose shapes are new at every token."""

_FA3 = "flash_attn_interface"  # the module that FlashAttention-3 installs

log = logging.getLogger(__name__)


def fastest(major: int, dtype: torch.dtype, head_dim: int, n: int, m: int) -> str:
    """The name of the first kernel in the table's order that runs.

    Args:
        major: of the GPU's compute capability: 8 for Ampere and Ada, 9 for Hopper.
        dtype: of q, k and v.
        head_dim: D.
        n: queries.
        m: keys.
    """
    known = _known()
    order = known.get((major, kind(dtype))) or known.get((None, kind(dtype)), [])
    return next((name for name in order if runs(name, major, dtype, head_dim, n, m)), "math")


def runs(name: str, major: int, dtype: torch.dtype, head_dim: int, n: int, m: int) -> bool:
    """Whether a kernel takes such inputs on such a GPU, and is of use for them."""
    if name == "fa3":  # torch's flash kernel, once FlashAttention-3 has taken its place
        return _active_flash() == "FA3" and major == 9 and runs("flash", major, dtype, head_dim, n, m)
    if name == "cudnn":
        if n % CUDNN_LENGTHS or m % CUDNN_LENGTHS or not torch.backends.cudnn.is_available():
            return False
        return dtype in HALF and head_dim % 8 == 0 and head_dim <= 128 and major >= 8
    if name == "flash":
        foreign = _active_flash() == "FA3" and major != 9  # it is the process's flash kernel then, and a Hopper's alone
        return dtype in HALF and head_dim % 8 == 0 and head_dim <= 256 and major >= 8 and not foreign
    if name == "efficient":
        if dtype == torch.float32:
            return head_dim % 4 == 0
        return head_dim % 8 == 0 and (dtype == torch.float16 or dtype == torch.bfloat16 and major >= 8)
    return name == "math"


def kind(dtype: torch.dtype) -> str:
    """The table's word for a dtype."""
    return "half" if dtype in HALF else str(dtype).removeprefix("torch.")


@cache
def load() -> Mapping[str, Any]:
    """The table as it is in its file."""
    return json.loads(TABLE.read_text())


@cache
def _known() -> dict[tuple[int | None, str], list[str]]:
    return orders(load())


def orders(table: Mapping[str, Any]) -> dict[tuple[int | None, str], list[str]]:
    """The table's orders by capability (None: any that has none of its own) and kind of dtype."""
    return {(entry["major"], entry["kind"]): entry["order"] for entry in table["orders"]}


def use_flash_attention_3(device: torch.device) -> bool:
    """Have FlashAttention-3 be torch's flash kernel from now on, in the whole process; says whether it is.

    Only where it is installed, torch can do that (2.11 and later) and the device is a Hopper. Torch asks libraries to
    leave this to the application: `longnet fit` is one, `attention.build` does not call it.
    """
    activate = getattr(torch.nn.attention, "activate_flash_attention_impl", None)
    if device.type != "cuda" or activate is None or importlib.util.find_spec(_FA3) is None:
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if _active_flash() is None:
        try:
            activate("FA3")
        except Exception as error:  # built for another torch, say; the other kernels are there
            log.warning("FlashAttention-3 is installed but cannot be used: %s", error)
    return _active_flash() == "FA3"


def _active_flash() -> str | None:
    """What has taken the place of torch's own flash kernel."""
    current = getattr(torch.nn.attention, "current_flash_attention_impl", None)
    return current() if current is not None else None
