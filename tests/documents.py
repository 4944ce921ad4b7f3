"""The commands of README and docs, run as typed in a place where the quickstart has been: `make test_docs`.

tests/docs_commands.toml says what runs instead of a command that needs GPUs, a hub or hours. After a failure,
`python -m tests.documents training.md --place FOLDER` runs one document; FOLDER keeps the quickstart for the next call.
"""

from __future__ import annotations

import argparse
import glob
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL.Image

from tests import reference_network

ROOT = Path(__file__).parent.parent
TABLE = tomllib.loads(Path(__file__).with_name("docs_commands.toml").read_text(encoding="utf-8"))
DOCUMENTS = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "commands.md")]
PROGRAM = re.compile(r"    ((?:python3?|\.venv/bin/\w+|vdiff|make|torchrun|accelerate) [^#]*)")
Run = Callable[[str, Path], str]
"""Runs one command in a folder; what went wrong, empty if nothing did."""


@dataclass(frozen=True)
class Shown:
    """A command of a document: as it is typed, what runs instead (empty: nothing), and why."""

    typed: str
    runs: list[str]
    why: str = ""


def commands(document: Path) -> Iterator[Shown]:
    """The commands of a document: indented lines that begin with a program, up to their comments."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    for line in text.splitlines():
        if found := PROGRAM.match(line):
            yield instead(" ".join(found[1].split()))


def instead(typed: str) -> Shown:
    """What the table says of a command; without a rule it runs as it is typed, in the environment that is active."""
    for rule in TABLE["rule"]:
        if found := re.fullmatch(rule["command"], typed):
            return Shown(typed, [run for run in found.expand(rule["run"]).split(" && ") if run], rule["why"])
    return Shown(typed, [typed.removeprefix(".venv/bin/")])


def unused_rules() -> list[str]:
    """Patterns of the table that fit no command of a document any more."""
    shown = [each.typed for document in DOCUMENTS for each in commands(document)]
    return [rule["command"] for rule in TABLE["rule"] if not any(re.fullmatch(rule["command"], c) for c in shown)]


def own_files(place: Path) -> None:
    """What the documents take for a user's own: photos, photos.zip, checkpoint.pt of a v-diffusion repository."""
    (place / "photos").mkdir()
    colours = np.random.default_rng(0).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    for k, pixels in enumerate(colours):
        PIL.Image.fromarray(pixels).resize((96, 80)).save(place / "photos" / f"{k}.png")
    shutil.make_archive(str(place / "photos"), "zip", place / "photos")
    reference_network.save(place / "checkpoint.pt", reference_network.Shape(), time_scale=1)


def failures(document: Path, quickstart: Path, work: Path, run: Run) -> list[str]:
    """Run a document's commands in copies of the folder that the quickstart left; what failed, a text for each.

    The commands of a document follow each other in one copy, or where the table has them as alternatives, each has its
    own.
    """
    rules = TABLE["document"].get(document.name, {})
    base = shutil.copytree(quickstart, work / "base", symlinks=True, ignore=shutil.ignore_patterns(".venv", ".git"))
    found = [f"before: {line}: {why}" for line in rules.get("before", []) if (why := run(line, base))]
    place = base
    for number, shown in enumerate(commands(document)):
        if rules.get("alternatives"):
            place = shutil.copytree(base, work / str(number), symlinks=True)
        for line in shown.runs:
            if why := run(line, place):
                found.append(f"{shown.typed}\n  ran: {line}\n  {why}")
                break
    return found


def typed(line: str, place: Path) -> str:
    """Run a command in a shell, as a user types it."""
    bin_folder = str(Path(sys.executable).parent)
    env = {**os.environ, "PATH": os.pathsep.join([bin_folder, os.environ["PATH"]])}
    started = time.monotonic()
    done = subprocess.run(line, shell=True, cwd=place, env=env, capture_output=True, text=True)
    print(f"{time.monotonic() - started:7.1f} s  {'ok    ' if not done.returncode else 'FAILED'}  {line}", flush=True)
    return "" if not done.returncode else (done.stderr.strip().splitlines() or ["no message"])[-1]


def words_of(line: str, place: Path) -> list[str]:
    """The words of a command, patterns of file names expanded as a shell does."""
    words: list[str] = []
    for word in shlex.split(line):
        found = sorted(glob.glob(word, root_dir=place)) if re.search(r"[*?]", word) else []
        words += found or [word]
    return words


def prepare(clone: Path) -> list[str]:
    """Clone the repository, run its quickstart, and add `own_files`; in an earlier clone, only its code is renewed."""
    if (clone / "checkpoint.pt").exists():
        for words in (["fetch", ROOT, "HEAD"], ["reset", "--hard", "FETCH_HEAD"]):
            subprocess.run(["git", "-C", clone, words[0], "--quiet", *words[1:]], check=True)
        return []
    subprocess.run(["git", "clone", "--quiet", ROOT, clone], check=True)
    found = [f"make quickstart: {why}" for why in [typed("make quickstart", clone)] if why]
    own_files(clone)
    return found


def main() -> int:
    """Run the commands of all documents, or of those named, in a clone; the exit status is 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("documents", nargs="*", metavar="DOCUMENT", help="README.md, training.md, …; default: all")
    parser.add_argument("--place", metavar="FOLDER", help="keep the clone and its quickstart there for the next call")
    args = parser.parse_args()
    if unknown := {*args.documents} - {path.name for path in DOCUMENTS}:
        parser.error(f"no such document: {', '.join(sorted(unknown))}")
    documents = [path for path in DOCUMENTS if not args.documents or path.name in args.documents]
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(args.place or folder, "clone")
        found = prepare(clone)
        for document in documents:
            print(f"\n{document.relative_to(ROOT)}")
            work = Path(folder, document.stem)
            work.mkdir()
            found += [f"{document.name}: {each}" for each in failures(document, clone, work, typed)]
            shutil.rmtree(work)
        for shown in (shown for document in documents for shown in commands(document) if shown.why):
            print(f"instead of  {shown.typed}\n   ran      {' && '.join(shown.runs) or 'nothing'}: {shown.why}")
        found += [f"tests/docs_commands.toml: no document shows {each}" for each in unused_rules()]
        print("\n".join(["", *found, f"{len(found)} failures"]))
        return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
