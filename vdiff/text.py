"""Numbers, sizes, times and errors as people read them, in one line; lines folded for a terminal."""

from __future__ import annotations

import math
import re
import textwrap

PROGRAMS = "data|distill|doctor|ema|evaluate|export|features|import|inspect|prepare|push|report|sample|serve|train"
COMMAND = re.compile(rf"`[^`]+`|\b(?:python \S+\.py|tensorboard|pip install|vdiff (?:{PROGRAMS}))\b[^;,`]*")
KEY = re.compile(r"\S+(?: \S+)* {2,}")
NO_BREAK = "\u00a0"
DAY = 24 * 3600


def plural(number: int, thing: str) -> str:
    """`1 step`, `2 steps`, `1,024 steps`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """`75` → `1:15`; `4000` → `1:06:40`; from a day on `376000` → `4 days 8 h`."""
    if seconds >= DAY:
        days, hours = divmod(int(seconds / 3600 + 0.5), 24)
        return f"{plural(days, 'day')} {hours} h"
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def quantity(number: float) -> str:
    """`1234567` → `1.23 M`."""
    power = 0 if abs(number) < 1000 else min(int(math.log10(abs(number))) // 3, 5)
    return f"{number / 1000**power:.3g} {' kMGTP'[power]}".rstrip()


def megabytes(num_bytes: int) -> str:
    """`1234567` → `1.2 MB`."""
    return f"{num_bytes / 1e6:.1f} MB"


def cause_of(error: object, length: int = 200) -> str:
    """The message of an exception, in one line of at most `length` characters; its type if the message is empty."""
    said = getattr(error, "strerror", None) or error
    return " ".join(str(said).split())[:length] or type(error).__name__


def root_of(error: BaseException) -> BaseException:
    """The error that caused an error, through all errors between them."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def folded(text: str, width: int) -> list[str]:
    """`text` in lines of at most `width` characters, broken between words.

    Words and commands are never broken: a command that is longer than a line stays whole, so that it can be copied, and
    so does `key  command`. Lines after the first one are indented by two spaces; those of `key  value` to the value.
    """
    key = KEY.match(text)
    if key and COMMAND.fullmatch(text, key.end()):
        return [text]
    fold = textwrap.TextWrapper(
        width,
        subsequent_indent=" " * (key.end() if key and key.end() < width // 2 else 2),
        replace_whitespace=False,
        break_long_words=False,
        break_on_hyphens=False,
    )
    whole = COMMAND.sub(lambda found: found[0].replace(" ", NO_BREAK), text)
    return [line.replace(NO_BREAK, " ") for line in fold.wrap(whole)] or [""]
