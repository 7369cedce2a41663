"""The one exception a user may cause, and what a sentence says of a misspelt name. No other module is imported."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(ValueError):
    """Bad input, told in one sentence: what was found, where, what was expected, and the likely cause.

    The command line prints the sentence and exits with code 2; a library user catches a `ValueError`.
    """


def did_you_mean(name: str, known: Iterable[str], otherwise: str) -> str:
    """The known name that is most like a misspelt one, as a question; `otherwise` if none is like it."""
    import difflib

    close = difflib.get_close_matches(name, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else otherwise
