"""Generated tokens as text, while they come: whole characters, and nothing of a string that ends the text."""

from __future__ import annotations

from collections.abc import Sequence

from longnet_kit.data.tokenizers import Tokenizer


class TextStream:
    """The text of a row, piece by piece.

    What may be the beginning of a stop string, or of a character of several bytes, is held back until it is clear.

    Args:
        tokenizer: whose tokens come.
        stops: strings that end the text; they are not part of it.

    Attributes:
        text: all that is clear so far.
        is_stopped: whether a stop string has come.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self._decoder = tokenizer.decoder()
        self._stops = stops
        self._held = ""
        self.text = ""
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Take a token; what is clear now and was not before."""
        return self._take(self._decoder.add(token))

    def finish(self) -> str:
        """No more tokens come; what was held back."""
        piece = self._take(self._decoder.finish())
        if self.is_stopped:
            return piece
        held, self._held = self._held, ""
        self.text += held
        return piece + held

    def _take(self, piece: str) -> str:
        if self.is_stopped:
            return ""
        text = self._held + piece
        found = [place for place in (text.find(stop) for stop in self._stops) if place >= 0]
        self.is_stopped = bool(found)
        clear = min(found) if found else len(text) - self._held_back(text)
        self._held = text[clear:]
        self.text += text[:clear]
        return text[:clear]

    def _held_back(self, text: str) -> int:
        """Characters at the end that a stop string may begin with."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        lengths = range(min(longest, len(text)), 0, -1)
        return next((n for n in lengths if any(stop.startswith(text[-n:]) for stop in self._stops)), 0)
