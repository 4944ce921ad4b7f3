"""All that is to be measured on a machine with a GPU, in one command of at most 8 minutes.

    python benchmarks/gpu.py                 # on the GPU: benchmarks/results/gpu.md
    python benchmarks/gpu.py --miniature     # on any machine, in a few minutes: only to see that it runs

It needs PyTorch and `pip install -e ".[dev]"`, and no network. The parts run one after the other, the most important
first; each may take the time that is left. A part that fails or runs out of time is reported, and the next one begins.
The result is written after each part, so nothing is lost if the machine is taken away.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import RESULTS, machine

ROOT = Path(__file__).parent.parent
LADDER = """
num_iters = {teacher}
compile = false
[distill]
num_iters = {student}
compile = false
"""


@dataclass(frozen=True)
class Part:
    """A program to run: its title, and its command after `python`."""

    title: str
    command: list[str]


def parts(work: Path, *, miniature: bool) -> list[Part]:
    """The parts in their order; `work` is a folder for data and checkpoints."""
    (work / "ladder.toml").write_text(LADDER.format(teacher=4 if miniature else 1000, student=2 if miniature else 150))
    update = ["benchmarks/training.py", "--batch_size", "2" if miniature else "256"]
    update += ["--updates", "1" if miniature else "30"]
    sampling = ["benchmarks/sampling.py", "--batch_size", "2" if miniature else "256"]
    sampling += ["--runs", "1" if miniature else "20", "--steps", "2" if miniature else "8"]
    ladder = ["benchmarks/ladder.py", "--data", str(work / "digits"), "--config", str(work / "ladder.toml")]
    ladder += ["--teacher_steps", "4" if miniature else "64", "--num", "50" if miniature else "1797"]
    compiled = [  # last: compiling takes minutes
        Part("Update, bf16, compiled", [*update, "--precision", "bf16", "--compile"]),
        Part("Sampling, bf16, compiled", [*sampling, "--precision", "bf16", "--compile", "yes"]),
    ]
    return [
        Part("Tests on the device", ["-m", "pytest", "-q", "tests/test_cuda.py"]),
        Part("Update, fp32 (TF32 products)", [*update, "--precision", "fp32", "--no-compile"]),
        Part("Update, bf16", [*update, "--precision", "bf16", "--no-compile"]),
        Part("Sampling", [*sampling, "--precision", "fp32,bf16"]),
        Part("Data for the ladder", ["prepare_data.py", "--out", str(work / "digits")]),
        Part("A short ladder", [*ladder, "--work", str(work / "ladder")]),
        *([] if miniature else compiled),
    ]


def outcome(part: Part, seconds: float, env: dict[str, str]) -> tuple[str, str]:
    """Run a part for at most `seconds`: what became of it, and what it printed."""
    if seconds < 1:
        return "no time left", ""
    command = [sys.executable, *part.command]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=env, timeout=seconds, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
    except subprocess.TimeoutExpired as stop:
        return "out of time", (stop.stdout or b"").decode(errors="replace")
    return ("done" if done.returncode == 0 else f"failed ({done.returncode})"), done.stdout


@click.command()
@click.option("--miniature", is_flag=True, help="A few updates of tiny batches, to see that it runs.")
@click.option("--seconds", default=480, show_default=True, help="At most so long in all.")
@click.option("--out", type=click.Path(path_type=Path), default=RESULTS / "gpu.md", show_default="results/gpu.md")
def main(miniature: bool, seconds: int, out: Path) -> None:
    """Run all parts, print their tables and write them to one file."""
    began = time.monotonic()
    rows: list[str] = []
    tables: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        env = os.environ | {"BENCHMARK_RESULTS": scratch, "VDIFF_REPORT": "False", "COLUMNS": "100"}
        for part in parts(Path(scratch), miniature=miniature):
            started = time.monotonic()
            state, text = outcome(part, seconds - (started - began), env)
            taken = time.monotonic() - started
            print(f"{part.title}: {state} after {taken:.0f} s", flush=True)
            rows.append(f"| {part.title} | {state} | {taken:.0f} |")
            # a table where there is one, else the last lines, which tell what happened
            _, begins, table = f"\n{text}".replace(scratch, "WORK").rpartition("\n# ")
            tail = "\n".join(text.replace(scratch, "WORK").splitlines()[-15:])
            is_table = begins and state == "done"
            tables.append(f"## {part.title}\n\n" + (table.strip() if is_table else f"```\n{tail or state}\n```"))
            print(tables[-1] + "\n", flush=True)
            head = ["# On a GPU", "", f"`python benchmarks/gpu.py{' --miniature' * miniature}`, {machine()}", ""]
            head += ["| part | outcome | seconds |", "| --- | --- | --- |", *rows, ""]
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text("\n".join(head) + "\n" + "\n\n".join(tables) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
