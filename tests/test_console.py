"""Tables of a terminal: no name and no figure is cut, however narrow it is."""

from __future__ import annotations

import io
import re
import sys

import pytest

from vdiff.cli.console import Console
from vdiff.cli.distill import HEADINGS

LADDER = [
    ["checkpoints/original", "1024", "850", "12:25", "133.20", "", "", ""],
    ["checkpoints/base_0", "512", "80", "1:02", "66.10", "0.0178", "0.0178", "0.1234"],
    ["checkpoints/base_10", "1", "280", "1:02:33", "0.33", "0.1178", "0.2178", "12.34"],
]
EVALUATION = ["model", "sampler", "steps", "evals", "fd@2000", "precision", "recall", "density", "ms/image", "seconds"]
MEASURED = [["base_0", "dpmpp_2m", "8", "8", *["0.123 ± 0.012"] * 4, "1.23", "10.1"] for _ in range(2)]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch: pytest.MonkeyPatch, width: int, columns: list[str], rows: list[list[str]], **keys) -> list[str]:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", Terminal())
    Console().table("Title", columns, rows, **keys)
    text = sys.stdout.getvalue()
    monkeypatch.undo()
    return re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()


def records(lines: list[str]) -> list[list[str]]:
    """The cells of all rows of all tables, headings among them."""
    return [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in lines if line[:1] in "│┃"]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize(("columns", "rows", "num_keys"), [(HEADINGS, LADDER, 1), (EVALUATION, MEASURED, 3)])
def test_a_narrow_terminal_gets_several_tables(monkeypatch, width, columns, rows, num_keys):
    """Every cell is shown whole, beside its row's first ones, and no line is too long."""
    lines = shown(monkeypatch, width, columns, rows, num_keys=num_keys)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    found = records(lines)
    told = [[""] * len(columns) for _ in rows]
    height = len(rows) + 1
    for first in range(0, len(found), height):
        heads, *cells = found[first : first + height]
        assert heads[:num_keys] == columns[:num_keys]
        for row, values in zip(told, cells, strict=True):
            for head, value in zip(heads, values, strict=True):
                row[columns.index(head)] = value
    assert told == rows
    assert len(found) == height or width < 200


def test_a_name_wider_than_the_terminal_is_folded(monkeypatch):
    name = "runs/" + "very_long_" * 6 + "name"
    lines = shown(monkeypatch, 50, ["model", "steps"], [[name, "8"]])
    assert max(map(len, lines)) <= 50
    rows = records(lines)
    assert "".join(row[0] for row in rows[1:]) == name
    assert "8" in [row[1] for row in rows]
