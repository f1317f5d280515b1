"""Attention patterns as text: a row per query, a column per key."""

from __future__ import annotations

from torch import Tensor

from longnet_kit.attention.patterns import Dilated, Pattern


def draw(pattern: Pattern, seq_len: int, heads: int, causal: bool = True, head: int = 0) -> list[str]:
    """What one head's queries see: the key's multiplicity, or a dot where it is not seen; one line per query."""
    return _rows(pattern.multiplicity(seq_len, heads, causal)[head])


def draw_branches(pattern: Dilated, seq_len: int, heads: int, causal: bool = True, head: int = 0) -> str:
    """Each branch of a dilated pattern and their mixture, side by side under their names."""
    panels = {
        f"({w}, {r})": draw(Dilated([w], [r], pattern.head_offsets), seq_len, heads, causal, head)
        for w, r in pattern.branches
    }
    panels["mixed"] = draw(pattern, seq_len, heads, causal, head)
    return side_by_side(panels)


def side_by_side(panels: dict[str, list[str]]) -> str:
    """Drawings next to each other, each under its title."""
    titles = "   ".join(title.ljust(len(rows[0])) for title, rows in panels.items()).rstrip()
    lines = ["   ".join(parts) for parts in zip(*panels.values(), strict=True)]
    return "\n".join([titles, *lines])


def _rows(m: Tensor) -> list[str]:
    return ["".join("·" if count == 0 else str(min(int(count), 9)) for count in row) for row in m.tolist()]
