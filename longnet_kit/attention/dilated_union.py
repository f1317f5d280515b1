"""Dilated attention in which a key counts once, however many branches show it: an ablation of LongNet's mixture.

Branches come one after the other, the densest first. To each of them, what earlier ones have shown is hidden: the two
positions stand in one segment of the earlier branch, which keeps both. So every visible key is in one branch's softmax,
and these are mixed by their denominators as ever, forward and backward. The first branch hides nothing and takes the
fast kernels. The others have their scores computed, all of them, by plain matrix products with a mask, a bounded number
at a time: time grows as that of LongNet does, memory with the length alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longnet_kit.attention import patterns
from longnet_kit.attention.backend import Support
from longnet_kit.attention.dilated_cached import DilatedCache
from longnet_kit.attention.dilated_mixing import Call, Combination
from longnet_kit.attention.dilated_op import backward_flops, forward_flops, make_differentiable
from longnet_kit.attention.inputs import exactly, nearest_divisor
from longnet_kit.attention.mixture import Gradients, Mixture, exact, unit_stride
from longnet_kit.attention.sharding import SequenceShard, to_heads, to_sequence, whole_sequence
from longnet_kit.attention.views import View, branch_views
from longnet_kit.errors import UserError

_MAX_SCORES = 2**20
"""How many scores with a mask are held at a time, about."""
_QUERIES = 256
"""Of a segment's queries so many are taken at a time."""


