"""Which keys a recipe's attention sees: text for the terminal, a figure for a file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from longnet_kit import attention
from longnet_kit.attention.patterns import BlockSparse, Dilated, Pattern
from longnet_kit.errors import UserError
from longnet_kit.report import pattern_text
from longnet_kit.report.pattern_figures import LONGEST, MOST_HEADS, check_length, pattern_figure

if TYPE_CHECKING:
    from longnet_kit.recipe import Recipe

FORMATS = (".png", ".pdf", ".svg")
WIDEST = 64
"""Tokens that are drawn as text, at most."""
_DOTS_PER_INCH = 120
OWN_WEIGHTS = "each branch has a softmax and a weight of its own: mixed is in how many of them a key is"
"""What a picture of branches that are mixed otherwise than by denominators does not show."""


def draw(r: Recipe, length: int = 16, output: Path | None = None) -> str:
    """Draw the attention pattern of a recipe.

    Args:
        length: tokens in the sequence, whatever the recipe's own.
        output: where to write a figure: a .png, .pdf or .svg file.

    Returns:
        The pattern as text, or why it is not drawn as such, and notes.

    Raises:
        UserError: a length below 1 or above 65,536, a backend without a pattern, or a file that cannot be written.
    """
    check_length(length)
    if output is not None:
        _check_format(output)
    name, heads, causal = r.model.attention["backend"], r.model.heads, r.model.causal
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        backend = attention.build(r.model.attention)
    pattern = backend.pattern
    if pattern is None:
        raise UserError(
            f"the attention backend {name!r} has no pattern to draw; write its `pattern`, or set another "
            "model.attention.backend"
        )
    parts = [f"{name}, {_count(heads, 'head')}, {'causal' if causal else 'not causal'}, {_count(length, 'token')}"]
    if length <= WIDEST:
        parts.append(pattern_text.draw_heads(pattern, length, heads, causal, MOST_HEADS))
    elif output is None:
        parts.append(
            f"That is too wide for a terminal, which shows up to {WIDEST} tokens; for a figure add --output pattern.png"
        )
    parts += [f"note: {warning.message}" for warning in caught] + _notes(name, pattern, length)
    mixing = "" if backend.branch_logits is None else OWN_WEIGHTS
    if mixing:
        parts.append(f"note: {mixing}")
    if output is not None:
        _write(pattern, length, heads, causal, output, mixing)
        parts.append(f"figure: {output}")
    return "\n\n".join(parts)


def _notes(backend: str, pattern: Pattern, length: int) -> list[str]:
    """What would show more, where the sequence is too short to show what the pattern is about."""
    if isinstance(pattern, Dilated):
        lengths = [w for w, _ in pattern.branches]
        if min(lengths) <= length:
            return []
        fitting = [w for w in lengths if w <= LONGEST]
        ways = [f"length={max(fitting)} --output pattern.png"] if fitting else []
        key = {"dilated": "model.attention", "naive": "model.attention.pattern"}.get(backend)
        if key is not None and length > 1:
            scaled = ",".join(str(max(1, w * length // max(lengths))) for w in lengths)
            ways.append(f"{key}.segment_lengths=[{scaled}]")
        more = f" This shows more: {', or '.join(ways)}" if ways else ""
        return [f"Every segment is longer than {_count(length, 'token')} (the shortest has {min(lengths):,}).{more}"]
    if isinstance(pattern, BlockSparse):
        window = pattern.block_size * pattern.local_blocks
        if window < length or window >= LONGEST:
            return []
        return [
            f"One window ({pattern.local_blocks} blocks of {pattern.block_size}) holds {_count(length, 'token')}. This "
            f"shows more: length={min(4 * window, LONGEST)} --output pattern.png"
        ]
    return []


def _check_format(output: Path) -> None:
    if output.suffix.lower() not in FORMATS:
        raise UserError(f"the figure would be {str(output)!r}; expected a file name that ends in {', '.join(FORMATS)}")


def _write(pattern: Pattern, length: int, heads: int, causal: bool, output: Path, note: str) -> None:
    figure = pattern_figure(pattern, length, heads, causal, note)
    try:
        figure.savefig(output, dpi=_DOTS_PER_INCH, format=output.suffix[1:].lower())
    except (OSError, ValueError) as error:  # ValueError: no file can have such a name
        raise UserError(
            f"the figure cannot be written to {str(output)!r} ({getattr(error, 'strerror', None) or error}); "
            "name a file in a folder that exists and can be written to"
        ) from error


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"
