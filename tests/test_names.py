"""Names are data: they are shown as text that no terminal, page or table takes for a command or markup."""

from __future__ import annotations

import io
import json
import re
import sys
import unicodedata
from pathlib import Path
from xml.etree import ElementTree

import PIL.Image
import pytest

from tests.commands import done, run
from tests.toy import write_checkpoint, write_dataset
from vdiff.cli.console import BarProgress, Console, PlainProgress
from vdiff.errors import printable
from vdiff.interop.card import new_card
from vdiff.report import plots
from vdiff.report.ladder import read_ladder
from vdiff.report.page import render

EVIL = "\x1b]0;owned\a\x1b[31m[red]a[/red]\x9b2J\u202egnp\u2066\x7f\r|<b>&amp;*b*~{{7*7}}$x^\n"
SHOWN = r"\u001b]0;owned\u0007\u001b[31m[red]a[/red]\u009b2J\u202egnp\u2066\u007f\r|<b>&amp;*b*~{{7*7}}$x^\n"
MARKS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def commands_in(text: str) -> list[str]:
    """The characters that a terminal may obey, by Unicode's own tables."""
    return [
        f"{c!r}"
        for c in text
        if c != "\n" and (unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in MARKS)
    ]


def test_no_character_that_a_terminal_obeys_gets_through():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    assert commands_in(printable(every)) == []
    assert "\n" not in printable(every)
    text = "Größe 猫 👩\u200d🚀 क्\u200dष e\u0301"
    assert printable(text) == text
    assert printable(EVIL) == SHOWN
    assert json.loads(printable(json.dumps(EVIL, ensure_ascii=False))) == EVIL


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("on_a_terminal", [True, False])
def test_lines_results_tables_and_progress(on_a_terminal, monkeypatch):
    out, err = (Terminal() if on_a_terminal else io.StringIO() for _ in range(2))
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    for name, value in (("TERM", "dumb"), ("NO_COLOR", "1"), ("COLUMNS", "200")):
        monkeypatch.setenv(name, value)
    console = Console()
    console.line(EVIL)
    console.result(EVIL, EVIL)
    console.table(EVIL, ["name", ":smile:"], [[EVIL, "[b]1[/b]"], ["other", "2"]])
    for text in (out.getvalue(), err.getvalue()):
        assert commands_in(text) == []
        assert SHOWN in text
    assert out.getvalue().count(SHOWN[:40]) == 4
    assert "[b]1[/b]" in out.getvalue()
    assert ":smile:" in out.getvalue()
    assert err.getvalue() == SHOWN + "\n"


def test_progress_of_a_hostile_name(monkeypatch):
    for kind in (PlainProgress, BarProgress):
        monkeypatch.setattr(sys, "stderr", shown := io.StringIO())
        progress = kind(EVIL, 2, "images", 0)
        progress.update(1, EVIL)
        if isinstance(progress, PlainProgress):
            progress.say()
        else:
            progress.console.width = 1000
            progress.console.print(progress.line())
        assert commands_in(shown.getvalue()) == []
        assert shown.getvalue().count(SHOWN) == 2


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Images in folders whose names are hostile, and a file that is none."""
    monkeypatch.chdir(tmp_path)
    for name in (EVIL.replace("/", ""), "cat"):
        (folder := Path("photos" + EVIL.replace("/", ""), name)).mkdir(parents=True)
        PIL.Image.new("RGB", (8, 8), "red").save(folder / "a.png")
        (folder / f"b{EVIL.replace('/', '')}.png").write_text("no image")
        (folder / f"c.{EVIL.replace('/', '')}").write_text("no image")
    return folder.parent


def test_preparing_and_looking_at_hostile_names(photos):
    result = run(f"prepare_data.py '{photos}' --size 8 --num_workers 0 --out set")
    assert result.exit_code == 3
    outputs = [result, run(f"prepare_data.py '{photos}' --size 8 --num_workers 0 --out set2 --strict")]
    outputs += [run(f"vdiff data {words}") for words in ("info set", "info set --json", "verify set --num_workers 0")]
    outputs += [run(f"prepare_data.py '{photos}x'"), run(f"train.py --data '{photos}'"), run(f"vdiff '{photos}'")]
    assert [output.exit_code for output in outputs] == [3, 1, 0, 0, 0, 1, 1, 2]
    for output in outputs:
        assert commands_in(output.output) == []
    rejected = Path("set/rejected.jsonl").read_text()
    assert commands_in(rejected) == []
    assert len([json.loads(line) for line in rejected.splitlines()]) == 2
    assert any("[31m[red]a" in name for name in json.loads(outputs[3].stdout)["class_names"])
    done("vdiff data show set --out sheet.png")


def test_a_checkpoint_of_hostile_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_dataset(Path("data/toy"))
    write_checkpoint(Path("models/original"), classes=2, class_names=[EVIL, "b"], dataset=EVIL, vdiff_version=EVIL)
    for words in ("", " --json"):
        shown = done(f"vdiff inspect models/original{words}").output
        assert commands_in(shown) == []
        assert "[31m[red]" in shown
    card = new_card(Path("models/original"), usage={}).text
    assert commands_in(card) == []
    rows = [line for line in card.splitlines() if "owned" in line]
    assert rows
    for row in rows:
        assert len(re.findall(r"(?<!\\)\|", row)) == 3
        assert "&lt;b>&amp;amp;\\*b\\*\\~" in row
    page = render(read_ladder(Path("models")))
    assert commands_in(page) == []
    assert "<b>&" not in page
    assert "{{7*7}}" in page


def test_plots_of_hostile_names():
    curve = plots.Curve(EVIL, (plots.Point(1, 2.0), plots.Point(2, 1.0)))
    drawing = plots.trade("x", plots.WIDE, [curve], "steps", EVIL, {"blurred": 1.5})
    assert commands_in(drawing) == []
    texts = "".join(ElementTree.fromstring(drawing).itertext())
    assert texts.count(SHOWN) >= 4
