"""Dilated attention from a shard of the sequence: short segments locally, long ones by exchanging kept keys and values.

A segment that spans several shards is cut at their borders. Its own part costs no transfer; the kept keys and values of
the other parts are all-gathered inside the group of ranks that share the segment, and each part's softmax is mixed into
the running one as branches are. Transfers start before the local work and are waited for after it. Backward sends the
gradients of the foreign keys and values home by a reduce-scatter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longnet_kit.attention import derivatives, flash
from longnet_kit.attention.backend import Support
from longnet_kit.attention.inputs import divisors
from longnet_kit.attention.mixture import Gradients, Mixture, unit_stride
from longnet_kit.attention.patterns import HeadOffsets, head_offset
from longnet_kit.attention.sharding import SequenceShard
from longnet_kit.attention.views import Part, PartView, View, branch_views, part_views


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    shard: SequenceShard,
    branches: Sequence[tuple[int, int]],
    head_offsets: HeadOffsets,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """Dilated attention of this rank's tokens to the whole sequence.

    Args:
        q, k, v: (B, n, H, D), heads first_head to first_head + H - 1 of total_heads.
        branches: (w, r) each, such that `supports` says yes.

    Returns:
        (B, n, H, D), of q's dtype; 0 where no branch keeps the position.
    """
    layout = _Layout(shard, q.shape[1], q.shape[2], head_offsets, first_head, total_heads)
    # A branch of rate 1 first: it reaches every position, so it writes and the others are mixed in.
    ordered = [layout.branch(w, r) for w, r in sorted(branches, key=lambda branch: branch[1])]
    return _Attend.apply(q, k, v, ordered, causal, scale)  # type: ignore[return-value]


def branch_lse(
    q: Tensor,
    k: Tensor,
    shard: SequenceShard,
    branches: Sequence[tuple[int, int]],
    head_offsets: HeadOffsets,
    first_head: int,
    total_heads: int,
    causal: bool,
    scale: float,
) -> Tensor:
    """The log of each branch's softmax denominators over the whole sequence, for this rank's tokens.

    Args:
        As of `attend`; q and k with elements of a head side by side.

    Returns:
        (branches, B, n, H), in the given order; -inf where a branch does not keep the position.
    """
    layout = _Layout(shard, q.shape[1], q.shape[2], head_offsets, first_head, total_heads)
    found = []
    for branch in (layout.branch(w, r) for w, r in branches):
        mixture = Mixture(q, covered=branch.r == 1)
        mixture.attend(branch.views, q, k, k, causal, scale)
        if isinstance(branch, _Spanning):
            branch.attend(mixture, q, branch.group.all_gather(branch.pack(k, k))(), causal, scale)
        found.append(mixture.lse)
    return torch.stack(found)


def supports(branches: Sequence[tuple[int, int]], seq_len: int, shards: int) -> Support:
    """Whether every segment tiles a shard or spans whole shards; if not, the reason names sizes that do."""
    n = seq_len // shards
    for w, _ in branches:
        if w <= n and n % w or n < w < seq_len and w % n:
            spanning = {min(max(2, i), shards) for i in (w // n, w // n + 1)} if shards > 1 else set()
            fitting = [*divisors(n), *(n * i for i in sorted(spanning))]
            near = min(fitting, key=lambda length: abs(length - w))
            longer = -(-n // w) * w * shards
            return Support(
                False,
                f"a segment of {w:,} tokens neither tiles a shard of {n:,} (a sequence of {seq_len:,} on {shards} "
                f"ranks) nor spans whole shards; use a segment length of {near:,}, or a sequence of {longer:,}",
            )
    return Support(True)


class _Layout(NamedTuple):
    """Where this rank's tokens and heads stand."""

    shard: SequenceShard
    tokens: int
    heads: int
    head_offsets: HeadOffsets
    first_head: int
    total_heads: int

    def branch(self, w: int, r: int) -> _Local | _Spanning:
        """A branch (w, r) as this rank sees it."""
        n, rule = self.tokens, (r, self.head_offsets, self.first_head, self.heads, self.total_heads)
        if w <= n:
            return _Local(r, branch_views(n, w, *rule))
        group = self.shard.subgroup(min(-(-w // n), self.shard.size))
        part = Part(n, group.rank * n, group.size * n)
        return _Spanning(r, group, part, part_views(part, *rule), self)


class _Local(NamedTuple):
    """A branch whose segments tile the shard."""

    r: int
    views: tuple[View, ...]


class _Spanning(NamedTuple):
    """A branch whose segments span several shards, seen from this rank's part of its segment."""

    r: int
    group: SequenceShard
    part: Part
    parts: tuple[PartView, ...]
    layout: _Layout

    @property
    def views(self) -> tuple[View, ...]:
        """What is kept in the part, as if the segment ended there: it needs no transfer."""
        return tuple(view for view, *_ in self.parts)

    @property
    def slots(self) -> int:
        """Kept tokens that each rank sends per head; where r does not divide the shard, some have one less to send."""
        return -(-self.part.tokens // self.r)

    def pack(self, k: Tensor, v: Tensor) -> Tensor:
        """The kept keys and values: (slots, 2, B, H, D). Slots that a head does not fill are never read."""
        batch, _, heads, head_dim = k.shape
        packed = k.new_empty(self.slots, 2, batch, heads, head_dim)
        for view in self.views:
            ((k_, v_),) = view.calls(k, v)  # (B, heads, kept, D)
            packed[: view.kept, 0, :, view.head_slice] = k_.permute(2, 0, 1, 3)
            packed[: view.kept, 1, :, view.head_slice] = v_.permute(2, 0, 1, 3)
        return packed

    def unpack(self, packed: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Add what `pack` laid out to the places it came from."""
        for view in self.views:
            ((k_, v_),) = view.calls(dk, dv)
            k_.add_(packed[: view.kept, 0, :, view.head_slice].permute(1, 2, 0, 3))
            v_.add_(packed[: view.kept, 1, :, view.head_slice].permute(1, 2, 0, 3))

    def attend(self, mixture: Mixture, q: Tensor, gathered: Tensor, causal: bool, scale: float) -> None:
        """Mix in what the kept queries see of the other ranks' kept keys; `gathered` is (ranks * slots, 2, B, H, D)."""
        for view, first, last in self._foreign(causal):
            ((out, lse, q_),) = view.calls(mixture.out, mixture.lse, q)
            keys, values = self._entries(gathered, view, first, last)
            mixture.add(out, lse, *flash.forward(q_, keys, values, False, scale))

    def gradients(
        self, dq: Tensor, grad_out: Tensor, q: Tensor, out: Tensor, lse: Tensor, gathered: Tensor, causal: bool,
        scale: float,
    ) -> Tensor:  # fmt: skip
        """Add to dq what `attend` contributes, and return the gradient of `gathered`, at least float32."""
        grad_gathered = torch.zeros_like(gathered, dtype=dq.dtype)
        for view, first, last in self._foreign(causal):
            keys, values = self._entries(gathered, view, first, last)
            ((dq_, dout_, q_, out_, lse_),) = view.calls(dq, grad_out, q, out, lse)
            q_part, *kv_parts = flash.backward(dout_, q_, keys, values, out_, lse_, False, scale)
            dq_.add_(q_part)
            entries = torch.stack([part.permute(2, 0, 1, 3).to(dq.dtype) for part in kv_parts], 1)
            block = grad_gathered[:, :, :, view.head_slice]
            if self._even:
                block[first:last] = entries
            else:
                block.scatter_(0, self._slot_index(view, first, last, entries), entries)
        return grad_gathered

    def _foreign(self, causal: bool) -> Iterator[tuple[View, int, int]]:
        """Each view with a range, in the order of the segment, of kept keys that stand outside the part."""
        for view, before, after in self.parts:
            if before:
                yield view, 0, before
            if after and not causal:
                yield view, before + view.kept, before + view.kept + after

    def _entries(self, gathered: Tensor, view: View, first: int, last: int) -> tuple[Tensor, Tensor]:
        """The view's heads' kept keys and values number `first` to `last` - 1: (B, heads, last - first, D) each."""
        block = gathered[:, :, :, view.head_slice]
        block = block[first:last] if self._even else block.gather(0, self._slot_index(view, first, last, block))
        keys, values = block.permute(1, 2, 3, 0, 4)
        return keys, values

    @property
    def _even(self) -> bool:
        """Whether all heads fill all slots, so that kept tokens stand one after the other."""
        return self.part.tokens % self.r == 0

    def _slot_index(self, view: View, first: int, last: int, like: Tensor) -> Tensor:
        """Where kept tokens stand among the gathered slots, expanded to `like`, (any, 2, B, heads, D), after dim 0."""
        layout, n = self.layout, self.part.tokens
        heads = range(view.first_head, view.first_head + view.heads * view.head_step, view.head_step)
        offsets = torch.tensor(
            [head_offset(layout.first_head + h, self.r, layout.total_heads, layout.head_offsets) for h in heads],
            device=like.device,
        )
        number = torch.arange(first, last, device=like.device)[:, None]
        rank = (offsets + number * self.r) // n
        earlier = -(-(rank * n - offsets) // self.r)  # kept by the ranks before
        index = rank * self.slots + number - earlier.clamp(min=0)  # (last - first, heads)
        return index[:, None, None, :, None].expand(-1, *like.shape[1:])


class _Attend(torch.autograd.Function):
    """Forward and backward over all branches. Saved are q, k, v, out, lse and what was gathered."""

    @staticmethod
    @torch.compiler.disable
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, branches: list[_Local | _Spanning], causal: bool, scale: float
    ) -> Tensor:
        q, k, v = (unit_stride(x) for x in (q, k, v))
        spanning = [b for b in branches if isinstance(b, _Spanning)]
        transfers = [b.group.all_gather(b.pack(k, v)) for b in spanning]
        mixture = Mixture(q, covered=branches[0].r == 1)
        for branch in branches:
            mixture.attend(branch.views, q, k, v, causal, scale)
        gathered = [transfer() for transfer in transfers]
        for branch, entries in zip(spanning, gathered, strict=True):
            branch.attend(mixture, q, entries, causal, scale)
        out = mixture.out.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, mixture.lse, *gathered)
        ctx.settings = branches, causal, scale
        return out

    @staticmethod
    @torch.compiler.disable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        gradients = functools.partial(_gradients, *ctx.settings)
        found = derivatives.once("the attention backend dilated", gradients, grad_out, *ctx.saved_tensors)
        return *found, None, None, None


def _gradients(
    branches: list[_Local | _Spanning], causal: bool, scale: float, grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor,
    out: Tensor, lse: Tensor, *gathered: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of q, k and v through all branches."""
    grad_out = unit_stride(grad_out)
    grads = Gradients(q, covered=False)
    spanning = [b for b in branches if isinstance(b, _Spanning)]
    transfers = [
        branch.group.reduce_scatter(branch.gradients(grads.dq, grad_out, q, out, lse, entries, causal, scale))
        for branch, entries in zip(spanning, gathered, strict=True)
    ]
    for branch in branches:
        grads.add(branch.views, grad_out, q, k, v, out, lse, causal, scale)
    for branch, transfer in zip(spanning, transfers, strict=True):
        branch.unpack(transfer(), grads.dk, grads.dv)
    return grads.take(q.dtype)
