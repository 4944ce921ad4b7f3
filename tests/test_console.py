"""Tables of a terminal: no name and no figure is cut, however narrow it is."""

from __future__ import annotations

import io
import os
import re
import subprocess
import sys
import textwrap

import pytest
from rich.cells import cell_len

from tests.commands import ROOT
from vdiff.cli.console import BarProgress, Console, aligned
from vdiff.cli.distill import headings
from vdiff.cli.main import COMMANDS
from vdiff.cli.options import fail
from vdiff.text import duration, folded

LADDER = [
    ["checkpoints/original", "1024", "850", "12:25", "133.20", "", "", ""],
    ["checkpoints/base_0", "512", "80", "1:02", "66.10", "0.0178", "0.0178", "0.1234"],
    ["checkpoints/base_10", "1", "280", "1:02:33", "0.33", "0.1178", "0.2178", "12.34"],
]
HEADINGS = headings("image")
EVALUATION = ["model", "sampler", "steps", "evals", "fd@2000", "precision", "recall", "density", "ms/image", "seconds"]
MEASURED = [["base_0", "dpmpp_2m", "8", "8", *["0.123 ± 0.012"] * 4, "1.23", "10.1"] for _ in range(2)]


LONG = "original-dpmpp_2m-16steps-guidance1.5-seed0.zip"
EXPECTED = {
    "original": {60: (0, True), 80: (1, True), 100: (1, True), 200: (4, True)},
    LONG: {100: (0, True), 200: (4, True)},
}
"""By name and width: the parts of a note that are shown, and whether there is a bar."""


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


@pytest.mark.parametrize("width", [40, 80, 200])
def test_facts_fit_the_terminal(monkeypatch, width):
    facts = {"network": "UNet, widths 4, " * 8 + "end", "dataset": "data/digits_8"}
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setattr(sys, "stdout", Terminal())
    Console().result(*aligned(facts))
    lines = sys.stdout.getvalue().splitlines()
    monkeypatch.undo()
    assert max(map(len, lines)) <= width
    assert [line[:9] for line in lines] == ["network  ", *[" " * 9] * (len(lines) - 2), "dataset  "]
    assert " ".join(line[9:] for line in lines) == " ".join(facts.values())
    assert len(lines) == {40: 6, 80: 3, 200: 2}[width]


MESSAGES = [
    "error: checkpoints/original exists already (850 of 850 updates); give another --name or --out to keep both, "
    "--resume to continue it, or --overwrite",
    "threads 1: a pass of 8 samples takes 0.0589 s with 1, 0.19 s with 2; --threads sets the number",
    "samples are saved in checkpoints/original/samples; curves: tensorboard --logdir checkpoints",
    "memory       0.882 of 20 GiB: program 0.61, weights 0.003, gradients 0.003, moments 0.006, averages 0.003",
]


@pytest.mark.parametrize("text", MESSAGES)
@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_are_folded_between_words(text, width):
    lines = folded(text, width)
    assert max(map(len, lines)) <= width
    assert " ".join(line.strip() for line in lines) == text
    indent = 13 if text.startswith("memory") else 2
    assert all(line[:indent] == " " * indent != line[: indent + 1] for line in lines[1:])


def test_commands_are_never_broken():
    command = "python distill.py --base checkpoints/a_long_name/original --data 'data/my photos_64' --to_steps 4"
    assert folded(f"next       {command}", 60) == [f"next       {command}"]
    assert folded(f"no checkpoint under checkpoints/a/; run `{command}` first", 60) == [
        "no checkpoint under checkpoints/a/; run",
        f"  `{command}`",
        "  first",
    ]


def test_every_command_of_vdiff_is_kept_whole():
    for name in COMMANDS:
        command = f"vdiff {name} {'FOLDER ' * 12}--option"
        assert folded(f"next       {command}", 60) == [f"next       {command}"]


def test_only_a_terminal_gets_folded_lines_and_json_never_is(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "20")
    text = "one two three four five"
    Console().result(text)
    Console().line(text)
    assert capsys.readouterr() == (f"{text}\n", f"{text}\n")
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Terminal())
    Console().result(text)
    Console().result(f'{{"{text}": 1}}', is_json=True)
    Console().line(text)
    with pytest.raises(SystemExit):
        fail(text, 1)
    shown = [stream.getvalue() for stream in (sys.stdout, sys.stderr)]
    monkeypatch.undo()
    assert shown == [
        f'one two three four\n  five\n{{"{text}": 1}}\n',
        "one two three four\n  five\nerror: one two three\n  four five\n",
    ]


