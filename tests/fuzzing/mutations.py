"""How a valid file is damaged."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import strategies as st


@st.composite
def mutated(draw: st.DrawFn, originals: Sequence[bytes], pieces: Sequence[bytes]) -> bytes:
    """One of the originals after a few changes: bytes flipped, cut out, doubled and moved, `pieces` put in."""
    content = bytearray(draw(st.sampled_from(originals)))
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(content)))
        stop = start + draw(st.sampled_from([0, 1, 1, 2, 4, 8, 30, 200]))
        change = draw(st.sampled_from(["flip", "cut", "double", "move", "put", "put", "end"]))
        if change == "flip" and start < len(content):
            content[start] ^= draw(st.integers(1, 255))
        elif change == "cut":
            del content[start:stop]
        elif change == "double":
            content[start:start] = content[start:stop] * draw(st.sampled_from([1, 1, 3, 100]))
        elif change == "move":
            place = draw(st.integers(0, len(content)))
            content[place:place] = content[start:stop]
        elif change == "put":
            content[start:stop] = draw(st.one_of(st.sampled_from(pieces), st.binary(max_size=8)))
        elif change == "end":
            del content[start:]
    return bytes(content)
