"""Attention patterns as text: a row per query, a column per key."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from longnet_kit.attention.patterns import Dilated, Pattern
from longnet_kit.report import pattern_panels

Panel = tuple[str, list[str]]
"""A title and the lines of a drawing."""

_WIDTH = 120
"""Characters of a line, at most, as far as panels can stand below each other."""
_GAP = "   "


def draw(m: Tensor) -> list[str]:
    """Multiplicities (N, N) of one head: a digit (9 also for more), or a dot where a key is not seen."""
    return ["".join(str(min(count, 9)) if count else "·" for count in row) for row in m.tolist()]


def draw_heads(pattern: Pattern, seq_len: int, heads: int, causal: bool, most: int) -> str:
    """What every distinct head sees, heads that see the same together; `most` of them."""
    groups = pattern_panels.alike(pattern, seq_len, heads, causal)
    parts = []
    for group in groups[:most]:
        heading = pattern_panels.name(group, heads)
        if isinstance(pattern, Dilated):
            heading += f": residues {_residues(pattern, group, heads)}"
            drawn = panels(pattern, seq_len, heads, causal, group[0])
            width = max(seq_len, *(len(title) for title, _ in drawn)) + len(_GAP)
            abreast = max(1, (_WIDTH + len(_GAP)) // width)
            lines = [drawn[i : i + abreast] for i in range(0, len(drawn), abreast)]
            picture = "\n\n".join(side_by_side(line) for line in lines)
        else:
            picture = "\n".join(draw(pattern.multiplicity(seq_len, heads, causal)[group[0]]))
        parts.append(f"{heading}\n\n{picture}")
    if len(groups) > most:
        parts.append(f"... and {sum(map(len, groups[most:]))} more, which see other keys")
    return "\n\n".join(parts)


def side_by_side(panels: Sequence[Panel]) -> str:
    """Drawings next to each other, each under its title."""
    columns = [[title, *rows] for title, rows in panels]
    widths = [max(map(len, column)) for column in columns]
    lines = zip(*columns, strict=True)
    return "\n".join(
        _GAP.join(part.ljust(width) for part, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def panels(pattern: Dilated, seq_len: int, heads: int, causal: bool, head: int) -> list[Panel]:
    """What each branch of a dilated pattern shows to a head, and all together where there are several."""
    branches = [
        (f"({w}, {r})", draw(pattern.branch_multiplicity((w, r), seq_len, heads, causal)[head]))
        for w, r in pattern.branches
    ]
    if len(branches) == 1:
        return branches
    return [*branches, (pattern_panels.together(pattern), draw(pattern.multiplicity(seq_len, heads, causal)[head]))]


def _residues(pattern: Dilated, group: list[int], heads: int) -> str:
    """Which positions of a segment the heads keep in each branch: `1 mod 2, 1 or 3 mod 4`."""
    found = []
    for _, r in pattern.branches:
        offsets = sorted({pattern.offset(head, r, heads) for head in group})
        found.append(f"{' or '.join(map(str, offsets))} mod {r}")
    return ", ".join(found)
