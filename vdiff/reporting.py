"""What long work says while it runs: the contract between the rooms that work and whoever shows it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

DOUBTFUL = " ?"
DOUBTFUL_TIMES = "Times with ? cannot be: more evaluations took less time, also when measured again."


class Progress(Protocol):
    """One bar (or one series of plain lines)."""

    def update(self, completed: int, note: str = "") -> None:
        """`completed` units of the total are done; `note` is shown behind the bar."""


class Reporter(Protocol):
    """Where progress and remarks go."""

    def line(self, text: str) -> None:
        """Say one line."""

    def progress(self, description: str, total: int, unit: str, *, start: int = 0) -> AbstractContextManager[Progress]:
        """Begin a bar of `total` units, `start` of which were done before."""


class Silent:
    """A reporter that says nothing, for use as a library."""

    def update(self, completed: int, note: str = "") -> None:
        """Nothing."""

    def line(self, text: str) -> None:
        """Nothing."""

    def progress(self, description: str, total: int, unit: str, *, start: int = 0) -> AbstractContextManager[Progress]:
        """A bar that is not shown."""
        del description, total, unit, start
        return nullcontext(self)
