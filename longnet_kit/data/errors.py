"""What every room of the data package raises when text, tokenizer or cache cannot be used."""

from __future__ import annotations


class DataError(ValueError):
    """The user's data cannot be used; the message names the file or key, what was found, and what would do."""
