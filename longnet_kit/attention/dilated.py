"""The backend `dilated`: LongNet's attention (arXiv 2307.02486), and what its two ablations of the mixture choose.

How branches make one output is a `Combination`: the paper's and those with weights of their own are in
`longnet_kit.attention.dilated_mixing`, the one that counts each key once in `longnet_kit.attention.dilated_union`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor

from longnet_kit.attention import padding, patterns, register
from longnet_kit.attention.backend import AttentionBackend, Support
from longnet_kit.attention.dilated_cached import DilatedCache
from longnet_kit.attention.dilated_mixing import Call, Combination, Denominators, Equal, Learned
from longnet_kit.attention.dilated_op import dilated, dilated_backward
from longnet_kit.attention.dilated_union import Union
from longnet_kit.attention.inputs import in_autocast
from longnet_kit.attention.mixture import unit_stride
from longnet_kit.attention.patterns import Count, HeadOffsets, Overlap
from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.errors import UserError

__all__ = ["DilatedAttention", "dilated", "dilated_backward"]

Mixing = Literal["denominators", "equal", "learned"]


@register("dilated")
class DilatedAttention(AttentionBackend):
    """LongNet.

    Args:
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        head_offsets: which residue a head keeps: `interleaved` (h mod r, the paper), `grouped` (torchscale), or `none`:
            0 for all, an ablation.
        overlap: how often a key counts that several branches show: `multiset`: once for each of them (the paper), or
            `set`: once, an ablation.
        mixing: what weighs a branch against the others that keep a position: its softmax `denominators` (the paper, eq.
            9-10), or as ablations `equal` weights, or `learned` ones: a softmax over a parameter per branch, which the
            heads of a layer share, equal at first.

    Raises:
        UserError: the lists differ in length, are empty, or hold a number below 1; or a set with weights per branch.
    """

    head_dependent = True

    def __init__(
        self,
        segment_lengths: Sequence[Count] = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[Count] = (1, 2, 4, 6, 12),
        head_offsets: HeadOffsets = "interleaved",
        overlap: Overlap = "multiset",
        mixing: Mixing = "denominators",
    ) -> None:
        super().__init__()
        self._pattern = patterns.Dilated(segment_lengths, dilation_rates, head_offsets, overlap)
        self.mixing = _combination(overlap, mixing, len(self._pattern.branches))

    @property
    def pattern(self) -> patterns.Dilated:
        return self._pattern

    @property
    def branch_logits(self) -> Tensor | None:
        """See `Inspected.branch_logits`."""
        return self.mixing.logits

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
        return self._attend(q, k, v, None, causal, key_padding_mask, first_head, total_heads)

    def forward_sharded(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: SequenceShard,
        causal: bool = True,
        key_padding_mask: Tensor | None = None,
        first_head: int = 0,
        total_heads: int | None = None,
    ) -> Tensor:
        """Attend from a shard to the sequence; of segments longer than it, kept keys and values are exchanged.

        With `overlap: set` ranks trade heads for the sequence instead.
        """
        return self._attend(q, k, v, shard, causal, key_padding_mask, first_head, total_heads)

    def branch_lse(
        self, q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None, first_head: int, total_heads: int
    ) -> Tensor:
        """The log of each branch's softmax denominators from the kernels; memory does not grow with N squared."""
        call = self._call(q, causal, first_head, total_heads)
        if key_padding_mask is not None:
            q, k, _ = padding.hide(q, k, k, key_padding_mask)
        q, k = unit_stride(q), unit_stride(k)
        shard = self.shard
        if shard is None or shard.size == 1:
            return self.mixing.branch_lse(q, k, call)
        support = self.supports_shards(seq_len=q.shape[1] * shard.size, shards=shard.size, heads=q.shape[2])
        if not support:
            raise UserError(support.reason)
        return self.mixing.branch_lse_sharded(q, k, shard, call)

    def new_cache(
        self, batch_size: int, heads: int, head_dim: int, *, max_tokens: int | None = None, **factory: Any
    ) -> DilatedCache:
        """A cache of fixed size: ceil(w / r) entries for each branch and head. It has no limit of tokens."""
        return self.mixing.new_cache(batch_size, heads, head_dim, self._pattern.branches, **factory)

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache) -> Tensor:
        """See `AttentionBackend.forward_cached`."""
        return self.mixing.cached(q, k, v, cache, self._call(q, True, 0, None))

    def supports_shards(self, *, seq_len: int, shards: int, heads: int) -> Support:
        """Any number of heads; a segment must tile a shard or span whole shards.

        With `overlap: set` any segments, and heads that divide among the shards.
        """
        return self.mixing.supports_shards(self._pattern.branches, seq_len, shards, heads)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        shard: SequenceShard | None,
        causal: bool,
        key_padding_mask: Tensor | None,
        first_head: int,
        total_heads: int | None,
    ) -> Tensor:
        q, k, v = in_autocast(q, k, v)
        call = self._call(q, causal, first_head, total_heads)
        if key_padding_mask is not None:
            q, k, v = padding.hide(q, k, v, key_padding_mask)
        out = self.mixing.whole(q, k, v, call) if shard is None else self.mixing.sharded(q, k, v, shard, call)
        return out if key_padding_mask is None else padding.reveal(out, key_padding_mask)

    def _call(self, q: Tensor, causal: bool, first_head: int, total_heads: int | None) -> Call:
        """What is asked for with queries (B, N, H, D), before padding widens them."""
        total_heads = q.shape[2] if total_heads is None else total_heads
        rule = self._pattern.head_offsets
        return Call(self._pattern.branches, rule, first_head, total_heads, causal, q.shape[-1] ** -0.5)

    def extra_repr(self) -> str:
        pattern, mixing = self._pattern, type(self.mixing).__name__
        return f"branches={pattern.branches}, head_offsets={pattern.head_offsets!r}, mixing={mixing}"


def _combination(overlap: Overlap, mixing: Mixing, branches: int) -> Combination:
    """What the two keys choose; UserError where they do not go together."""
    if mixing not in ("denominators", "equal", "learned"):
        raise UserError(f"mixing is {mixing!r}, expected 'denominators', 'equal' or 'learned'")
    if overlap == "set" and mixing != "denominators":
        raise UserError(
            f"overlap is 'set' and mixing is {mixing!r}: a set is one softmax over the keys of all branches, each "
            f"once, and {mixing} weights mix one softmax per branch, in which no key comes twice; set overlap to "
            "'multiset', or mixing to 'denominators'"
        )
    if overlap == "set":
        return Union()
    return {"denominators": lambda _: Denominators(), "equal": Equal, "learned": Learned}[mixing](branches)
