"""Errors that a user can cause and fix; the command line prints each as one line."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from importlib import import_module

# control characters, writing direction marks, line and paragraph separators, lone surrogates
_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_SHORT = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}


def printable(text: str) -> str:
    """`text` as one line without control characters: they are written as `\\n` or `\\u001b`.

    In JSON they occur only within strings, where this escape means the same character.
    """
    return _UNPRINTABLE.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", text)


def shell(*words: object) -> str:
    """Words as they are typed in a shell, quoted if necessary.

    >>> shell("--data", "data/my photos")
    "--data 'data/my photos'"
    """
    return shlex.join(map(str, words))


MAX_WHOLE = 2**31 - 1
"""The largest whole number for options and settings that set no other limit."""


class VdiffError(Exception):
    """An error that the user can fix: what is wrong (`cause`), and what to do next (`hint`).

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
    """A signal stopped the work, and everything worth keeping is saved (130 = SIGINT, 143 = SIGTERM).

    Like KeyboardInterrupt it is not an error: `except Exception` does not catch it.
    """

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@contextmanager
def stop_explained(explain: Callable[[str], str]) -> Iterator[None]:
    """Explain a stop by a signal: `explain` gets the signal's name and returns the message of the `Interrupted`.

    Raises:
        Interrupted: a signal or Ctrl-C ended the block.
    """
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
        raise Interrupted(explain(str(stop) or "interrupted"), code) from None


@contextmanager
def explained(cause: str, hint: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn errors of `kinds` in the block into one line: `cause`, the error's text, and the hint.

    Raises:
        VdiffError: an error of these kinds was raised in the block.
    """
    try:
        yield
    except VdiffError:
        raise
    except kinds as error:
        said = " ".join(str(getattr(error, "strerror", None) or error).split()) or type(error).__name__
        raise VdiffError(f"{cause}: {said}", hint) from None


def suggestion(word: str, choices: Iterable[str], *, only_near: bool = False) -> str:
    """`did you mean 'x'?` with the choice nearest to `word`; if none is near, the list of choices (or nothing)."""
    choices = list(choices)
    near = difflib.get_close_matches(word, choices, n=1)
    if near:
        return f"did you mean {near[0]!r}?"
    return "" if only_near else f"choose from {', '.join(choices)}"


def require(purpose: str, extra: str, *modules: str) -> None:
    """Import the modules that an extra of vdiff brings, before work that needs them begins.

    Raises:
        VdiffError: one is not installed.
    """
    for module in modules:
        try:
            import_module(module)
        except ImportError as error:
            cause = f"{purpose}: {error.name or module} is not installed"
            raise VdiffError(cause, f"pip install 'vdiff[{extra}]'") from None
