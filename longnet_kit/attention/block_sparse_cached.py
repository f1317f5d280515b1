"""Block-sparse attention over a stream whose keys are all kept: block by block, to the blocks that it sees.

xformers has nothing for queries that stand behind the keys, so torch's kernels run here: one call for a block's own
tokens, and one for the visible tokens before them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longnet_kit.attention.cache import KeyValueCache
from longnet_kit.attention.mixture import causal_after, unit_stride
from longnet_kit.attention.patterns import BlockSparse


def attend(q: Tensor, k: Tensor, v: Tensor, pattern: BlockSparse, cache: KeyValueCache) -> Tensor:
    """Attention of a stream's next tokens to themselves and the past; the cache moves on.

    Args:
        q, k, v: (B, n, H, D).

    Returns:
        (B, n, H, D).
    """
    first, size = cache.position, pattern.block_size
    keys, values = cache.append(k, v)
    q, k, v = (unit_stride(x) for x in (q, k, v))
    out = torch.empty_like(q)
    for block in range(first // size, -(-cache.position // size)):
        start, stop = max(first, block * size), min(cache.position, (block + 1) * size)
        seen = _seen_before(pattern, block, start, q.device)
        rows = slice(start - first, stop - first)
        parts = (x.transpose(1, 2) for x in (q[:, rows], k[:, rows], v[:, rows], keys[:, seen], values[:, seen]))
        out[:, rows] = causal_after(*parts, scale=q.shape[-1] ** -0.5).transpose(1, 2)
    return out


def _seen_before(pattern: BlockSparse, block: int, start: int, device: torch.device) -> Tensor:
    """The positions before `start`, in a block or at its beginning, that the block's tokens see."""
    earlier = torch.arange(block)
    seen = earlier[pattern.sees(torch.tensor(block), earlier)]
    tokens = (seen[:, None] * pattern.block_size + torch.arange(pattern.block_size)).flatten()
    return torch.cat((tokens, torch.arange(block * pattern.block_size, start))).to(device)
