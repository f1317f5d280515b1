"""What an attention call may be given: the checks at the door, so that no backend has to make them; and its dtype."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from longnet_kit.errors import UserError

P = ParamSpec("P")
T = TypeVar("T")

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def all_heads(heads: int, first_head: int, total_heads: int | None) -> int:
    """How many heads the layer has; UserError unless the `heads` that are given are among them."""
    total_heads = first_head + heads if total_heads is None else total_heads
    if not 0 <= first_head <= first_head + heads <= total_heads:
        raise UserError(f"heads {first_head} to {first_head + heads - 1} were given, but total_heads is {total_heads}")
    return total_heads


def divisors(number: int) -> list[int]:
    """All divisors of a number, in order; in time of its square root."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})


def nearest_divisor(number: int, near: int) -> int:
    """The divisor of `number` that is nearest to `near`."""
    return min(divisors(number), key=lambda d: abs(d - near))


def check_inputs(q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None) -> None:
    """Raise a UserError that says what came and what is accepted, unless the inputs are well-formed."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, Tensor):
            raise UserError(f"{name} is a {type(x).__name__}, expected a tensor (batch, seq, heads, head_dim)")
        if x.dim() != 4:
            raise UserError(f"{name} has shape {tuple(x.shape)}, expected (batch, seq, heads, head_dim)")
        if x.dtype not in FLOATS:
            raise UserError(f"{name} is {x.dtype}, expected one of {', '.join(map(str, FLOATS))}")
        if x.shape != q.shape:
            raise UserError(f"{name} has shape {tuple(x.shape)} but q has {tuple(q.shape)}; they must be equal")
        if x.dtype != q.dtype:
            raise UserError(f"{name} is {x.dtype} but q is {q.dtype}; cast them to one dtype")
        if x.device != q.device:
            raise UserError(f"{name} is on {x.device} but q is on {q.device}; move them to one device")
    if 0 in q.shape:
        raise UserError(f"q has shape {tuple(q.shape)}; every dimension must be at least 1")
    if key_padding_mask is None:
        return
    if not isinstance(key_padding_mask, Tensor) or key_padding_mask.dtype != torch.bool:
        given = key_padding_mask.dtype if isinstance(key_padding_mask, Tensor) else type(key_padding_mask).__name__
        raise UserError(f"key_padding_mask is {given}, expected a bool tensor, True where the token is real")
    if key_padding_mask.shape != q.shape[:2]:
        raise UserError(
            f"key_padding_mask has shape {tuple(key_padding_mask.shape)}, expected (batch, seq) = {tuple(q.shape[:2])}"
        )
    if key_padding_mask.device != q.device:
        raise UserError(f"key_padding_mask is on {key_padding_mask.device} but q is on {q.device}; move it there")


def check_output(out: Tensor, q: Tensor, backend: Any) -> None:
    """Raise a UserError that names the backend, unless its output has the shape, dtype and device of the queries."""
    if not isinstance(out, Tensor):
        found, expected = f"a {type(out).__name__}", "a tensor"
    elif out.shape != q.shape:
        found, expected = f"shape {tuple(out.shape)}", f"that of q, {tuple(q.shape)}"
    elif out.device != q.device:
        found, expected = f"a tensor on {out.device}", f"one on {q.device}, as q is"
    elif out.dtype != q.dtype and not (torch.is_autocast_enabled(q.device.type) and out.dtype in FLOATS):
        found, expected = str(out.dtype), f"{q.dtype}, as q is"
    else:
        return
    raise UserError(
        f"{backend.title} returns {found}, expected {expected}; `longnet check-backend` shows what else is wrong"
    )


def in_autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors in the dtype that autocast asks for; float64 stays."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def exactly(compute: Callable[P, T]) -> Callable[P, T]:
    """Run a function of tensors without autocast, which would round its products: of scores, say."""

    @functools.wraps(compute)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        device = next(x.device.type for x in args if isinstance(x, Tensor))
        if not torch.is_autocast_enabled(device):
            return compute(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return compute(*args, **kwargs)

    return run
