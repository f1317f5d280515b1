"""What an attention layer keeps of a stream's past, so that the stream can come in chunks.

`Cache` is the interface; `KeyValueCache` keeps every key and value, which serves any causal backend. Backends with a
bound on what later tokens see keep less, see `longnet_kit.attention.dilated_cached`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longnet_kit.errors import UserError

MAX_TOKENS = 65_536
"""Up to where a cache grows that keeps every token, unless it is made for another limit."""


class Cache(ABC):
    """The past of `batch_size` streams that advance together, one layer's.

    Args:
        batch_size, heads, head_dim: B, H and D of the queries, keys and values that are to come.
        dtype, device: theirs.
    """

    position: int
    """Tokens of each stream that it has seen."""
    max_tokens: int | None = None
    """How many it takes at most; None: any number, without growing."""

    def __init__(
        self,
        batch_size: int,
        heads: int,
        head_dim: int,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        self.batch_size = batch_size
        self.heads = heads
        self.head_dim = head_dim
        self.dtype = torch.get_default_dtype() if dtype is None else dtype
        self.device = torch.empty(0, device=device).device
        self.position = 0

    def space(self, *shape: int) -> Tensor:
        """Zeros of its dtype on its device, which can be written to in inference mode and outside of it."""
        with torch.inference_mode(False):
            return torch.zeros(shape, dtype=self.dtype, device=self.device)

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes that it holds now."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain values from which `load_state_dict` makes another cache of this shape equal to this one."""

    @abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises:
            UserError: it is of a cache of another shape.
        """

    def check_room(self, tokens: int) -> None:  # noqa: B027  (a default, not forgotten)
        """Raise a UserError where so many more tokens do not fit; by default all do."""

    def check(self, q: Tensor) -> None:
        """Raise a UserError unless the next tokens' queries, (B, n, H, D), are of the kind that the cache is for."""
        batch, tokens, heads, head_dim = q.shape
        if (batch, heads, head_dim) != (self.batch_size, self.heads, self.head_dim):
            raise UserError(
                f"the cache is for a batch of {self.batch_size} and {self.heads} heads of {self.head_dim}, and got a "
                f"batch of {batch} and {heads} heads of {head_dim}; make one with new_cache({batch}, {heads}, "
                f"{head_dim})"
            )
        if (q.dtype, q.device) != (self.dtype, self.device):
            raise UserError(
                f"the cache holds {self.dtype} on {self.device}, and got {q.dtype} on {q.device}; make one for that "
                "with new_cache(..., dtype=, device=), under the same autocast"
            )
        self.check_room(tokens)


class KeyValueCache(Cache):
    """Keeps every key and value; it grows by doubling, up to a limit.

    Args:
        batch_size, heads, head_dim, dtype, device: see `Cache`.
        max_tokens: how many tokens it takes at most.
    """

    def __init__(
        self, batch_size: int, heads: int, head_dim: int, *, max_tokens: int | None = None, **factory: Any
    ) -> None:
        super().__init__(batch_size, heads, head_dim, **factory)
        self.max_tokens: int = MAX_TOKENS if max_tokens is None else max_tokens
        if self.max_tokens < 1:
            raise UserError(f"max_tokens is {max_tokens}, expected at least 1")
        self._entries = self._room(0)

    @property
    def nbytes(self) -> int:
        return self._entries.nbytes

    def check_room(self, tokens: int) -> None:
        if self.position + tokens > self.max_tokens:
            raise UserError(
                f"the cache keeps every token, {self.max_tokens:,} at most, and holds {self.position:,}; "
                f"{tokens:,} more do not fit: give max_tokens={self.position + tokens} or more (--max-cached on the "
                "command line), or use the backend dilated, whose cache does not grow"
            )

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the next tokens' keys and values, (B, n, H, D) each.

        Returns:
            Keys and values of all tokens so far, (B, position, H, D) each, as views that hold until the next call.
        """
        start, self.position = self.position, self.position + k.shape[1]
        if self.position > self._entries.shape[2]:
            grown = self._room(min(self.max_tokens, max(self.position, 2 * self._entries.shape[2])))
            grown[:, :, :start] = self._entries[:, :, :start]
            self._entries = grown
        self._entries[0, :, start : self.position] = k
        self._entries[1, :, start : self.position] = v
        keys, values = self._entries[:, :, : self.position]
        return keys, values

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "entries": self._entries[:, :, : self.position].clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        entries, position = state["entries"], int(state["position"])
        if entries.shape != (2, self.batch_size, position, self.heads, self.head_dim) or entries.dtype != self.dtype:
            raise UserError(
                f"the saved keys and values are {entries.dtype} of shape {tuple(entries.shape)}, expected {self.dtype} "
                f"of (2, {self.batch_size}, {position}, {self.heads}, {self.head_dim})"
            )
        self.position = 0
        self.check_room(position)
        self._entries = self._room(position).copy_(entries)
        self.position = position

    def _room(self, tokens: int) -> Tensor:
        return self.space(2, self.batch_size, tokens, self.heads, self.head_dim)
