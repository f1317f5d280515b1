"""The one exception for mistakes of a user."""

from __future__ import annotations


class UserError(ValueError):
    """A mistake that the user can mend: what was given, what is allowed, what to do.

    The command line prints the message without a traceback and exits with code 2. Any other exception is a fault: it
    keeps its traceback and ends with exit code 1.
    """
