"""Output of the commands: bars and folded lines on a terminal, plain lines elsewhere.

Progress is printed on stderr, results on stdout.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vdiff.cli.options import print_folded, speaks
from vdiff.errors import printable
from vdiff.reporting import Progress, Silent
from vdiff.text import duration

if TYPE_CHECKING:
    from rich.table import Table

SECONDS_BETWEEN_LINES = 10.0
WIDE, WIDE_BAR, NARROW_BAR, MIN_BAR, MIN_NAME = 100, 24, 10, 4, 8
"""Columns: a terminal of at least `WIDE` has a bar of `WIDE_BAR`; a bar and a name have at least the last two."""


def aligned(facts: Mapping[str, str]) -> list[str]:
    """A line for each fact, with aligned values."""
    width = max(map(len, facts))
    return [f"{key:<{width}}  {value}" for key, value in facts.items()]


class PlainProgress:
    """Progress for logs and pipes: a line at most every ten seconds, and one at the end."""

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        self.description, self.total, self.unit = description, total, unit
        self.start = self.completed = start
        self.began = self.said = time.monotonic()
        self.note = ""
        self.said_completed = -1

    def update(self, completed: int, note: str = "") -> None:
        """Print a line if the last one is long enough ago."""
        self.completed, self.note = completed, note or self.note
        if time.monotonic() - self.said >= SECONDS_BETWEEN_LINES:
            self.say()

    def say(self) -> None:
        """Print the final state, unless it was printed already."""
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
    """A bar in one line of a terminal: name, bar, count, rate, time left and note.

    A narrow terminal omits the parts of the note, the last part first, then the bar. Then the name is shortened.
    """

    def __init__(self, description: str, total: int, unit: str, start: int) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.spinner import Spinner

        self.name, self.total, self.unit, self.start = printable(description), total, unit, start
        self.completed = start
        self.parts: list[str] = []
        self.began = self.updated = time.monotonic()
        self.spinner = Spinner("dots", style="cyan")
        self.console = Console(stderr=True)
        self.live = Live(console=self.console, get_renderable=self.line, refresh_per_second=10)

    def update(self, completed: int, note: str = "") -> None:
        """Move the bar."""
        self.completed, self.updated = completed, time.monotonic()
        if note:
            self.parts = printable(note).split(", ")

    def line(self) -> Table:
        """The current line, in the width of the terminal."""
        from rich.cells import cell_len
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        now = time.monotonic()
        rate = (self.completed - self.start) / max(self.updated - self.began, 1e-9)
        clock = "-:-- left"
        if self.completed >= self.total:
            clock = f"{duration(self.updated - self.began)} spent"
        elif rate > 0:
            clock = f"{duration(max((self.total - self.completed) / rate - (now - self.updated), 0))} left"
        facts = Text(f"{self.completed}/{self.total}  {rate:.3g} {self.unit}/s  {clock}")
        width = self.console.width
        room = width - facts.cell_len - 3
        name = Text(self.name)
        name.truncate(max(room, MIN_NAME), overflow="ellipsis")
        room -= name.cell_len
        bar = min(room - 1, WIDE_BAR if width >= WIDE else NARROW_BAR)
        room -= max(bar, -1) + 1
        notes = (f", {', '.join(self.parts[:k])}" for k in range(len(self.parts), 0, -1))
        facts.append(next((note for note in notes if cell_len(note) <= room), ""), style="dim")
        grid = Table.grid(padding=(0, 1))
        shown = [ProgressBar(self.total, self.completed, width=bar)] if bar >= MIN_BAR else []
        grid.add_row(self.spinner, name, *shown, facts)
        return grid


class Console:
    """The reporter of the command line; only rank 0 prints."""

    def line(self, text: str) -> None:
        """Print one line on stderr."""
        if speaks():
            print_folded(text, sys.stderr)

    def result(self, *lines: str, is_json: bool = False) -> None:
        """Print the lines of a result on stdout; JSON is never folded."""
        if speaks():
            for line in lines:
                if is_json:
                    print(printable(line), flush=True)
                else:
                    print_folded(line, sys.stdout)

    @contextmanager
    def progress(self, description: str, total: int, unit: str, *, start: int = 0) -> Iterator[Progress]:
        """Show a bar on a terminal, plain lines elsewhere."""
        if not speaks():
            yield Silent()
        elif sys.stderr.isatty():
            bar = BarProgress(description, total, unit, start)
            with bar.live:
                yield bar
        else:
            plain = PlainProgress(description, total, unit, start)
            yield plain
            plain.say()

    def table(self, title: str, columns: list[str], rows: list[list[str]], *, num_keys: int = 1) -> None:
        """Print a table of results on stdout: with rules on a terminal, aligned plain text elsewhere.

        No cell is cut. On a narrow terminal headings take several lines. If that is not enough, the columns are divided
        among several tables, and each repeats the first `num_keys` columns.
        """
        rows = [[printable(cell) for cell in row] for row in rows]
        if speaks() and sys.stdout.isatty():
            _print_boxed(printable(title), columns, rows, num_keys)
            return
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        self.result(title)
        for row in [columns, *rows]:
            texts = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
            self.result("  ".join(texts).rstrip())


def _print_boxed(title: str, columns: list[str], rows: list[list[str]], num_keys: int) -> None:
    """Print a table in the terminal's width; see `Console.table`."""
    from rich.box import SQUARE
    from rich.cells import cell_len
    from rich.console import Console as RichConsole
    from rich.table import Table

    terminal, folders = RichConsole(markup=False, emoji=False), {row[0].rpartition("/")[0] for row in rows}
    widths = [max(map(cell_len, column)) for column in zip(columns, *rows, strict=True)]
    if _width(widths) > terminal.width and len(folders) == 1 and folders != {""}:
        title, rows = f"{title} in {folders.pop()}", [[row[0].rpartition("/")[2], *row[1:]] for row in rows]
    least = [max(map(cell_len, [*head.split(), *column])) for head, *column in zip(columns, *rows, strict=True)]
    for k, part in enumerate(_parts(least, num_keys, terminal.width)):
        terminal.print("" if k else title, soft_wrap=True, highlight=False)
        table = Table(box=SQUARE, show_edge=False, pad_edge=False)
        whole, folded = _width([max(least[i], len(columns[i])) for i in part]), _width([least[i] for i in part])
        for i in part:
            width = least[i] if folded <= terminal.width < whole else None
            table.add_column(
                columns[i], justify="right" if i else "left", overflow="fold", vertical="bottom", width=width
            )
        for row in rows:
            table.add_row(*(row[i] for i in part))
        terminal.print(table)


def _width(widths: Sequence[int]) -> int:
    """The width of a table with columns of these widths."""
    return sum(widths) + 3 * (len(widths) - 1)


def _parts(widths: Sequence[int], num_keys: int, width: int) -> list[list[int]]:
    """The columns of each table, so that it fits `width` characters; all begin with the first `num_keys` columns."""
    keys = list(range(num_keys))
    parts = [keys]
    for i in range(num_keys, len(widths)):
        is_full = _width([widths[k] for k in [*parts[-1], i]]) > width
        parts = [*parts, [*keys, i]] if is_full and parts[-1] != keys else [*parts[:-1], [*parts[-1], i]]
    return parts
