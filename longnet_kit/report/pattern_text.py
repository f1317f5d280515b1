"""Attention patterns as text: a row per query, a column per key."""

from __future__ import annotations

from torch import Tensor

from longnet_kit.attention.patterns import Dilated


def draw(m: Tensor) -> list[str]:
    """Multiplicities (N, N) of one head: a digit (9 also for more), or a dot where a key is not seen."""
    return ["".join(str(min(count, 9)) if count else "·" for count in row) for row in m.tolist()]


def draw_branches(pattern: Dilated, seq_len: int, heads: int, causal: bool = True, head: int = 0) -> str:
    """Each branch of a dilated pattern and their mixture, side by side under their names."""
    panels = {
        f"({w}, {r})": draw(pattern.branch_multiplicity((w, r), seq_len, heads, causal)[head])
        for w, r in pattern.branches
    }
    panels["mixed"] = draw(pattern.multiplicity(seq_len, heads, causal)[head])
    return side_by_side(panels)


def side_by_side(panels: dict[str, list[str]]) -> str:
    """Drawings next to each other, each under its title."""
    titles = "   ".join(title.ljust(len(rows[0])) for title, rows in panels.items()).rstrip()
    lines = ["   ".join(parts) for parts in zip(*panels.values(), strict=True)]
    return "\n".join([titles, *lines])
