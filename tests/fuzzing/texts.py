"""Data files, paths and JSON of all kinds."""

from __future__ import annotations

from hypothesis import strategies as st

from tests.fuzzing.mutations import mutated

_ORIGINALS = [
    "first line\nsecond line, ünïcode 世界 🙂\r\n\nlast".encode(),
    b'{"text": "a"}\n\n{"text": "\\ud83d\\ude42 \\u00e9", "other": [1, {"x": null}]}\n{"text": ""}',
    b"x" * 300,
    b"",
]
_PIECES = [
    b"\n", b"\r", b"\0", b"\xff", b"\xe4\xb8", b"\xed\xa0\x80", b"\xf0\x9f\x99", b"\xef\xbb\xbf", b"\xc0\x80", b"\x85",
    b"\xf5" * 5, b"\xe2\x80\xa8", b"\\ud800", b"\\udc00\\ud800", b'"', b"\\", b"{", b"}", b'{"text":', b'"text"',
    b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b"1e999", b"NaN", b"null", b"{}", b"[]", b'{"text": 1}\n',
    b'{"text": [[[]]]}\n', b'{"text": "\\ud800"}\n',
]  # fmt: skip

TEXTS = st.one_of(
    mutated(_ORIGINALS, _PIECES), st.binary(max_size=400), st.lists(st.sampled_from(_PIECES), max_size=9).map(b"".join)
)
"""What is in a data file."""

PATTERNS = st.text("ab.*?[]!-{}~\0\n/\ud800é", max_size=8).filter(
    lambda pattern: not pattern.startswith(("/", "~/")) and ".." not in pattern  # those could walk the whole disk
)
"""Paths, under the working directory."""

JSON_PIECES = [
    b'"', b"{", b"}", b"[", b"]", b",", b":", b"null", b"-1", b"0", b"1e9", b"9" * 5000, b"[" * 3000, b'"<u4"', b'"O"',
    b"\\u0000", b"../", b"\xff",
]  # fmt: skip
"""What is put into a manifest or a tokenizer."""
