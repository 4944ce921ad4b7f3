"""The errors that a user can cause and mend; the command line prints them as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class VdiffError(Exception):
    """Something the user can mend: what is wrong (`cause`), and what to do next (`hint`).

    >>> str(VdiffError("data/cats: no such file or folder", "give the path of a folder or a zip"))
    'data/cats: no such file or folder; give the path of a folder or a zip'
    """

    exit_code = 1

    def __init__(self, cause: str, hint: str = "") -> None:
        self.cause = cause
        self.hint = hint
        super().__init__(f"{cause}; {hint}" if hint else cause)


class OptionError(VdiffError):
    """A command-line option or configuration key that cannot be used as given."""

    exit_code = 2


class Interrupted(BaseException):
    """Work was stopped by a signal after everything worth keeping was written (130 = SIGINT, 143 = SIGTERM).

    Like KeyboardInterrupt it is no error, and passes `except Exception`.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def suggestion(word: str, choices: Iterable[str], *, only_near: bool = False) -> str:
    """`did you mean 'x'?` for the choice nearest to `word`; when none is near, the list of choices (or nothing)."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return "" if only_near else f"choose from {', '.join(choices)}"
