"""What branches show together when a key that several of them show counts once: counted, not computed.

A branch relates positions of a head: those that it keeps in one segment see each other. What two branches both show is
such a relation again, so the union of all is a sum of few of them with signs (inclusion and exclusion).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.int64]


class Relation(NamedTuple):
    """Positions that see each other; what a sparse branch shows takes no more space than it keeps."""

    positions: Numbers
    """Ascending; those that see something."""
    labels: Numbers
    """Of each of them: positions of equal label see each other. They count up from 0, so equal relations are equal."""

    def within(self, branch: tuple[int, int], offset: int) -> Relation:
        """What a branch (w, r) shows too, to a head that keeps residue `offset`."""
        w, r = branch
        kept = self.positions % w % r == offset
        positions, labels = self.positions[kept], self.labels[kept]
        segments = positions // w
        begins = (labels[1:] != labels[:-1]) | (segments[1:] != segments[:-1])
        return Relation(positions, np.concatenate(([0], np.cumsum(begins)))[: len(positions)])


def relation(branch: tuple[int, int], offset: int, seq_len: int) -> Relation:
    """What a branch (w, r) shows to a head that keeps residue `offset`."""
    return Relation(np.arange(seq_len), np.zeros(seq_len, np.int64)).within(branch, offset)


def signed(branches: Sequence[tuple[int, int]], offsets: Sequence[int], seq_len: int) -> list[tuple[Relation, int]]:
    """Relations and their factors, which add up to 1 for every pair that some branch shows to a head, and to 0 else.

    Args:
        offsets: the residue that the head keeps in each branch.
    """
    terms: dict[tuple[bytes, bytes], tuple[Relation, int]] = {}
    for branch, offset in zip(branches, offsets, strict=True):
        # |A + B| = |A| + |B| - |A and B|. Equal relations become one, so that nested branches leave few.
        own = relation(branch, offset, seq_len)
        for both, factor in ((own, 1), *((shown.within(branch, offset), -factor) for shown, factor in terms.values())):
            key = both.positions.tobytes(), both.labels.tobytes()
            _, known = terms.get(key, (both, 0))
            terms[key] = both, known + factor
        terms = {key: term for key, term in terms.items() if term[1]}
    return list(terms.values())


@lru_cache(maxsize=1024)  # every layer of a network asks
def pairs(branches: tuple[tuple[int, int], ...], offsets: tuple[int, ...], seq_len: int, causal: bool) -> int:
    """How many pairs of query and key the branches show to a head, each counted once."""
    total = 0
    for relation, factor in signed(branches, offsets, seq_len):
        kept = np.bincount(relation.labels)
        total += factor * int((kept * (kept + 1) // 2 if causal else kept * kept).sum())
    return total
