"""What branches show together when a key that several of them show counts once: counted, not computed.

A branch relates positions of a head: those that it keeps in one segment see each other. What two branches both show is
such a relation again, so the union of all is a sum of few of them with signs (inclusion and exclusion). A relation is
held as labels, (N,): positions of equal label see each other, -1 is not kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.int64]


def relation(branch: tuple[int, int], offset: int, seq_len: int) -> Labels:
    """The labels of what a branch (w, r) shows to a head that keeps residue `offset`."""
    w, r = branch
    position = np.arange(seq_len)
    return np.where(position % w % r == offset, position // w, -1)


def signed(branches: Sequence[tuple[int, int]], offsets: Sequence[int], seq_len: int) -> list[tuple[Labels, int]]:
    """Relations and their factors, which add up to 1 for every pair that some branch shows to a head, and to 0 else.

    Args:
        offsets: the residue that the head keeps in each branch.
    """
    terms: dict[bytes, tuple[Labels, int]] = {}
    for branch, offset in zip(branches, offsets, strict=True):
        own = relation(branch, offset, seq_len)
        # |A + B| = |A| + |B| - |A and B|. Equal relations become one, so that nested branches leave few.
        further = [(own, 1), *((_both(labels, own), -factor) for labels, factor in terms.values())]
        for labels, factor in further:
            labels = _both(labels, labels)
            key = labels.tobytes()
            _, known = terms.get(key, (labels, 0))
            terms[key] = labels, known + factor
        terms = {key: term for key, term in terms.items() if term[1]}
    return list(terms.values())


@lru_cache(maxsize=1024)  # every layer of a network asks
def pairs(branches: tuple[tuple[int, int], ...], offsets: tuple[int, ...], seq_len: int, causal: bool) -> int:
    """How many pairs of query and key the branches show to a head, each counted once."""
    total = 0
    for labels, factor in signed(branches, offsets, seq_len):
        kept = np.bincount(labels[labels >= 0])
        total += factor * int((kept * (kept + 1) // 2 if causal else kept * kept).sum())
    return total


def _both(a: Labels, b: Labels) -> Labels:
    """What two relations both hold; its labels count up from 0, so that equal relations have equal ones."""
    kept = (a >= 0) & (b >= 0)
    both = np.full_like(a, -1)
    of_a, of_b = a[kept], b[kept]
    if len(of_a):
        begins = (of_a[1:] != of_a[:-1]) | (of_b[1:] != of_b[:-1])
        both[kept] = np.concatenate(([0], np.cumsum(begins)))
    return both
