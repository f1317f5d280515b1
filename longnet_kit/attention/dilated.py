"""LongNet's dilated attention (arXiv 2307.02486): a dense kernel per strided view, merged into one softmax.

Forward: the kernel gives (out, lse) of each branch's view; they are mixed into the running ones by their softmax
denominators (eq. 9-10). Backward: the kernel's backward, given the mixed out and lse in place of the branch's own,
gives gradients that add up to those of the one softmax over the multiset of all branches' keys, mixing weights
included. Only q, k, v, out and lse are kept in between, whatever the number of branches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longnet_kit.attention import dilated_cached, dilated_sharded, padding, patterns, register
from longnet_kit.attention.backend import AttentionBackend, Support
from longnet_kit.attention.dilated_cached import DilatedCache
from longnet_kit.attention.mixture import Gradients, Mixture, exact, unit_stride
from longnet_kit.attention.patterns import Count, HeadOffsets
from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.attention.views import View, branch_views


@register("dilated")
class DilatedAttention(AttentionBackend):
    """LongNet.

    Args:
        segment_lengths: w of each branch, in tokens.
        dilation_rates: r of each branch.
        head_offsets: which residue a head keeps: `interleaved` (h mod r, the paper), `grouped` (torchscale), or `none`:
            0 for all, an ablation.

    Raises:
        ValueError: the lists differ in length, are empty, or hold a number below 1.
    """

    head_dependent = True

    def __init__(
        self,
        segment_lengths: Sequence[Count] = (2048, 4096, 8192, 16384, 32768),
        dilation_rates: Sequence[Count] = (1, 2, 4, 6, 12),
        head_offsets: HeadOffsets = "interleaved",
    ) -> None:
        super().__init__()
        self._pattern = patterns.Dilated(segment_lengths, dilation_rates, head_offsets)

    @property
    def pattern(self) -> patterns.Dilated:
        return self._pattern

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
        """Attend from a shard to the sequence; of segments longer than it, kept keys and values are exchanged."""
        return self._attend(q, k, v, shard, causal, key_padding_mask, first_head, total_heads)

    def branch_lse(
        self, q: Tensor, k: Tensor, causal: bool, key_padding_mask: Tensor | None, first_head: int, total_heads: int
    ) -> Tensor:
        """The log of each branch's softmax denominators from the kernels; memory does not grow with N squared."""
        scale = q.shape[-1] ** -0.5
        if key_padding_mask is not None:
            q, k, _ = padding.hide(q, k, k, key_padding_mask)
        q, k = unit_stride(q), unit_stride(k)
        _, tokens, heads, _ = q.shape
        branches, rule, shard = self._pattern.branches, self._pattern.head_offsets, self.shard
        if shard is not None and shard.size > 1:
            support = dilated_sharded.supports(branches, tokens * shard.size, shard.size)
            if not support:
                raise ValueError(support.reason)
            return dilated_sharded.branch_lse(q, k, shard, branches, rule, first_head, total_heads, causal, scale)
        found = []
        for w, r in branches:
            mixture = Mixture(q, covered=r == 1)
            mixture.attend(branch_views(tokens, w, r, rule, first_head, heads, total_heads), q, k, k, causal, scale)
            found.append(mixture.lse)
        return torch.stack(found)

    def new_cache(
        self, batch_size: int, heads: int, head_dim: int, *, max_tokens: int | None = None, **factory: Any
    ) -> DilatedCache:
        """A cache of fixed size: ceil(w / r) entries for each branch and head. It has no limit of tokens."""
        return DilatedCache(batch_size, heads, head_dim, branches=self._pattern.branches, **factory)

    def forward_cached(self, q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache) -> Tensor:
        """See `AttentionBackend.forward_cached`."""
        return dilated_cached.attend(q, k, v, cache, self._pattern.head_offsets, q.shape[-1] ** -0.5)

    def supports_shards(self, *, seq_len: int, shards: int, heads: int) -> Support:
        """Any number of heads; a segment must tile a shard or span whole shards."""
        return dilated_sharded.supports(self._pattern.branches, seq_len, shards)

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
        if torch.is_autocast_enabled(q.device.type) and q.dtype != torch.float64:
            q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
        total_heads = q.shape[2] if total_heads is None else total_heads
        scale = q.shape[-1] ** -0.5
        if key_padding_mask is not None:
            q, k, v = padding.hide(q, k, v, key_padding_mask)
        lengths, rates = (list(numbers) for numbers in zip(*self._pattern.branches, strict=True))
        rule = self._pattern.head_offsets
        if shard is None:
            out, _ = dilated(q, k, v, lengths, rates, rule, first_head, total_heads, causal, scale)
        else:
            out = dilated_sharded.attend(
                q, k, v, shard, self._pattern.branches, rule, first_head, total_heads, causal, scale
            )
        return out if key_padding_mask is None else padding.reveal(out, key_padding_mask)

    def extra_repr(self) -> str:
        return f"branches={self._pattern.branches}, head_offsets={self._pattern.head_offsets!r}"


