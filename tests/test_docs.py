"""The commands of README and docs run after a quickstart, all of it tiny; `make test_docs` runs them in full."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests import documents, programs
from tests.commands import ROOT
from tests.documents import DOCUMENTS, TABLE, Shown, commands, failures, instead, own_files, unused_rules, words_of

TINY = """
preset = "toy"
num_iters = 1
batch_size = 2

[unet]
channels = 4
embedding_channels = 8
multipliers = [1]
attention_strides = []
num_groups = 4

[distill]
num_iters = 1
batch_size = 2
"""
ENVIRONMENT = {
    "VDIFF_CONFIG": "tiny.toml", "VDIFF_DEVICE": "cpu", "VDIFF_NUM_WORKERS": "0", "VDIFF_NUM": "64",
    "VDIFF_NUM_ITERS": "1", "VDIFF_CHECK_IMAGES": "0", "VDIFF_DISTANCE_EVERY": "0", "VDIFF_REPORT": "False",
    "VDIFF_TRACKER": "none", "OMP_NUM_THREADS": "1", "VDIFF_CACHE": "cache",
}  # fmt: skip
SMALLER = {"--num_iters": "1", "--batch_size": "2", "-n": "64", "--num": "64", "--preset": "toy"}
"""Values that commands give and that would take long; the last one of an option counts."""
QUICKSTART = ["prepare_data.py", "train.py --data data/digits_8", "distill.py --teacher_steps 128 --to_steps 1"]


def tiny(line: str, place: Path) -> str:
    """Run a command with tiny settings."""
    words = words_of(line, place)
    words = words[1:] if words[0] == "python" else words
    smaller = SMALLER | ({"--size": "8"} if "--name" in words else {})  # found by the name, whatever its size
    words += [word for name, value in smaller.items() if name in words for word in (name, value)]
    stdout, stderr = (program := programs.start(shlex.join(words), place, ENVIRONMENT)).communicate(300)
    return "" if program.returncode == 0 else (stderr.strip().splitlines() or [stdout or "no message"])[-1]


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("quickstart")
    (place / "tiny.toml").write_text(TINY)
    for line in QUICKSTART:
        assert tiny(line, place) == ""
    own_files(place)
    return place


@pytest.mark.slow
@pytest.mark.parametrize("document", [path for path in DOCUMENTS if any(commands(path))], ids=lambda path: path.name)
def test_every_command_runs_as_it_is_typed(document, quickstart, tmp_path):
    found = failures(document, quickstart, tmp_path, tiny)
    assert not found, "\n".join(found)


def test_commands_are_found_and_those_of_the_table_replaced(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text: python train.py\n\n    python train.py --resume   # goes on\n    import vdiff\n    vdiff report a \\\n"
        "        --open\n    torchrun --nproc_per_node 8 train.py\n"
    )
    assert [(shown.typed, shown.runs, bool(shown.why)) for shown in commands(page)] == [
        ("python train.py --resume", ["python train.py --resume"], False),
        ("vdiff report a --open", ["vdiff report checkpoints --evaluate --num 64"], True),
        ("torchrun --nproc_per_node 8 train.py", [], True),
    ]
    assert instead("vdiff push a b --private").runs == ["vdiff push a b --private --dry_run"]
    assert instead(".venv/bin/vdiff doctor") == Shown(".venv/bin/vdiff doctor", ["vdiff doctor"])


def test_rules_that_no_document_needs_are_found(monkeypatch):
    assert len([command for path in DOCUMENTS for command in commands(path)]) > 40
    monkeypatch.setitem(TABLE, "rule", [*TABLE["rule"], {"command": "vdiff nothing", "run": "", "why": ""}])
    assert unused_rules()[-1:] == ["vdiff nothing"]
    assert set(TABLE["document"]) <= {path.name for path in DOCUMENTS}


def test_failures_name_the_command(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("    python train.py --resume\n    python sample.py\n")
    (tmp_path / "place").mkdir()
    (tmp_path / "work").mkdir()
    found = failures(page, tmp_path / "place", tmp_path / "work", lambda line, _: "no run" if "train" in line else "")
    assert found == ["python train.py --resume\n  ran: python train.py --resume\n  no run"]


def test_a_command_that_is_typed_in_a_shell_tells_its_last_line(tmp_path, capfd):
    assert documents.typed("echo one && echo two >&2 && exit 3", tmp_path) == "two"
    assert documents.typed("python --version", tmp_path) == ""
    assert re.search(r"s  FAILED  echo one.*\n.*s  ok      python --version", capfd.readouterr().out)
    assert "documents" in (ROOT / "Makefile").read_text()


def test_a_kept_clone_gets_new_code_and_no_second_quickstart(tmp_path, monkeypatch):
    ran: list[str] = []
    monkeypatch.setattr(documents, "typed", lambda line, _: ran.append(line) or "")
    clone = tmp_path / "clone"
    assert documents.prepare(clone) == []
    (clone / "README.md").write_text("changed")
    assert documents.prepare(clone) == []
    assert ran == ["make quickstart"]
    assert (clone / "photos.zip").exists()
    assert (clone / "README.md").read_text(encoding="utf-8").startswith("# vdiff")


def test_documents_are_chosen_by_name(tmp_path, monkeypatch, capsys):
    ran: list[str] = []
    monkeypatch.setattr(documents, "typed", lambda line, _: ran.append(line) or "")
    monkeypatch.setattr("sys.argv", ["documents", "sampling.md", "--place", str(tmp_path)])
    assert documents.main() == 0
    assert ran == ["make quickstart", *[run for shown in commands(ROOT / "docs/sampling.md") for run in shown.runs]]
    monkeypatch.setattr("sys.argv", ["documents", "nothing.md"])
    with pytest.raises(SystemExit):
        documents.main()
    assert "no such document: nothing.md" in capsys.readouterr().err


def test_file_names_are_expanded(tmp_path):
    for name in ("base_0", "base_1"):
        (tmp_path / name).mkdir()
    assert words_of("vdiff evaluate base_? x*", tmp_path) == ["vdiff", "evaluate", "base_0", "base_1", "x*"]
