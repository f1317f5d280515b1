"""Attention with the score matrix in memory, for any pattern: the reference that every other backend answers to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longnet_kit import host_memory
from longnet_kit.attention import maps, patterns, register
from longnet_kit.attention.backend import AttentionBackend
from longnet_kit.attention.cache import KeyValueCache
from longnet_kit.errors import UserError


class NotEnoughMemory(MemoryError, UserError):
    """The score matrix does not fit into the memory that is free."""


class NotEnoughGpuMemory(torch.OutOfMemoryError, UserError):
    """The same of a GPU's memory."""


@register("naive")
class Naive(AttentionBackend):
    """softmax(q k^T / sqrt(D) + log m) v, with m the pattern's multiplicity. Memory grows with N squared.

    Args:
        pattern: `{kind: dense}` (the default), `{kind: dilated, ...}` or `{kind: block_sparse, ...}`.

    Raises:
        UserError: the pattern is unknown or its arguments do not fit; in a call, the score matrix is larger than the
            memory that is free.
    """

    head_dependent = True

    def __init__(self, pattern: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self._pattern = patterns.build(pattern or {"kind": "dense"})

    @property
    def pattern(self) -> patterns.Pattern:
        return self._pattern

    def memory(self, batch: int, seq_len: int, heads: int, dtype: torch.dtype, total_heads: int | None = None) -> int:
        """About the bytes that `forward` holds at its peak beside its inputs: what is of the score matrix's size."""
        scores = 3 * torch.promote_types(dtype, torch.float32).itemsize  # biased, masked, and their softmax
        multiplicity = 5 * (heads if total_heads is None else total_heads)  # in four bytes and in one
        return (batch * scores * heads + multiplicity) * seq_len**2

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        first_head: int = 0,
        total_heads: int | None = None,
    ) -> Tensor:
        _, seq_len, heads, _ = q.shape
        total_heads = heads if total_heads is None else total_heads
        if type(q) is Tensor and not torch.compiler.is_compiling():  # subclasses may have no data
            self._check_memory(q, total_heads)
        m = self._pattern.multiplicity(seq_len, total_heads, causal)[first_head : first_head + heads].to(q.device)
        real = None
        if key_padding_mask is not None:
            # NaN times zero is NaN, so padding must be gone from the products, not only from the weights.
            q, k, v = (x.masked_fill(~key_padding_mask[:, :, None, None], 0) for x in (q, k, v))
            real = key_padding_mask[:, :, None] & key_padding_mask[:, None, :]
        return torch.einsum("bhpk,bkhd->bphd", maps.weigh(q, k, m, real).to(v.dtype), v)

    def new_cache(self, batch_size: int, heads: int, head_dim: int, **factory: Any) -> KeyValueCache:
        """A cache of every key, up to `max_tokens`."""
        return KeyValueCache(batch_size, heads, head_dim, **factory)

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache) -> Tensor:
        """See `AttentionBackend.forward_cached`."""
        queries = torch.arange(cache.position, cache.position + q.shape[1])
        keys, values = cache.append(k, v)
        out = torch.empty_like(q)
        for chunk in maps.chunks(keys, q.shape[2], len(queries)):
            m = self._pattern.rows(queries[chunk], cache.position, q.shape[2], causal=True).to(q.device)
            out[:, chunk] = torch.einsum("bhpk,bkhd->bphd", maps.weigh(q[:, chunk], keys, m).to(v.dtype), values)
        return out

    def _check_memory(self, q: Tensor, total_heads: int) -> None:
        """Raise where the score matrix does not fit, rather than have the system end the process."""
        batch, seq_len, heads, _ = q.shape
        needed = self.memory(batch, seq_len, heads, q.dtype, total_heads)
        on_gpu, where = q.device.type == "cuda", str(q.device)
        if on_gpu:
            unused = torch.cuda.memory_reserved(q.device) - torch.cuda.memory_allocated(q.device)
            free, total = torch.cuda.mem_get_info(q.device)
            free += unused
            where = f"{where} (GPU {q.device.index} has a total capacity of {total / 2**30:.2f} GiB)"
        else:
            free = host_memory.free()
        if needed > free:
            longest = int(seq_len * math.sqrt(free / needed))
            raise (NotEnoughGpuMemory if on_gpu else NotEnoughMemory)(
                f"unable to allocate {needed / 2**20:.0f} MiB, the scores of the naive backend for {batch} x "
                f"{seq_len:,} tokens and {heads} heads: {free / 2**20:.0f} MiB of memory are free on {where}; use "
                f"the backend dilated or sdpa, whose memory grows with the length alone, or at most {longest:,} tokens"
            )