@torch.library.custom_op("longnet_kit::dilated", mutates_args=())
def dilated(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_offsets: str,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Dilated attention of all branches and the log of the mixed softmax's denominators.

    Args:
        q, k, v: (B, N, H, D), heads first_head to first_head + H - 1 of total_heads.

    Returns:
        out: (B, N, H, D), of q's dtype, 0 where no branch keeps the position. lse: (B, N, H), -inf there; float32
        (float64 for float64).
    """
    q, k, v = (unit_stride(x) for x in (q, k, v))
    mixture = Mixture(q, covered=1 in dilation_rates)
    for views in _dense_first(q, segment_lengths, dilation_rates, head_offsets, first_head, total_heads):
        mixture.attend(views, q, k, v, causal, scale)
    return mixture.out.to(q.dtype), mixture.lse


@torch.library.custom_op("longnet_kit::dilated_backward", mutates_args=())
def dilated_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: list[int],
    dilation_rates: list[int],
    head_offsets: str,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, (B, N, H, D) each, from the saved tensors of `dilated`."""
    q, k, v, grad_out = (unit_stride(x) for x in (q, k, v, grad_out))
    grads = Gradients(q, covered=1 in dilation_rates)
    for views in _dense_first(q, segment_lengths, dilation_rates, head_offsets, first_head, total_heads):
        grads.add(views, grad_out, q, k, v, out, lse, causal, scale)
    return grads.take(q.dtype)


def _dense_first(
    q: Tensor, lengths: list[int], rates: list[int], head_offsets: str, first_head: int, total_heads: int
) -> Iterator[tuple[View, ...]]:
    """The views of each branch, a branch of rate 1 first: it reaches every position, so it writes and others add."""
    _, seq_len, heads, _ = q.shape
    for w, r in sorted(zip(lengths, rates, strict=True), key=lambda branch: branch[1]):
        yield branch_views(seq_len, w, r, head_offsets, first_head, heads, total_heads)  # type: ignore[arg-type]


@dilated.register_fake
def _(q: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1], dtype=exact(q))


@dilated_backward.register_fake
def _(grad_out: Tensor, q: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_out: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    grads = dilated_backward(grad_out, *ctx.saved_tensors, *ctx.settings)
    return (*grads, *(None for _ in ctx.settings))


dilated.register_autograd(_backward, setup_context=_save)


@register_flop_formula(torch.ops.longnet_kit.dilated)
def _forward_flops(q_shape: Sequence[int], k_shape: Any, v_shape: Any, *settings: Any, **_: Any) -> int:
    lengths, rates, head_offsets, first_head, total_heads, causal, _ = settings
    batch, seq_len, heads, head_dim = q_shape
    views = (
        view
        for w, r in zip(lengths, rates, strict=True)
        for view in branch_views(seq_len, w, r, head_offsets, first_head, heads, total_heads)
    )
    pairs = sum(v.segments * v.heads * patterns.square(v.kept, causal) for v in views)
    return 4 * batch * head_dim * pairs


@register_flop_formula(torch.ops.longnet_kit.dilated_backward)
def _backward_flops(grad_shape: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *settings: Any, **_: Any) -> int:
    return 5 * _forward_flops(q, k, v, *settings) // 2  # five matrix products against two
