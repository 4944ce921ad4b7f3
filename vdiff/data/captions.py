"""Captions: cleaning while a dataset is prepared, and their random changes in training; files of prompts."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from vdiff.errors import OptionError
from vdiff.files import read_text
from vdiff.text import cause_of

if TYPE_CHECKING:  # train.py --help reads the settings, without numpy
    import numpy as np


def clean_caption(text: str) -> str:
    r"""The captions of an image, one per line: control characters and white space become single spaces, blank lines go.

    >>> clean_caption("a dog\tin snow\r\n\n a\x07 dog ")
    'a dog in snow\na dog'
    """
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return "\n".join(filter(None, (" ".join("".join(map(_printed, line)).split()) for line in lines)))


def read_prompts(file: Path, flag: str) -> list[str]:
    """The lines of a text file that are not blank.

    Args:
        flag: which gave the file, for errors.

    Raises:
        OptionError: it cannot be read, or has no prompt.
    """
    try:
        lines = [line.strip() for line in read_text(file).splitlines()]
    except (OSError, ValueError) as error:
        cause = "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else cause_of(error)
        raise OptionError(f"{flag} {file} cannot be read: {cause}", "give a text file, one prompt a line") from None
    if not any(lines):
        raise OptionError(f"{flag} {file} has no prompt", "write one on each line")
    return [line for line in lines if line]


def fingerprint_of(prompts: Sequence[str]) -> str:
    """SHA-256 of prompts; empty if there are none."""
    return sha256("\n".join(prompts).encode()).hexdigest() if prompts else ""


def has_control_characters(text: str) -> bool:
    """Whether `clean_caption` replaces more than white space."""
    return any(_printed(letter) != letter and not letter.isspace() for letter in text)


def _printed(letter: str) -> str:
    """A space for control characters and surrogates, which UTF-8 cannot encode; other characters unchanged."""
    return " " if unicodedata.category(letter) in ("Cc", "Cs") else letter


@dataclass(frozen=True)
class CaptionSettings:
    """How training chooses and changes the captions of an image.

    Attributes:
        dropout: the fraction of captions that are replaced by "", for classifier-free guidance.
        shuffle: put the comma-separated tags in random order.
        keep_tokens: the number of first tags that `shuffle` leaves in place.
        prefix: text before every caption that is not dropped, separated by a space.
    """

    dropout: float = 0.0
    shuffle: bool = False
    keep_tokens: int = 0
    prefix: str = ""

    def __post_init__(self) -> None:
        if not 0 <= self.dropout <= 1 or self.keep_tokens < 0:
            raise ValueError(f"dropout {self.dropout}, keep_tokens {self.keep_tokens}; need 0 … 1 and at least 0")

    def apply(self, captions: str, rng: np.random.Generator) -> str:
        """The caption that the network gets: one of `captions` (one per line) at random, or "" if it is dropped."""
        which, kept = rng.random(2)
        if kept < self.dropout:
            return ""
        lines = captions.split("\n")
        caption = lines[int(which * len(lines))]
        if self.shuffle:
            tags = [tag.strip() for tag in caption.split(",")]
            rest = tags[self.keep_tokens :]
            tags[self.keep_tokens :] = [rest[k] for k in rng.permutation(len(rest))]
            caption = ", ".join(tags)
        return f"{self.prefix} {caption}".strip() if self.prefix else caption
