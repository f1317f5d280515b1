"""The kept positions of a dilated branch as strided views, so that nothing is gathered or scattered.

In a segment, head h keeps positions o(h), o(h) + r, ...: a step of r along the sequence. Heads of equal offset, and
heads of consecutive offsets (on a diagonal: one position further per head), share one view, whichever makes fewer.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

from torch import Tensor

from longnet_kit.attention.patterns import HeadOffsets, head_offset


class View(NamedTuple):
    """Some heads' kept positions in equally long segments of one branch."""

    start: int
    """Position of the first head's first kept token."""
    segments: int
    segment_stride: int
    """Positions from one segment to the next."""
    first_head: int
    heads: int
    head_step: int
    """Heads from one of the view's heads to the next."""
    head_shift: int
    """Positions from one of the view's heads to the next: 0, or 1 on a diagonal."""
    kept: int
    """Kept positions per segment and head."""
    rate: int
    """Positions from one kept token to the next."""

    @property
    def head_slice(self) -> slice:
        """The view's heads in the tensor's dimension of heads."""
        return slice(self.first_head, self.first_head + self.heads * self.head_step, self.head_step)

    def covers(self, x: Tensor) -> bool:
        """Whether the view is all of the tensor, (B, N, H, ...), cut into segments."""
        tiled = self.segments == 1 or self.segment_stride == self.kept
        return self.rate == 1 and self.heads == x.shape[2] and tiled and self.segments * self.kept == x.shape[1]

    def calls(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """The view of each tensor, (B, N, H, ...) to (B', heads, kept, ...), as few times as their strides allow.

        Batch and segments fold into one dimension where the strides let them; else one of the two is looped over.
        """
        strided = [self.strided(x) for x in tensors]  # (B, segments, heads, kept, ...)
        batch = tensors[0].shape[0]
        if batch == 1:
            yield tuple(x[0] for x in strided)
        elif self.segments == 1:
            yield tuple(x[:, 0] for x in strided)
        elif all(x.stride(0) == self.segments * x.stride(1) for x in strided):
            yield tuple(x.flatten(0, 1) for x in strided)
        elif self.segments < batch:
            yield from (tuple(x[:, s] for x in strided) for s in range(self.segments))
        else:
            yield from (tuple(x[b] for x in strided) for b in range(batch))

    def strided(self, x: Tensor) -> Tensor:
        batch_stride, seq_stride, head_stride, *rest = x.stride()
        return x.as_strided(
            (x.shape[0], self.segments, self.heads, self.kept, *x.shape[3:]),
            (
                batch_stride,
                self.segment_stride * seq_stride,
                self.head_step * head_stride + self.head_shift * seq_stride,
                self.rate * seq_stride,
                *rest,
            ),
            x.storage_offset() + self.start * seq_stride + self.first_head * head_stride,
        )


class Part(NamedTuple):
    """A run of positions of a segment."""

    tokens: int
    first: int
    """Position in the segment of its first token."""
    segment: int
    """Length of the segment."""


class PartView(NamedTuple):
    """Some heads' kept positions in a part of a segment, and how many each of them keeps elsewhere in the segment."""

    view: View
    before: int
    after: int


@lru_cache(maxsize=256)
def branch_views(
    seq_len: int, w: int, r: int, head_offsets: HeadOffsets, first_head: int, heads: int, total_heads: int
) -> tuple[View, ...]:
    """Views that together hold every kept (position, head) of branch (w, r) exactly once.

    Args:
        seq_len: N.
        head_offsets: the rule of o(h, r), see `patterns.Dilated`.
        first_head, heads, total_heads: the tensors hold heads first_head to first_head + heads - 1 of total_heads.
    """
    full, tail = divmod(seq_len, w)
    rule = r, head_offsets, first_head, heads, total_heads
    views = [view for view, *_ in _segment_views(0, full, w, Part(w, 0, w), *rule)] if full else []
    if tail:
        views += [view for view, *_ in _segment_views(full * w, 1, w, Part(tail, 0, tail), *rule)]
    return tuple(views)


@lru_cache(maxsize=256)
def part_views(
    part: Part, r: int, head_offsets: HeadOffsets, first_head: int, heads: int, total_heads: int
) -> tuple[PartView, ...]:
    """Views, into a tensor that holds just one part of a segment, of what a branch of rate r keeps there."""
    return tuple(_segment_views(0, 1, part.tokens, part, r, head_offsets, first_head, heads, total_heads))


class ChunkViews(NamedTuple):
    """Views into a chunk of a stream that starts and ends anywhere in a branch's segments."""

    opened: tuple[PartView, ...]
    """Of the segment that began before the chunk."""
    begun: tuple[View, ...]
    """Of the segments that begin in the chunk."""
    last: tuple[PartView, ...]
    """Of the segment that goes on after the chunk, which is one of those; nothing where one ends with the chunk."""


@lru_cache(maxsize=256)  # all layers of a network ask for the same
def chunk_views(
    tokens: int, first: int, w: int, r: int, head_offsets: HeadOffsets, first_head: int, heads: int, total_heads: int
) -> ChunkViews:
    """Views that together hold every kept (position, head) of branch (w, r) in a chunk exactly once.

    Args:
        tokens: in the chunk.
        first: position in its segment of the first of them.
        head_offsets, first_head, heads, total_heads: as of `branch_views`.
    """
    rule = r, head_offsets, first_head, heads, total_heads
    rest_of_segment = min(tokens, w - first) if first else 0
    full, tail = divmod(tokens - rest_of_segment, w)
    opened = last = part_views(Part(rest_of_segment, first, w), *rule) if rest_of_segment else ()
    begun = _segment_views(rest_of_segment, full, w, Part(w, 0, w), *rule) if full else []
    if tail:
        last = tuple(_segment_views(tokens - tail, 1, w, Part(tail, 0, w), *rule))
        begun = [*begun, *last]
    elif first + rest_of_segment == w:
        last = ()
    return ChunkViews(opened, tuple(view for view, *_ in begun), last)


def kept_before(length: int, offset: int, r: int) -> int:
    """How many of the first `length` positions of a segment a head of offset `offset` keeps."""
    return max(0, -(-(length - offset) // r))


def _segment_views(
    start: int,
    segments: int,
    stride: int,
    part: Part,
    r: int,
    head_offsets: HeadOffsets,
    first_head: int,
    heads: int,
    total_heads: int,
) -> list[PartView]:
    """Views of the same part of equally long segments, and how many tokens each head keeps before and after it."""
    aligned_key: dict[int, tuple[int, ...]] = {}
    slanted_key: dict[int, tuple[int, ...]] = {}
    starts: dict[int, int] = {}
    counts: dict[int, tuple[int, int, int]] = {}
    for h in range(first_head, first_head + heads):
        offset = head_offset(h, r, total_heads, head_offsets)
        ends = part.first, part.first + part.tokens, part.segment
        until, through, whole = (kept_before(end, offset, r) for end in ends)
        if through == until:
            continue
        starts[h] = offset + until * r - part.first
        counts[h] = through - until, until, whole - through
        # Heads on one diagonal are equally far apart, and each starts one position after the one before it.
        turn = h % -(-total_heads // r) if head_offsets == "grouped" else h - offset
        aligned_key[h] = offset, *counts[h]
        slanted_key[h] = turn, until, *counts[h]
    aligned, slanted = (_runs(list(starts), key) for key in (aligned_key, slanted_key))
    runs, shift = (aligned, 0) if len(aligned) <= len(slanted) else (slanted, 1)
    return [
        PartView(
            View(
                start=start + starts[run[0]],
                segments=segments,
                segment_stride=stride,
                first_head=run[0] - first_head,
                heads=len(run),
                head_step=run[1] - run[0] if len(run) > 1 else 1,
                head_shift=shift,
                kept=counts[run[0]][0],
                rate=r,
            ),
            counts[run[0]][1],
            counts[run[0]][2],
        )
        for run in runs
    ]


def _runs(heads: list[int], key: dict[int, tuple[int, ...]]) -> list[list[int]]:
    """Heads of equal key together, in order; in every such run the heads are equally far apart."""
    ordered = sorted(heads, key=lambda h: (key[h], h))
    return [list(run) for _, run in groupby(ordered, key=lambda h: key[h])]
