"""What a picture of a pattern is made of: heads that see the same, and how often keys are seen, cell by cell.

A cell is a square of queries and keys. In pictures of short sequences it is one of each, so that they are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from longnet_kit.attention import unions
from longnet_kit.attention.patterns import Dilated, Pattern

_ENTRIES = 2**22
"""How many entries of a pattern's rows are held at a time."""


def alike(pattern: Pattern, seq_len: int, heads: int, causal: bool) -> list[list[int]]:
    """Heads that see the same keys at this length, together; groups are in the order of their first heads."""
    if not pattern.head_dependent:
        return [list(range(heads))]
    groups: dict[object, list[int]] = {}
    for head, key in enumerate(_keys(pattern, seq_len, heads, causal)):
        groups.setdefault(key, []).append(head)
    return list(groups.values())


def name(group: Sequence[int], heads: int) -> str:
    """What a group of heads is called: `head 3`, `heads 0, 4`, `all 12 heads`."""
    if len(group) == 1:
        return f"head {group[0]}"
    if len(group) == heads:
        return f"all {heads} heads"
    if len(group) <= 4:
        return f"heads {', '.join(map(str, group))}"
    return f"heads {', '.join(map(str, group[:3]))}, … {group[-1]} ({len(group)})"


def branch_pictures(
    pattern: Dilated, chosen: Sequence[int], seq_len: int, heads: int, causal: bool, cell: int
) -> Tensor:
    """The mean multiplicity of each branch for chosen heads: (branches, chosen heads, C, C) float32.

    It is counted from how many kept tokens of each segment stand in each cell, whatever the length. Cells hold
    `cell` x `cell` pairs of query and key, those at the end perhaps fewer.
    """
    found = []
    for branch in pattern.branches:
        offsets = (pattern.offset(head, branch[1], heads) for head in chosen)
        relations = (unions.relation(branch, offset, seq_len) for offset in offsets)
        found.append(torch.stack([_pairs(of_head, seq_len, causal, cell) for of_head in relations]))
    return torch.stack(found) / _areas(seq_len, cell)


def together(pattern: Dilated) -> str:
    """What all branches together are called."""
    return "union" if pattern.overlap == "set" else "mixed"


def picture_together(
    pattern: Dilated, branches: Tensor, chosen: Sequence[int], seq_len: int, heads: int, causal: bool, cell: int
) -> Tensor:
    """The mean multiplicity of all branches together, (chosen heads, C, C), from their `branch_pictures`."""
    if pattern.overlap == "multiset":
        return branches.sum(0)
    found = []
    for head in chosen:
        offsets = [pattern.offset(head, r, heads) for _, r in pattern.branches]
        signed = unions.signed(pattern.branches, offsets, seq_len)
        found.append(sum(factor * _pairs(relation, seq_len, causal, cell) for relation, factor in signed))
    return torch.stack(found) / _areas(seq_len, cell)


def pictures(pattern: Pattern, chosen: Sequence[int], seq_len: int, heads: int, causal: bool, cell: int) -> Tensor:
    """The mean multiplicity for chosen heads, from the pattern's rows: (chosen heads, C, C) float32."""
    bands = []
    for rows in _rows(pattern, seq_len, heads, causal, cell):
        of_chosen = rows[list(chosen)]  # (chosen heads, Q, N)
        bands.append(_pooled(_pooled(of_chosen, cell).transpose(1, 2), cell).transpose(1, 2))
    return torch.cat(bands, 1) / _areas(seq_len, cell)


def _pairs(relation: unions.Relation, seq_len: int, causal: bool, cell: int) -> Tensor:
    """How many pairs of positions that see each other each cell holds: (C, C) float32."""
    positions, labels = (torch.from_numpy(x) for x in relation)
    counts = torch.zeros(int(labels.max()) + 1 if len(labels) else 0, -(-seq_len // cell))  # (labels, C)
    counts.index_put_((labels, positions // cell), torch.ones(len(positions)), accumulate=True)
    pairs = counts.T @ counts
    if not causal:
        return pairs
    return pairs.tril(-1) + (counts * (counts + 1) / 2).sum(0).diag()


def _keys(pattern: Pattern, seq_len: int, heads: int, causal: bool) -> list[object]:
    """Something for each head that is equal for heads that see the same."""
    if isinstance(pattern, Dilated):
        kept = torch.stack([pattern.keeps(branch, seq_len, heads) for branch in pattern.branches], 1)
        return [of_head.numpy().tobytes() for of_head in kept]
    first = [0] * heads  # of each head, the first that looks the same so far
    for rows in _rows(pattern, seq_len, heads, causal, 1):
        first = [
            next(g for g in range(h + 1) if first[g] == first[h] and torch.equal(rows[g], rows[h]))
            for h in range(heads)
        ]
    return [*first]


def _rows(pattern: Pattern, seq_len: int, heads: int, causal: bool, cell: int) -> Iterator[Tensor]:
    """All rows of the multiplicity in turn, whole cells at a time: (H, Q, N)."""
    step = max(1, _ENTRIES // (heads * seq_len) // cell) * cell
    for queries in torch.arange(seq_len).split(step):
        yield pattern.rows(queries, seq_len, heads, causal)


def _pooled(x: Tensor, cell: int) -> Tensor:
    """Sums of `cell` neighbours along the last dimension; the last sum may be of fewer."""
    if cell == 1:
        return x
    short = -x.shape[-1] % cell
    return (F.pad(x, (0, short)) if short else x).unflatten(-1, (-1, cell)).sum(-1, dtype=x.dtype)


def _areas(seq_len: int, cell: int) -> Tensor:
    """How many pairs of query and key each cell holds: (C, C)."""
    tokens = _pooled(torch.ones(seq_len), cell)
    return tokens[:, None] * tokens
