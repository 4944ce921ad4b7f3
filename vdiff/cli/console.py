"""What the terminal shows: bars on a terminal, plain lines elsewhere; progress on stderr, results on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from vdiff.cli.options import speaks
from vdiff.errors import printable
from vdiff.reporting import Progress, Silent
from vdiff.text import duration

SECONDS_BETWEEN_LINES = 10.0


def aligned(facts: Mapping[str, str]) -> list[str]:
    """A line for each fact, the values one below the other."""
    width = max(map(len, facts))
    return [f"{key:<{width}}  {value}" for key, value in facts.items()]


class PlainProgress:
    """A line at most every ten seconds, and one at the end: for logs and pipes."""

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.start = self.completed = start
        self.began = self.said = time.monotonic()
        self.note = ""
        self.said_completed = -1

    def update(self, completed: int, note: str = "") -> None:
        """Say a line if the last one is long enough ago."""
        self.completed, self.note = completed, note or self.note
        if time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
            self.say()

    def say(self) -> None:
        """Say where the work stands, unless that was said already."""
        if self.said_completed == self.completed:
            return
        self.said, self.said_completed = time.monotonic(), self.completed
        seconds = max(self.said - self.began, 1e-9)
        rate = (self.completed - self.start) / seconds
        left = f", {duration((self.total - self.completed) / rate)} left" if rate > 0 else ""
        took = f", {duration(seconds)} spent" if self.completed >= self.total else left
        note = f", {self.note}" if self.note else ""
        print(
            printable(f"{self.description}: {self.completed}/{self.total} {self.unit}, {rate:.3g}/s{took}{note}"),
            file=sys.stderr,
            flush=True,
        )


class BarProgress:
    """A bar with rate and time left."""

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        self.start, self.unit, self.began = start, unit, time.monotonic()
        self.rich = RichProgress(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("{task.fields[note]}", markup=False),
            console=Console(stderr=True),
        )
        self.task = self.rich.add_task(printable(description), total=total, completed=start, rate="", note="")

    def update(self, completed: int, note: str = "") -> None:
        """Move the bar."""
        rate = (completed - self.start) / max(time.monotonic() - self.began, 1e-9)
        fields: dict[str, Any] = {"rate": f"{rate:.3g} {self.unit}/s"}
        if note:
            fields["note"] = printable(note)
        self.rich.update(self.task, completed=completed, **fields)


class Console:
    """The reporter of the command line; of several processes under a launcher, only the first one speaks."""

    def line(self, text: str) -> None:
        """Say one line on stderr."""
        if speaks():
            print(printable(text), file=sys.stderr, flush=True)

    def result(self, *lines: str) -> None:
        """Print the lines of a result on stdout."""
        if speaks():
            print(*map(printable, lines), sep="\n", flush=True)

    @contextmanager
    def progress(self, description: str, total: int, unit: str, *, start: int = 0) -> Iterator[Progress]:
        """Show a bar on a terminal, plain lines elsewhere."""
        if not speaks():
            yield Silent()
        elif sys.stderr.isatty():
            bar = BarProgress(description, total, unit, start)
            with bar.rich:
                yield bar
        else:
            plain = PlainProgress(description, total, unit, start)
            yield plain
            plain.say()

    def table(self, title: str, columns: list[str], rows: list[list[str]], *, num_keys: int = 1) -> None:
        """Print a table of results on stdout: boxed on a terminal, aligned plain text elsewhere.

        On a terminal that is too narrow, several tables hold the columns; each begins with the first `num_keys` ones.
        """
        rows = [[printable(cell) for cell in row] for row in rows]
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        if speaks() and sys.stdout.isatty():
            from rich.console import Console as RichConsole
            from rich.table import Table

            terminal = RichConsole(markup=False, emoji=False)
            for k, part in enumerate(_parts(widths, num_keys, terminal.width)):
                table = Table(title=printable(title) if k == 0 else None, title_justify="left")
                for i in part:
                    table.add_column(columns[i], justify="right" if i else "left", overflow="fold")
                for row in rows:
                    table.add_row(*(row[i] for i in part))
                terminal.print(table)
            return
        self.result(title)
        for row in [columns, *rows]:
            cells = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            self.result("  ".join(cells).rstrip())


def _parts(widths: Sequence[int], num_keys: int, width: int) -> list[list[int]]:
    """The columns of each boxed table that fits `width` characters; all tables begin with the first `num_keys`."""
    keys = list(range(num_keys))
    parts = [keys]
    for i in range(num_keys, len(widths)):
        is_full = 1 + sum(widths[k] + 3 for k in [*parts[-1], i]) > width
        parts = [*parts, [*keys, i]] if is_full and parts[-1] != keys else [*parts[:-1], [*parts[-1], i]]
    return parts
