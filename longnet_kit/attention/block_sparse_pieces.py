"""Takes a block-sparse pattern apart into pieces that a kernel with block-diagonal biases can run.

Plain ranges; no tensors.

In a piece every query and every key is in at most one segment, and a segment's queries see all of its keys (in a causal
piece, those up to their own). The pieces show each visible pair of positions exactly once. Staircases of blocks, which
no block-diagonal bias describes, fall into rectangles: log2 many pieces of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from longnet_kit.attention.patterns import BlockSparse


class Segment(NamedTuple):
    """Queries that see all of these keys; positions in one sequence."""

    queries: range
    keys: list[range]


class Piece(NamedTuple):
    """Disjoint segments. `causal`: the last query of a segment sees all keys, each one before it one key less."""

    segments: list[Segment]
    causal: bool


def pieces(pattern: BlockSparse, seq_len: int, causal: bool) -> list[Piece]:
    """Take a pattern apart: each visible pair of positions is in exactly one piece."""
    split = _fixed if pattern.layout == "fixed" else _local
    whole = [
        Piece([Segment(queries, [keys for keys in ranges if keys]) for queries, ranges in piece.segments], piece.causal)
        for piece in split(pattern, seq_len, causal)
    ]
    kept = [Piece([s for s in piece.segments if s.queries and s.keys], piece.causal) for piece in whole]
    return [piece for piece in kept if piece.segments]


def _fixed(pattern: BlockSparse, seq_len: int, causal: bool) -> Iterator[Piece]:
    width = pattern.local_blocks * pattern.block_size
    detail = width - pattern.summary_blocks * pattern.block_size  # a window's tokens before its summary
    starts = range(0, seq_len, width)

    def within(first: int, last: int) -> range:
        return range(first, min(last, seq_len))

    if not causal:
        yield Piece([Segment(within(0, seq_len), [within(s + detail, s + width) for s in starts])], False)
        yield Piece([Segment(within(s, s + width), [within(s, s + detail)]) for s in starts], False)
        return
    yield Piece([Segment(within(s, s + width), [within(s, s + width)]) for s in starts], True)
    for level in staircase(len(starts)):
        yield Piece(
            [
                Segment(
                    within(later.start * width, later.stop * width),
                    [within(i * width + detail, (i + 1) * width) for i in earlier],
                )
                for earlier, later in level
            ],
            False,
        )


def _local(pattern: BlockSparse, seq_len: int, causal: bool) -> Iterator[Piece]:
    """Groups of `local_blocks` blocks.

    A block sees its own group, of the previous one the blocks whose place in the group is after its own, and of the
    next one (unless causal) those whose place is before.
    """
    size, width = pattern.block_size, pattern.local_blocks * pattern.block_size
    groups = range(0, seq_len, width)

    def within(group: int, places: range) -> range:
        return range(group + places.start * size, min(group + places.stop * size, seq_len))

    everything = range(pattern.local_blocks)
    yield Piece([Segment(within(g, everything), [within(g, everything)]) for g in groups], causal)
    for level in staircase(pattern.local_blocks):
        back = [Segment(within(g, low), [within(g - width, high)]) for g in groups[1:] for low, high in level]
        ahead = [Segment(within(g, high), [within(g + width, low)]) for g in groups[:-1] for low, high in level]
        yield Piece(back if causal else back + ahead, False)


def staircase(count: int) -> Iterator[list[tuple[range, range]]]:
    """Every pair i < j below `count`, once, as rectangles (range of i, range of j), disjoint within each level.

    A pair is at the level of the highest bit in which i and j differ.
    """
    size = 1
    while size < count:
        yield [
            (range(low, low + size), range(low + size, min(low + 2 * size, count)))
            for low in range(0, count - size, 2 * size)
        ]
        size *= 2
