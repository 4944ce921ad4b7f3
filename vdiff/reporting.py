"""The interface for progress and messages, between the rooms that work and the terminal that shows them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

DOUBTFUL = " ?"
DOUBTFUL_TIMES = "Times with ? are unreliable: more evaluations took less time, even when measured again."


class Progress(Protocol):
    """A progress bar, or a series of plain lines."""

    def update(self, completed: int, note: str = "") -> None:
        """`completed` units of the total are done; `note` is shown after the bar."""


class Reporter(Protocol):
    """Receives progress and messages."""

    def line(self, text: str) -> None:
        """Print one line."""

    def progress(self, description: str, total: int, unit: str, *, start: int = 0) -> AbstractContextManager[Progress]:
        """Begin a bar of `total` units; `start` of them were done before."""


class Silent:
    """A reporter that prints nothing, for use as a library."""

    def update(self, completed: int, note: str = "") -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def progress(self, description: str, total: int, unit: str, *, start: int = 0) -> AbstractContextManager[Progress]:
        """A bar that is not shown."""
        del description, total, unit, start
        return nullcontext(self)
