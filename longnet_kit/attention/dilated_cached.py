"""Dilated attention over a stream: a cache of fixed size, however long the past.

What comes next sees, of a causal branch (w, r), only what its own segment keeps. So the cache holds per head and branch
the kept keys and values of the segment that is open now, ceil(w / r) at most. A chunk is cut where segments end: its
first part sees what the cache holds and itself, the segments that begin in it see themselves, and of the last one, if
it is open still, the kept keys and values take the place of those before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from longnet_kit.attention import flash
from longnet_kit.attention.cache import Cache
from longnet_kit.attention.mixture import Mixture, unit_stride
from longnet_kit.attention.patterns import HeadOffsets
from longnet_kit.attention.views import Part, PartView, chunk_views, part_views
from longnet_kit.errors import UserError


class _Branch(NamedTuple):
    """A branch and its place among the entries."""

    w: int
    r: int
    entries: slice
    index: int
    """Among the branches as they were given."""


class DilatedCache(Cache):
    """Kept keys and values of each branch's open segment; all memory is allocated here, once.

    Args:
        batch_size, heads, head_dim, dtype, device: see `Cache`.
        branches: (w, r) each.
    """

    entries: Tensor
    """(2, B, H, sum of ceil(w / r), D): keys and values."""
    branches: list[_Branch]
    """By dilation rate."""

    def __init__(
        self, batch_size: int, heads: int, head_dim: int, *, branches: Sequence[tuple[int, int]], **factory: Any
    ) -> None:
        super().__init__(batch_size, heads, head_dim, **factory)
        self.branches, total = [], 0
        for i, (w, r) in sorted(enumerate(branches), key=lambda branch: branch[1][1]):
            self.branches.append(_Branch(w, r, slice(total, total := total + -(-w // r)), i))
        self.entries = self.space(2, batch_size, heads, total, head_dim)

    @property
    def nbytes(self) -> int:
        return self.entries.nbytes

    def state_dict(self) -> dict[str, Any]:
        return {"position": self.position, "entries": self.entries.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        entries = state["entries"]
        if entries.shape != self.entries.shape or entries.dtype != self.dtype:
            raise UserError(
                f"the saved keys and values are {entries.dtype} of shape {tuple(entries.shape)}, expected {self.dtype} "
                f"of {tuple(self.entries.shape)}; their branches are others"
            )
        self.entries.copy_(entries)
        self.position = int(state["position"])


def attend(q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache, head_offsets: HeadOffsets, scale: float) -> Tensor:
    """Dilated attention of a stream's next tokens to themselves and the past; the cache moves on.

    Args:
        q, k, v: (B, n, H, D), all heads of the layer.

    Returns:
        (B, n, H, D), of q's dtype; 0 where no branch keeps the position.
    """
    q, k, v = (unit_stride(x) for x in (q, k, v))
    tokens = q.shape[1]
    mixture = Mixture(q, covered=tokens > 1 and cache.branches[0].r == 1)
    for branch in cache.branches:
        _attend_branch(mixture, q, k, v, cache, branch, head_offsets, scale)
    cache.position += tokens
    return mixture.out.to(q.dtype)


def attend_each(
    q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache, head_offsets: HeadOffsets, scale: float
) -> list[Tensor]:
    """As `attend`, of each branch by itself, in the order in which the cache was given them."""
    q, k, v = (unit_stride(x) for x in (q, k, v))
    tokens, outs = q.shape[1], {}
    for branch in cache.branches:
        mixture = Mixture(q, covered=tokens > 1 and branch.r == 1)
        _attend_branch(mixture, q, k, v, cache, branch, head_offsets, scale)
        outs[branch.index] = mixture.out.to(q.dtype)
    cache.position += tokens
    return [outs[i] for i in range(len(outs))]


def _attend_branch(
    mixture: Mixture, q: Tensor, k: Tensor, v: Tensor, cache: DilatedCache, branch: _Branch, head_offsets: HeadOffsets,
    scale: float,
) -> None:  # fmt: skip
    """Mix in a branch, and note what the next tokens will see of it."""
    _, tokens, heads, _ = q.shape
    w, r = branch.w, branch.r
    entries = cache.entries[:, :, :, branch.entries]  # (2, B, H, ceil(w / r), D)
    rule = r, head_offsets, 0, heads, heads
    first = cache.position % w
    if tokens == 1:
        _attend_one(mixture, q, k, v, entries, part_views(Part(1, first, w), *rule), scale)
        return
    opened, begun, last = chunk_views(tokens, first, w, *rule)
    mixture.attend((*(view for view, *_ in opened), *begun), q, k, v, True, scale)
    for view, before, _ in opened:
        if before:
            keys, values = entries[:, :, view.head_slice, :before]
            ((q_, out, lse),) = view.calls(q, mixture.out, mixture.lse)
            mixture.add(out, lse, *flash.forward(q_, keys, values, False, scale))
    for part in last:
        _keep(part, k, v, entries)


def _attend_one(
    mixture: Mixture, q: Tensor, k: Tensor, v: Tensor, entries: Tensor, parts: Sequence[PartView], scale: float
) -> None:
    """Mix in a branch where there is one token: it is kept first, and then sees what is kept."""
    for part in parts:
        _keep(part, k, v, entries)
        keys, values = entries[:, :, part.view.head_slice, : part.before + 1]
        ((q_, out, lse),) = part.view.calls(q, mixture.out, mixture.lse)
        mixture.add(out, lse, *flash.forward(q_, keys, values, False, scale))


def _keep(part: PartView, k: Tensor, v: Tensor, entries: Tensor) -> None:
    """Put a view's keys and values, (B, n, H, D) each, behind those that its segment has kept before."""
    view, before, _ = part
    kept = entries[:, :, view.head_slice, before : before + view.kept]  # (2, B, heads, kept, D)
    ((k_, v_),) = view.calls(k, v)
    kept[0] = k_
    kept[1] = v_
