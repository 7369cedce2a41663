"""The one exception a user may cause. It knows nothing of the rest of the package."""

from __future__ import annotations


class UserError(ValueError):
    """Bad input, told in one sentence: what was found, where, what was expected, and the likely cause.

    The command line prints the sentence and exits with code 2; a library user catches a `ValueError`.
    """