class Union(Combination):
    """One softmax over the set of keys that the branches show."""

    logits = None

    def whole(self, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
        out, _ = dilated_union(q, k, v, *call.settings)
        return out

    def sharded(self, q: Tensor, k: Tensor, v: Tensor, shard: SequenceShard, call: Call) -> Tensor:
        """Ranks trade the sequence for heads and back, so that each has all positions of some."""
        first_head = call.first_head + shard.rank * (q.shape[2] // shard.size)
        q, k, v = to_heads(torch.stack((q, k, v)), shard).unbind(0)  # (B, N, H / P, D) each
        return to_sequence(self.whole(q, k, v, call._replace(first_head=first_head)), shard)

    def cached(self, q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache, call: Call) -> Tensor:
        raise UserError(_NO_CACHE)

    def new_cache(
        self, batch_size: int, heads: int, head_dim: int, branches: Sequence[tuple[int, int]], **factory: Any
    ) -> DilatedCache:
        raise UserError(_NO_CACHE)

    def supports_shards(self, branches: Sequence[tuple[int, int]], seq_len: int, shards: int, heads: int) -> Support:
        if heads % shards == 0:
            return Support(True)
        return Support(
            False,
            f"{heads} heads do not divide among {shards} ranks, and overlap: set trains sequence-parallel with a part "
            f"of the heads on each rank; use a sequence_parallel_size of {nearest_divisor(heads, shards)}, "
            f"{-(-heads // shards) * shards} heads, or overlap: multiset, which keeps all heads on every rank",
        )

    def branch_lse(self, q: Tensor, k: Tensor, call: Call) -> Tensor:
        lse = q.new_full((len(call.branches), *q.shape[:-1]), -torch.inf, dtype=exact(q))
        for i, views, earlier in _in_turn(q, *call.settings[:-2]):
            if not earlier:
                mixture = Mixture(q, covered=False)
                mixture.attend(views, q, k, k, call.causal, call.scale)
                lse[i] = mixture.lse
            for piece in _pieces(views if earlier else (), earlier, call.causal, [q, lse[i]], [k]):
                (q_, lse_), (k_,), hidden = piece
                lse_.copy_(_forward(q_, k_, k_, hidden, call.scale)[1])
        return lse

    def branch_lse_sharded(self, q: Tensor, k: Tensor, shard: SequenceShard, call: Call) -> Tensor:
        first, tokens = shard.first_position(q.shape[1]), q.shape[1]
        whole = self.branch_lse(whole_sequence(q, shard), whole_sequence(k, shard), call)
        return whole[:, :, first : first + tokens]


_NO_CACHE = (
    "overlap: set has no cache, so it can neither stream nor generate: which keys a branch adds depends on all that "
    "denser ones show; run whole sequences, or build the network with overlap: multiset"
)


@torch.library.custom_op("longnet_kit::dilated_union", mutates_args=())
def dilated_union(
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
    """Dilated attention to the set of keys of all branches, and the log of its denominators; as `dilated` has them."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    mixture = Mixture(q, covered=1 in dilation_rates)
    for _, views, earlier in _in_turn(q, segment_lengths, dilation_rates, head_offsets, first_head, total_heads):
        if not earlier:
            mixture.attend(views, q, k, v, causal, scale)
            continue
        for piece in _pieces(views, earlier, causal, [q, mixture.out, mixture.lse], [k, v]):
            (q_, out, lse), (k_, v_), hidden = piece
            mixture.add(out, lse, *_forward(q_, k_, v_, hidden, scale))
    return mixture.out.to(q.dtype), mixture.lse


@torch.library.custom_op("longnet_kit::dilated_union_backward", mutates_args=())
def dilated_union_backward(
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
    """Gradients of q, k and v, (B, N, H, D) each, from the saved tensors of `dilated_union`."""
    q, k, v, grad_out = (unit_stride(x) for x in (q, k, v, grad_out))
    grads = Gradients(q, covered=1 in dilation_rates)
    for _, views, earlier in _in_turn(q, segment_lengths, dilation_rates, head_offsets, first_head, total_heads):
        if not earlier:
            grads.add(views, grad_out, q, k, v, out, lse, causal, scale)
            continue
        of_queries, of_keys = [grad_out, q, out, lse, grads.dq], [k, v, grads.dk, grads.dv]
        for piece in _pieces(views, earlier, causal, of_queries, of_keys):
            (grad_out_, q_, out_, lse_, dq), (k_, v_, dk, dv), hidden = piece
            parts = _backward(grad_out_, q_, k_, v_, out_, lse_, hidden, scale)
            for total, part in zip((dq, dk, dv), parts, strict=True):
                total.add_(part)
    return grads.take(q.dtype)


def _in_turn(
    q: Tensor, lengths: list[int], rates: list[int], head_offsets: str, first_head: int, total_heads: int
) -> Iterator[tuple[int, tuple[View, ...], list[Tensor]]]:
    """Each branch's index, its views, and of every earlier branch the segments of kept positions, (1, N, H), else -1.

    The densest first. One that comes again has nothing to add and is left out.
    """
    _, seq_len, heads, _ = q.shape
    branches = list(zip(lengths, rates, strict=True))
    position = torch.arange(seq_len, device=q.device, dtype=torch.int32)
    kept = patterns.kept(branches, head_offsets, position, first_head, heads, total_heads)  # type: ignore[arg-type]
    done: set[tuple[int, int]] = set()
    earlier: list[Tensor] = []
    for i in patterns.densest_first(branches):
        if branches[i] in done:
            continue
        w, r = branches[i]
        yield i, branch_views(seq_len, w, r, head_offsets, first_head, heads, total_heads), earlier  # type: ignore[arg-type]
        done.add(branches[i])
        earlier.append(torch.where(kept[i], (position // w)[:, None], -1)[None])


class _Piece(NamedTuple):
    """Some queries of some segments and heads, and the keys that they may see."""

    of_queries: list[Tensor]
    """(B, segments, heads, n, ...) each."""
    of_keys: list[Tensor]
    """(B, segments, heads, m, ...) each."""
    hidden: Tensor
    """(segments, heads, n, m) bool."""


def _pieces(
    views: Sequence[View], earlier: Sequence[Tensor], causal: bool, of_queries: list[Tensor], of_keys: list[Tensor]
) -> Iterator[_Piece]:
    """Views of tensors, (B, N, H, ...), in pieces that have a bounded number of scores."""
    batch = of_queries[0].shape[0]
    for view in views:
        queries, keys = ([view.strided(x) for x in tensors] for tensors in (of_queries, of_keys))
        marks = [view.strided(x)[0] for x in earlier]  # (segments, heads, kept)
        n = min(view.kept, _QUERIES)
        together = max(1, _MAX_SCORES // (batch * n * view.kept))
        heads = min(view.heads, together)
        for at in _blocks((view.segments, together // heads), (view.heads, heads)):
            for first in range(0, view.kept, n):
                last = min(first + n, view.kept)
                m = last if causal else view.kept
                yield _Piece(
                    [x[:, *at, first:last] for x in queries],
                    [x[:, *at, :m] for x in keys],
                    _hidden([x[*at, :m] for x in marks], first, last, causal),
                )


def _blocks(*dims: tuple[int, int]) -> Iterator[tuple[slice, slice]]:
    """Slices of two dimensions, of (size, step) each."""
    (rows, row_step), (columns, column_step) = dims
    for row in range(0, rows, row_step):
        for column in range(0, columns, column_step):
            yield slice(row, row + row_step), slice(column, column + column_step)


def _hidden(marks: Sequence[Tensor], first: int, last: int, causal: bool) -> Tensor:
    """Which keys queries `first` to `last` - 1 of a segment do not see here, or have seen in an earlier branch.

    Args:
        marks: (segments, heads, m) of each earlier branch: equal for two positions that see each other, -1 for none.

    Returns:
        (segments, heads, n, m) bool.
    """
    m = marks[0].shape[-1]
    hidden = torch.zeros(*marks[0].shape[:2], last - first, m, dtype=torch.bool, device=marks[0].device)
    if causal:
        query, key = (torch.arange(*ends, device=hidden.device) for ends in ((first, last), (0, m)))
        hidden |= key > query[:, None]
    for mark in marks:
        of_queries = torch.where(mark == -1, -2, mark)[..., first:last, None]
        hidden |= of_queries == mark.unsqueeze(-2)
    return hidden


@exactly
def _forward(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attention to the keys that are not hidden and the log of its denominators; 0 and -inf where all are.

    Args:
        q: (B, segments, heads, n, D).
        k, v: (B, segments, heads, m, D).
    """
    p = _scores(q, k, hidden, scale)
    largest = p.amax(-1, keepdim=True)
    largest.masked_fill_(largest == -torch.inf, 0)
    total = p.sub_(largest).exp_().sum(-1, keepdim=True)
    out = (p @ v.to(p.dtype)) / torch.where(total == 0, 1, total)
    return out, (total.log() + largest).squeeze(-1)


@exactly
def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, hidden: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients through the keys that are not hidden, under the `out` and `lse` of the whole softmax."""
    p = _scores(q, k, hidden, scale).sub_(lse.unsqueeze(-1)).exp_()
    q, k, v, out, grad_out = (x.to(p.dtype) for x in (q, k, v, out, grad_out))
    dv = p.transpose(-1, -2) @ grad_out
    ds = (grad_out @ v.transpose(-1, -2)).sub_((grad_out * out).sum(-1, keepdim=True)).mul_(p).mul_(scale)
    return ds @ k, ds.transpose(-1, -2) @ q, dv


def _scores(q: Tensor, k: Tensor, hidden: Tensor, scale: float) -> Tensor:
    """(B, segments, heads, n, m), at least float32, -inf where hidden."""
    scores = (q.to(exact(q)) * scale) @ k.to(exact(k)).transpose(-1, -2)
    return scores.masked_fill_(hidden, -torch.inf)


make_differentiable(dilated_union, dilated_union_backward)
register_flop_formula(torch.ops.longnet_kit.dilated_union)(forward_flops)
register_flop_formula(torch.ops.longnet_kit.dilated_union_backward)(backward_flops)
