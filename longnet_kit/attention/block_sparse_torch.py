"""Block-sparse attention by torch's own kernels: the backend `block_sparse`, which needs no other package.

The pattern is taken apart and its pieces are mixed as for xformers' fmha (block_sparse_merged); equally long segments
of a piece are the batch of a kernel call.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention import block_sparse_merged, flash, register
from longnet_kit.attention.block_sparse import BlockSparseBackend
from longnet_kit.attention.inputs import in_autocast
from longnet_kit.attention.mixture import exact, unit_stride
from longnet_kit.attention.patterns import BlockSparse, Count


@register("block_sparse")
class TorchBlockSparse(BlockSparseBackend):
    """Attention between blocks of tokens as of the backend `xformers`, by torch's kernels alone.

    It runs on every device and in every dtype, takes blocks of any size, and holds O(N) beside q, k and v. On a CPU it
    is several times faster than xformers' BlockSparseTensor.

    Args:
        pattern, local_blocks, summary_blocks: as of `xformers`.
        block_size: tokens in a block, from 1 on; the last block may be shorter.

    Raises:
        UserError: a number out of range, more summary blocks than the window has, or an unknown pattern.
    """

    def __init__(
        self,
        pattern: Literal["fixed", "local"] = "fixed",
        block_size: Count = 64,
        local_blocks: Count = 4,
        summary_blocks: Count = 1,
    ) -> None:
        super().__init__(BlockSparse(pattern, block_size, local_blocks, summary_blocks))

    @torch.compiler.disable
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = in_autocast(q, k, v)
        return block_sparse_merged.attend(q, k, v, self._pattern, causal, key_padding_mask, Torch())


class Run(NamedTuple):
    """Equally long segments in a row."""

    segments: int
    queries: int
    """In each of them."""
    keys: int
    causal: bool


class Torch:
    """The kernels of `longnet_kit.attention.flash`, under a bias that is a list of `Run`."""

    name = "the attention backend block_sparse"

    @staticmethod
    def bias(queries: list[int], keys: list[int], causal: bool, device: torch.device) -> list[Run]:
        """See `block_sparse_merged.Kernel`; segments of causal pieces have as many keys as queries."""
        assert not causal or queries == keys
        return [Run(len(list(run)), *lengths, causal) for lengths, run in groupby(zip(queries, keys, strict=True))]

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: list[Run], scale: float) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q), q.new_empty(1, q.shape[2], q.shape[1], dtype=exact(q))
        for run, rows, columns in _places(bias):
            q_, k_, v_ = _batches(run, q[:, rows], k[:, columns], v[:, columns])
            out_, lse_ = flash.forward(q_, k_, v_, run.causal, scale)
            out[0, rows] = out_.transpose(1, 2).flatten(0, 1)
            lse[0, :, rows] = lse_.transpose(0, 1).flatten(1)
        return out, lse

    def backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: list[Run], scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        for run, rows, columns in _places(bias):
            grad_, q_, k_, v_, out_ = _batches(
                run, grad[:, rows], q[:, rows], k[:, columns], v[:, columns], out[:, rows]
            )
            lse_ = lse[0, :, rows].unflatten(1, (run.segments, -1)).transpose(0, 1)  # (segments, H, queries)
            found = flash.backward(grad_, q_, k_, v_, out_, lse_, run.causal, scale)
            for total, part, place in zip(grads, found, (rows, columns, columns), strict=True):
                total[0, place] = part.transpose(1, 2).flatten(0, 1)
        return grads


def _places(bias: list[Run]) -> Iterator[tuple[Run, slice, slice]]:
    """Each run, and which queries and keys it has."""
    query = key = 0
    for run in bias:
        queries, keys = run.segments * run.queries, run.segments * run.keys
        yield run, slice(query, query + queries), slice(key, key + keys)
        query, key = query + queries, key + keys


def _batches(run: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(1, segments * length, H, D) each to (segments, H, length, D)."""
    return tuple(unit_stride(x[0].unflatten(0, (run.segments, -1)).transpose(1, 2)) for x in tensors)
