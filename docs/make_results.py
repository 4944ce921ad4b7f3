"""docs/results.md, from nothing: `python docs/make_results.py` trains, distils and measures all that it tells.

    python docs/make_results.py --emoji noto-emoji-64.zip      # hours on two CPU cores; without the file, digits alone
    python docs/make_results.py --study digits                 # one study; what is known of the others is kept

Work lies in results/STUDY. Commands that have ended are not run again, and those that were cut go on: the same command
ends with the same figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine
from vdiff.evaluation.results import EvalRow, Evaluation
from vdiff.report.formatting import figure

ROOT = Path(__file__).parent.parent
PAGE, WORK, JOURNAL = ROOT / "docs" / "results.md", Path("results"), "done.json"
SCRIPTS = {"prepare": "prepare_data.py", "train": "train.py", "distill": "distill.py"}
EMOJI = "EMOJI"
"""Stands for the file of images in commands."""
COLUMNS = {
    "fd": "Fréchet",
    "kd": "kernel",
    "precision": "precision",
    "recall": "recall",
    "rmse": "RMSE",
    "nearest": "nearest",
}


@dataclass(frozen=True)
class Study:
    """One dataset: what is done, command by command, and the evaluations to show, with a sentence on each."""

    title: str
    commands: tuple[str, ...]
    shown: tuple[tuple[str, str], ...]


def study(name: str, title: str, *, prepare: str, train: str, distill: str, num: int, first: int) -> Study:
    """A study of `num` samples a row, whose ladder begins at `first` steps."""
    place, data = f"{WORK}/{name}", f"data/{name}"
    first_model, few = f"{place}/original", ",".join(str(first >> k) for k in range(first.bit_length()))
    against = f"--data {data} --teacher {first_model} --teacher_steps {first} --num {num}"
    models = f"evaluate {first_model} {place}/base_? {against} --num_timesteps {few}"
    solver = f"evaluate {first_model} {against} --num_timesteps 8,4,2,1 --samplers dpmpp_2m"
    return Study(
        title,
        (
            f"{prepare} --out {data}",
            f"train --data {data} --out {first_model} {train}",
            f"distill --base {first_model} --teacher_steps {first} --to_steps 1 {distill}",
            f"{models} --out {place}/pixels.json",
            f"{solver} --out {place}/solver.json",
            f"features --data {data} --out {place}/features.pt2",
            f"{models} --features {place}/features.pt2 --out {place}/features.json",
        ),
        (
            ("pixels.json", "Features: pixels. Sampler: DDIM."),
            ("solver.json", "Features: pixels. Sampler: DPM-Solver++ (2M), on the teacher."),
            ("features.json", "Features: a network trained by `vdiff features` on the same images. Sampler: DDIM."),
        ),
    )


STUDIES = {
    "digits": study(
        "digits", "Digits, 8 × 8", prepare="prepare", train="--preset digits", distill="", num=1797, first=64
    ),
    "emoji": study(
        "emoji", "Emoji, 32 × 32",
        prepare=f"prepare {EMOJI} --size 32",
        train="--config benchmarks/emoji_32.toml --preset digits --num_iters 1500",
        distill="--config benchmarks/emoji_32.toml --num_iters 80 --last_factor 3 --batch_size 32",
        num=1906, first=32,
    ),
}  # fmt: skip


def run(name: str, emoji: Path | None) -> None:
    """Do what is left of a study, and note how long each command took."""
    place = ROOT / WORK / name
    place.mkdir(parents=True, exist_ok=True)
    journal = place / JOURNAL
    done: dict[str, float] = json.loads(journal.read_text()) if journal.exists() else {}
    for command in STUDIES[name].commands:
        if command in done:
            continue
        words = []
        for word in command.split():
            students = [path.relative_to(ROOT).as_posix() for path in sorted(ROOT.glob(word))] if "?" in word else []
            words += students or [str(emoji.resolve()) if emoji and word == EMOJI else word]
        if words[0] == "train" and (ROOT / WORK / name / "original" / "run.toml").exists():
            words = ["train", "--resume", "--out", f"{WORK}/{name}/original"]
        began = time.perf_counter()
        subprocess.run([sys.executable, "-m", "vdiff", *words], cwd=ROOT, check=True)
        done[command] = time.perf_counter() - began
        journal.write_text(json.dumps(done, indent=2) + "\n")
    (place / "machine.txt").write_text(machine() + "\n")


def table(rows: tuple[EvalRow, ...]) -> list[str]:
    """Markdown: a line for each model and number of steps."""
    names = [name for name in COLUMNS if any(name in row.metrics for row in rows)]
    cells = [["model", "evaluations", *(COLUMNS[name] for name in names), "ms per image"]]
    cells.append(["---"] * len(cells[0]))
    seen: set[str] = set()
    for row in rows:
        if row.checkpoint in seen and row.checkpoint != rows[0].checkpoint:
            continue  # a student in fewer steps than it was made for
        seen.add(row.checkpoint)
        values = [str(row.metrics.get(name, "")) for name in names]
        cells.append([Path(row.checkpoint).name, figure(row.evaluations), *values, figure(row.ms_per_image, 2)])
    return ["| " + " | ".join(line) + " |" for line in cells]


def chapter(name: str) -> list[str]:
    """What the page tells of a study that was run here; nothing of another."""
    place = ROOT / WORK / name
    told = STUDIES[name]
    if not all((place / file).exists() for file, _ in told.shown):
        return []
    took = json.loads((place / JOURNAL).read_text())
    lines = [f"## {told.title}", ""]
    for command in told.commands:
        kind, _, rest = command.partition(" ")
        typed = f"python {SCRIPTS[kind]} {rest}" if kind in SCRIPTS else f"vdiff {command}"
        lines.append(f"    {typed.replace(EMOJI, 'noto-emoji-64.zip')}    # {took[command]:,.0f} s")
    for file, sentence in told.shown:
        found = Evaluation.read(place / file)
        data, row = found.reference, found.rows[0]
        lines += ["", sentence, "", *table(found.rows), ""]
        lines.append(
            f"n = {row.n}, seed {row.seed}, {row.weights} weights, {found.date[:10]}; "
            f"data: {data.num_images} images of {data.image_size} × {data.image_size}, {data.split}, "
            f"fingerprint {data.fingerprint[:12]}; "
            f"RMSE to the first model in {found.teacher_steps} steps."
        )
    return [*lines, "", (place / "machine.txt").read_text().strip() + ".", ""]


@click.command()
@click.option("--study", "names", type=click.Choice(list(STUDIES)), multiple=True, help="Run this one alone.")
@click.option("--emoji", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="The images of emoji.")
def main(names: tuple[str, ...], emoji: Path | None) -> None:
    """Run the studies and write docs/results.md."""
    for name in names or STUDIES:
        if name == "emoji" and emoji is None:
            print("no --emoji FILE: that study is left out", file=sys.stderr)
            continue
        run(name, emoji)
    chapters = {name: chapter(name) for name in STUDIES}
    emoji_too = " --emoji noto-emoji-64.zip" if chapters["emoji"] else ""
    lines = [
        "# Results",
        "",
        f"Every figure on this page comes from `python docs/make_results.py{emoji_too}`.",
        "[evaluation.md](evaluation.md#the-metrics) defines the columns. ± is half of a 95 % confidence interval over",
        "repeated sampling from the same model. `original` is the teacher; `base_0`, `base_1`, … are its students.",
        "",
        *(line for told in chapters.values() for line in told),
    ]
    PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
