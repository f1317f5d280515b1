"""Block-sparse attention by xformers' BlockSparseTensor: pure torch, so on CPU as on CUDA, differentiated by autograd.

Two of its three operations are used: the product of q and k at visible blocks, and the product of the weights with v.
Its softmax is not: it shifts every row of the batch by one common maximum and clamps what lies 55 nats below, so a row
of small scores would lose its normalisation to a row of large ones.

Work and memory are those of the visible blocks, plus one byte for each pair of blocks.
"""

from __future__ import annotations

import functools
import logging
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_kit.attention.patterns import BlockSparse

SMALLEST_BLOCK = 16
"""BlockSparseTensor refuses smaller blocks; any larger size will do, a multiple of 16 or not."""


def attend(
    q: Tensor, k: Tensor, v: Tensor, pattern: BlockSparse, causal: bool, key_padding_mask: Tensor | None
) -> Tensor:
    """Attention over the blocks that `pattern` shows; float16 and bfloat16 are computed in float32.

    Args:
        q, k, v: (B, N, H, D).
        key_padding_mask: (B, N) bool, True where the token is real.

    Returns:
        (B, N, H, D), of q's dtype; zero for padded queries.
    """
    from xformers.ops import masked_matmul
    from xformers.sparse import BlockSparseTensor

    batch, seq_len, heads, head_dim = q.shape
    size = pattern.block_size
    blocks = -(-seq_len // size)
    visible = _visible(pattern.layout, pattern.local_blocks, pattern.summary_blocks, blocks, causal, q.device)
    real = _real_tokens(seq_len, blocks * size, key_padding_mask, q.device)
    padded = None if key_padding_mask is None else ~key_padding_mask[:, :, None, None]
    dtype = q.dtype
    if padded is not None:
        # NaN times zero is NaN, so padding must be gone from the products, not only from the weights.
        q, k, v = (x.masked_fill(padded, 0) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (_fold(x, blocks * size) for x in (q, k, v))
        shown = BlockSparseTensor(q.new_empty(1, 1, size, size), visible.layout)
        scores = masked_matmul(q * head_dim**-0.5, k.transpose(-2, -1), shown).values()  # (B * H, visible, size, size)
        scores = _hide(scores, visible, batch, causal, real)
        with torch.no_grad():  # the softmax does not depend on what is subtracted
            top = scores.amax(-1)[:, visible.of_row].amax(2)  # (B * H, blocks, size)
            top = top.masked_fill(top == -torch.inf, 0)
        weights = BlockSparseTensor((scores - top[:, visible.rows, :, None]).exp(), visible.layout)
        mixed = weights @ F.pad(v, (0, 1), value=1.0)  # the last column sums the weights
        total = mixed[..., -1:]
        out = mixed[..., :-1] / total.masked_fill(total == 0, 1)  # a query that sees nothing outputs zero
    out = out.view(batch, heads, blocks * size, head_dim)[:, :, :seq_len].transpose(1, 2).to(dtype)
    return out if padded is None else out.masked_fill(padded, 0)


@functools.cache
def problem() -> str:
    """Why BlockSparseTensor cannot be had here; empty when it can."""
    logger = logging.getLogger("xformers")
    logger.addFilter(_unless_about_extensions)
    try:
        import xformers.sparse  # noqa: F401
    except Exception as error:  # xformers also raises what its own checks of other packages raise
        return f"{type(error).__name__}: {error}"
    finally:
        logger.removeFilter(_unless_about_extensions)
    return ""


def _unless_about_extensions(record: logging.LogRecord) -> bool:
    """Nothing here needs xformers' compiled extensions; where fmha does, its refusal tells of them."""
    return "can't load C++/CUDA extensions" not in record.getMessage()


class _Visible(NamedTuple):
    """The visible blocks, row by row, as BlockSparseTensor lists them."""

    layout: Tensor  # (1, blocks, blocks) bool
    rows: Tensor  # (visible,): the block of queries
    columns: Tensor  # (visible,): the block of keys
    of_row: Tensor  # (blocks, most in a row): which of the visible ones a row has; short rows repeat their last


@functools.lru_cache(maxsize=16)
def _visible(
    layout: str, local_blocks: int, summary_blocks: int, blocks: int, causal: bool, device: torch.device
) -> _Visible:
    seen = BlockSparse(layout, 1, local_blocks, summary_blocks).blocks(blocks, causal)  # type: ignore[arg-type]
    rows, columns = seen.nonzero(as_tuple=True)
    counts = seen.sum(1, keepdim=True)
    nth = torch.arange(int(counts.max())).minimum(counts - 1)
    of_row = counts.cumsum(0) - counts + nth
    return _Visible(*(x.to(device) for x in (seen[None], rows, columns, of_row)))


def _real_tokens(seq_len: int, tokens: int, mask: Tensor | None, device: torch.device) -> Tensor | None:
    """Which of `tokens` positions are real tokens: (B or 1, tokens) bool; None when all are."""
    if mask is not None:
        return F.pad(mask, (0, tokens - seq_len))
    return None if tokens == seq_len else (torch.arange(tokens, device=device) < seq_len)[None]


def _fold(x: Tensor, tokens: int) -> Tensor:
    """(B, N, H, D) to (B * H, 1, tokens, D), contiguous, at least float32, zero after the end."""
    batch, seq_len, heads, head_dim = x.shape
    x = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(1, 2)
    return F.pad(x, (0, 0, 0, tokens - seq_len)).reshape(batch * heads, 1, tokens, head_dim).contiguous()


def _hide(scores: Tensor, visible: _Visible, batch: int, causal: bool, real: Tensor | None) -> Tensor:
    """Set to -inf what a visible block still must not show: later tokens, padding, and what is past the end."""
    size = scores.shape[-1]
    if causal:
        later = torch.ones(size, size, dtype=torch.bool, device=scores.device).triu(1)
        diagonal = visible.rows == visible.columns
        scores = scores.masked_fill(diagonal[:, None, None] & later, -torch.inf)
    if real is not None:
        hidden = ~real.view(len(real), 1, -1, 1, size)[:, :, visible.columns]  # (B or 1, 1, visible, 1, size)
        scores = scores.unflatten(0, (batch, -1)).masked_fill(hidden, -torch.inf).flatten(0, 1)
    return scores
