"""What every room of the data package raises when text, tokenizer or cache cannot be used."""

from __future__ import annotations

import re

from longnet_kit.errors import UserError


class DataError(UserError):
    """The user's data cannot be used; the message names the file or key, what was found, and what would do.

    A loader's worker process hands its error over as text, and torch raises one of the same class with the whole
    traceback for a message. Made from that, an error says what the worker's said.
    """

    def __init__(self, message: str = "") -> None:
        super().__init__(_own_words(message, type(self).__qualname__))


def _own_words(message: str, name: str) -> str:
    """The end of a worker's traceback, after the class of the error; any other message as it is."""
    if not re.match(r"Caught \w+ in .+\.\nOriginal Traceback ", message):
        return message
    *_, last = re.split(rf"^(?:\w+\.)*{re.escape(name)}(?:: |$)", message, flags=re.MULTILINE)
    return last.removesuffix("\n")
