"""Block-sparse attention by kernels that know only block-diagonal biases.

Each piece of the pattern (block_sparse_pieces) is a kernel call; their outputs are mixed by their softmax denominators.
Backward calls the kernel with the mixed out and lse in place of the piece's own, so that the gradients add up to those
of the one softmax, mixing weights included. Memory is O(N) beside q, k, v.

A kernel is anything with the methods of `Kernel`: block_sparse_fmha has xformers', block_sparse_torch has torch's.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from longnet_kit.attention import derivatives, padding
from longnet_kit.attention.block_sparse_pieces import pieces
from longnet_kit.attention.patterns import BlockSparse
from longnet_kit.errors import UserError

MAX_SEGMENTS = 65535
"""Segments in one call: a dimension of the CUDA grid."""
MAX_ELEMENTS = 2**31 - 1
"""Elements of q in one call: the kernels count in 32 bits."""
Key = tuple[str, int, int, int]
"""The arguments of a `BlockSparse`: what plans are kept by."""


class Kernel(Protocol):
    """Attention under a bias, with the log of the softmax denominators handed out and in."""

    name: str
    """Of its backend, for messages."""

    @staticmethod
    def bias(queries: list[int], keys: list[int], causal: bool, device: torch.device) -> Any:
        """The bias of segments of so many queries and keys, end to end, of which each sees itself alone.

        If causal, the last query of a segment sees all of its keys, each one before it one key less.
        """
        ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float) -> tuple[Tensor, Tensor]:
        """q (1, M, H, D), k and v (1, K, H, D) to out (1, M, H, D) and lse (1, H, M)."""
        ...

    def backward(
        self, grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Any, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k, v, shaped as they are, under the given out and lse."""
        ...


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockSparse,
    causal: bool,
    key_padding_mask: Tensor | None,
    kernel: Kernel,
) -> Tensor:
    """Attention over the blocks that `pattern` shows.

    Args:
        q, k, v: (B, N, H, D), of a dtype and width that the kernel takes; with padding, 8 columns wider.
        key_padding_mask: (B, N) bool, True where the token is real.

    Returns:
        (B, N, H, D), of q's dtype; zero for padded queries.

    Raises:
        UserError: one sequence is too long for the kernels' 32-bit counters.
    """
    derivatives.refuse_forward_mode(kernel.name, q, k, v)
    derivatives.refuse_transforms(kernel.name)
    scale = q.shape[-1] ** -0.5
    if key_padding_mask is not None:
        q, k, v = padding.hide(q, k, v, key_padding_mask)
    with torch.autocast(q.device.type, enabled=False):
        rows = MAX_ELEMENTS // q[0].numel()
        if rows == 0:
            raise UserError(
                f"one sequence of {tuple(q.shape[1:])} (seq, heads, head_dim) holds {q[0].numel()} elements; these "
                f"kernels take at most {MAX_ELEMENTS}: shorten it or split the heads over several devices"
            )
        chunks = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
        out = torch.cat([_attend(*chunk, pattern, causal, kernel, scale) for chunk in chunks])
    return out if key_padding_mask is None else padding.reveal(out, key_padding_mask)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSparse, causal: bool, kernel: Kernel, scale: float
) -> Tensor:
    batch, seq_len, heads, head_dim = q.shape
    calls = plan(_key(pattern), batch, seq_len, causal, q.device, kernel.bias)
    q, k, v = (_aligned(x).reshape(1, batch * seq_len, heads, head_dim) for x in (q, k, v))
    return _Merged.apply(q, k, v, calls, kernel, scale).view(batch, seq_len, heads, head_dim)  # type: ignore[union-attr]


def _aligned(x: Tensor) -> Tensor:
    """The kernels read 8 elements at once: anything else about the strides is free."""
    steps = (*x.stride()[:-1], x.storage_offset())
    return x if x.stride(-1) == 1 and all(step % 8 == 0 for step in steps) else x.contiguous()


class Call(NamedTuple):
    """One kernel call: which of the B * N tokens are its queries and keys, and the bias over them."""

    queries: Tensor | slice
    keys: Tensor | slice
    bias: Any


class _Merged(torch.autograd.Function):
    """One softmax over the keys of all calls."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, calls: Sequence[Call], kernel: Kernel, scale: float
    ) -> Tensor:
        exact = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(q.shape, dtype=exact)
        lse = q.new_full((1, q.shape[2], q.shape[1]), -torch.inf, dtype=exact)
        for queries, keys, bias in calls:
            call_out, call_lse = kernel.forward(q[:, queries], k[:, keys], v[:, keys], bias, scale)
            before = lse[..., queries]
            after = torch.logaddexp(before, call_lse)
            kept, added = ((x - after).exp().transpose(1, 2).unsqueeze(-1) for x in (before, call_lse))
            out[:, queries] = out[:, queries] * kept + call_out * added
            lse[..., queries] = after
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.calls, ctx.kernel, ctx.scale = calls, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = functools.partial(_gradients, ctx.calls, ctx.kernel, ctx.scale)
        return *derivatives.once(ctx.kernel.name, gradients, grad, *ctx.saved_tensors), None, None, None


def _gradients(
    calls: Sequence[Call], kernel: Kernel, scale: float, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
    lse: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k and v through all calls."""
    totals = tuple(torch.zeros(x.shape, dtype=lse.dtype, device=x.device) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        for queries, keys, bias in calls:
            saved = (out[:, queries], lse[..., queries].contiguous(), q[:, queries], k[:, keys], v[:, keys])
            parts = kernel.backward(grad[:, queries].contiguous(), *saved, bias, scale)
            for total, part, index in zip(totals, parts, (queries, keys, keys), strict=True):
                total[:, index] += part  # no index twice within a call
    return tuple(total.to(q.dtype) for total in totals)


def _key(pattern: BlockSparse) -> Key:
    return pattern.layout, pattern.block_size, pattern.local_blocks, pattern.summary_blocks


@functools.lru_cache(maxsize=16)
def plan(
    key: Key, batch: int, seq_len: int, causal: bool, device: torch.device, make_bias: Callable[..., Any]
) -> tuple[Call, ...]:
    """The kernel calls for a batch of sequences laid end to end; `make_bias` is the kernel's."""
    pattern = BlockSparse(*key)  # type: ignore[arg-type]
    calls = []
    for piece in pieces(pattern, seq_len, causal):
        segments = [(start, segment) for start in range(0, batch * seq_len, seq_len) for segment in piece.segments]
        for first in range(0, len(segments), MAX_SEGMENTS):
            some = segments[first : first + MAX_SEGMENTS]
            queries = [[_shift(segment.queries, start)] for start, segment in some]
            keys = [[_shift(r, start) for r in segment.keys] for start, segment in some]
            lengths = ([sum(map(len, ranges)) for ranges in side] for side in (queries, keys))
            bias = make_bias(*lengths, piece.causal, device)
            calls.append(Call(_index(queries, device), _index(keys, device), bias))
    return tuple(calls)


def _shift(positions: range, start: int) -> range:
    return range(positions.start + start, positions.stop + start)


def _index(ranges: list[list[range]], device: torch.device) -> Tensor | slice:
    """All positions in order; a slice, which copies nothing, where they adjoin."""
    flat = [r for several in ranges for r in several]
    if all(a.stop == b.start for a, b in itertools.pairwise(flat)):
        return slice(flat[0].start, flat[-1].stop)
    return torch.cat([torch.arange(r.start, r.stop) for r in flat]).to(device)