def records(lines: list[str]) -> list[list[str]]:
    """The cells of all rows of all tables, headings among them."""
    return [[cell.strip() for cell in line.split("│")] for line in lines if "│" in line]


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize(("columns", "rows", "num_keys"), [(HEADINGS, LADDER, 1), (EVALUATION, MEASURED, 3)])
def test_a_narrow_terminal_gets_several_tables(monkeypatch, width, columns, rows, num_keys):
    """Every cell is shown whole, beside its row's first ones, and no line is too long."""
    title, *lines = shown(monkeypatch, width, columns, rows, num_keys=num_keys)
    assert max(map(len, lines)) <= width
    assert "…" not in "".join(lines)
    folder = title.partition(" in ")[2]
    told: dict[str, list[str]] = {}
    tables = "\n".join(lines).split("\n\n")
    for table in tables:
        head, _, body = (part.splitlines() for part in re.split("\n(─[─┼]*)\n", table))
        heads = [" ".join(words).strip() for words in zip(*records(head), strict=True)]
        assert heads[:num_keys] == columns[:num_keys]
        told |= zip(heads, map(list, zip(*records(body), strict=True)), strict=True)
    whole = [[row[0].removeprefix(f"{folder}/"), *row[1:]] for row in rows]
    assert told == dict(zip(columns, map(list, zip(*whole, strict=True)), strict=True))
    assert len(tables) == 1 or width < 200
    if columns == HEADINGS and width == 80:
        assert (len(tables), folder) == (1, "checkpoints")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (75, "1:15"), (4000, "1:06:40"), (86_399, "23:59:59"), (86_400, "1 day 0 h"), (376_300, "4 days 9 h"),
        (172_700, "2 days 0 h"),
    ],
)  # fmt: skip
def test_times_from_a_day_on_are_days_and_hours(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize("width", [60, 80, 100, 200])
@pytest.mark.parametrize("name", ["original", LONG])
def test_a_narrow_terminal_keeps_name_count_rate_and_time(monkeypatch, width, name):
    """The note goes first, from its last part to its first, then the bar; a long name is shortened."""
    monkeypatch.setenv("COLUMNS", str(width))
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    bar = BarProgress(name, 25_000, "updates", 1_000)
    parts = ["loss 0.0123", "129 images/s", "12 % waiting for data", "1.3 GiB"]
    now += 48_000
    bar.update(13_000, ", ".join(parts))
    now += 10  # the time left goes on between two updates
    bar.console.file = io.StringIO()
    bar.console.print(bar.line())
    line = bar.console.file.getvalue().rstrip("\n")
    assert cell_len(line) <= width
    assert "13000/25000  0.25 updates/s  13:19:50 left" in line
    shown = line.split()[1]
    assert shown == name or (shown[-1] == "…" and name.startswith(shown[:-1]) and "━" not in line)
    noted = [part for part in parts if part in line]
    assert noted == parts[: len(noted)]
    assert not noted or "━" in line
    assert (len(noted), "━" in line) == EXPECTED[name].get(width, (0, False))
    bar.update(25_000)
    bar.console.print(bar.line())
    assert "25000/25000" in bar.console.file.getvalue()
    assert "spent" in bar.console.file.getvalue()


def test_a_name_wider_than_the_terminal_is_folded(monkeypatch):
    name = "very_long_" * 6 + "name"
    _, *lines = shown(monkeypatch, 50, ["model", "steps"], [[f"runs/{name}", "8"]])
    assert max(map(len, lines)) <= 50
    rows = records(lines)
    assert "".join(row[0] for row in rows[1:]) == name
    assert "8" in [row[1] for row in rows]


def test_every_line_of_json_is_marked():
    """Otherwise a terminal would get it folded."""
    calls = [
        f"{path.name}: {call}"
        for path in (ROOT / "vdiff" / "cli").glob("*.py")
        for call in re.findall(r"\.result\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)", path.read_text(encoding="utf-8"))
        if "json" in call
    ]
    assert len(calls) >= 8
    assert [call for call in calls if "is_json=" not in call] == []


@pytest.mark.slow
def test_libraries_do_not_write_into_the_terminal():
    """In a process of its own: bitsandbytes reports while diffusers imports peft, torch warns once in a process."""
    lines = """
        import functools
        import vdiff.cli.train
        import torch
        from diffusers import UNet2DConditionModel
        twice = functools.cache(lambda number: 2 * number)
        assert torch.compile(lambda x: x * twice(3), backend="eager")(torch.ones(1)) == 6
        import torch.utils.cpp_extension
    """
    command = [sys.executable, "-c", textwrap.dedent(lines)]
    environment = {**os.environ, "CUDA_HOME": "/usr/local", "CUDA_VISIBLE_DEVICES": ""}
    found = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=200, check=False, env=environment)
    assert (found.returncode, found.stderr) == (0, "")
