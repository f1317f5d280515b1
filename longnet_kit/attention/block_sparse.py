"""Block-sparse attention: what its backends share, and the one by xformers with its choice between two routes.

`block_sparse_fmha` runs xformers' memory-efficient kernels, on CUDA in half precision; `block_sparse_tensor` runs
anywhere. Both give the same softmax. xformers is imported when the backend is first asked to run.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention import (
    block_sparse_cached,
    block_sparse_fmha,
    block_sparse_merged,
    block_sparse_tensor,
    patterns,
    register,
)
from longnet_kit.attention.backend import AttentionBackend, Support
from longnet_kit.attention.cache import KeyValueCache
from longnet_kit.attention.inputs import in_autocast
from longnet_kit.attention.patterns import Count
from longnet_kit.errors import UserError
from longnet_kit.typed import Range


class Route(NamedTuple):
    """Which of xformers' implementations runs, and why not the faster one."""

    name: Literal["fmha", "BlockSparseTensor"]
    refusal: str
    """Why fmha does not run; empty when it does."""


class BlockSparseBackend(AttentionBackend):
    """What the block-sparse backends share: the pattern and the cache."""

    def __init__(self, pattern: patterns.BlockSparse) -> None:
        super().__init__()
        self._pattern = pattern

    @property
    def pattern(self) -> patterns.BlockSparse:
        return self._pattern

    def new_cache(self, batch_size: int, heads: int, head_dim: int, **factory: Any) -> KeyValueCache:
        """A cache of every key, up to `max_tokens`."""
        return KeyValueCache(batch_size, heads, head_dim, **factory)

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache) -> Tensor:
        """See `AttentionBackend.forward_cached`; visible blocks are gathered for torch's kernels."""
        return block_sparse_cached.attend(q, k, v, self._pattern, cache)

    def extra_repr(self) -> str:
        p = self._pattern
        numbers = f"block_size={p.block_size}, local_blocks={p.local_blocks}, summary_blocks={p.summary_blocks}"
        return f"pattern={p.layout!r}, {numbers}"


@register("xformers")
class BlockSparseAttention(BlockSparseBackend):
    """Attention between blocks of tokens: a local window, or Sparse Transformer's fixed pattern (arXiv 1904.10509).

    On CUDA in float16 and bfloat16 it runs on xformers' fmha kernels where a small trial of them comes out right, with
    and without causality and padding alike; everywhere else, float32 and float64 on CUDA among it, on xformers'
    BlockSparseTensor. `route` tells. The results differ by rounding only. On CUDA neither repeats bit for bit unless
    torch.use_deterministic_algorithms asks for it, which leaves BlockSparseTensor.

    Args:
        pattern: `local`: block i sees blocks i - local_blocks + 1 to i, and as many after when not causal. `fixed`:
            windows of `local_blocks` blocks; a block sees its own window, and the last `summary_blocks` blocks of
            every earlier window (of every other window when not causal).
        block_size: tokens in a block, at least 16; the last block may be shorter.
        local_blocks: blocks in a window.
        summary_blocks: blocks that summarise a window; at most `local_blocks`. Only `fixed` uses it.

    Raises:
        UserError: a number out of range, more summary blocks than the window has, or an unknown pattern.
    """

    def __init__(
        self,
        pattern: Literal["fixed", "local"] = "fixed",
        block_size: Annotated[int, Range(at_least=block_sparse_tensor.SMALLEST_BLOCK)] = 64,
        local_blocks: Count = 4,
        summary_blocks: Count = 1,
    ) -> None:
        super().__init__(patterns.BlockSparse(pattern, block_size, local_blocks, summary_blocks))
        if block_size < block_sparse_tensor.SMALLEST_BLOCK:
            raise UserError(
                f"block_size is {block_size}; xformers takes blocks of at least {block_sparse_tensor.SMALLEST_BLOCK} "
                "tokens, of any size from there on"
            )

    @torch.compiler.disable
    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool = True, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        q, k, v = in_autocast(q, k, v)
        kernel, _ = block_sparse_fmha.probe(q.device, q.dtype, q.shape[-1])
        if kernel is None:
            return block_sparse_tensor.attend(q, k, v, self._pattern, causal, key_padding_mask)
        return block_sparse_merged.attend(q, k, v, self._pattern, causal, key_padding_mask, kernel)

    def route(self, device: torch.device | str, dtype: torch.dtype, head_dim: int = 64) -> Route:
        """Which implementation runs inputs of this kind (under autocast: of the autocast dtype), padded or not."""
        kernel, refusal = block_sparse_fmha.probe(torch.device(device), dtype, head_dim)
        return Route("BlockSparseTensor", refusal) if kernel is None else Route("fmha", "")

    @torch.compiler.disable
    def supports(
        self, *, device: torch.device, dtype: torch.dtype, head_dim: int, causal: bool = True, padding: bool = False
    ) -> Support:
        """Any dtype and width on CPU and CUDA, if xformers is there."""
        if device.type not in ("cpu", "cuda"):
            return Support(
                False,
                f"the xformers backend runs on cpu and cuda; these inputs are on {device.type}: use sdpa or dilated",
            )
        problem = block_sparse_tensor.problem()
        if problem:
            return Support(
                False,
                f"the xformers backend cannot import xformers.sparse ({problem}); `pip install xformers` has wheels "
                "for Linux on x86-64 and for Windows; elsewhere use the backend naive with pattern block_sparse, or "
                "dilated",
            )
        return Support(True)
