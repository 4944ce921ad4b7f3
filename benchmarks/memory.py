"""How much memory a training takes: the line that a command prints before it begins, and its measured peak.

    python benchmarks/memory.py [FOLDER]

Each row is a command in a process of its own, with three updates, its samples and its verdict. The peak is what the
operating system says of the process when it has ended (`wait4`); the estimate is read from the command's output. So the
two share no code. Batches are small, as the rows are to take minutes on two cores. Linux and macOS, on the CPU.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import PIL.Image

ROOT = Path(__file__).parents[1]
OUT = Path(__file__).parent / "results" / "memory.md"
SIZES = (8, 32, 64, 128)
NUM_IMAGES = 64
SHARED = "--device cpu --num_iters 3 --num_workers 0"
DISTIL = "distill.py --teacher_steps 8 --report False --distance_every 0"
ROWS = [
    "train.py --preset digits --batch_size 128 --data data/8",
    "train.py --preset small64 --batch_size 8 --data data/64 --out checkpoints/small64",
    "train.py --preset small64 --batch_size 16 --data data/64 --checkpointing True",
    "train.py --preset base32 --batch_size 16 --data data/32 --ema_more 0.99,0.999",
    "train.py --preset base64 --batch_size 8 --data data/64 --precision bf16",
    "train.py --preset small128 --batch_size 8 --data data/128",
    "train.py --preset large32 --batch_size 4 --data data/32",
    f"{DISTIL} --base checkpoints/small64 --batch_size 8 --data data/64",
    f"{DISTIL} --base checkpoints/small64 --batch_size 8 --data data/64 --method consistency",
    f"{DISTIL} --base checkpoints/small64 --batch_size 8 --data data/64 --method tract --phases 8,1",
]
LIMIT = 20
"""Per cent by which an estimate may be wrong."""


def prepare(folder: Path) -> None:
    """Datasets of random pictures, of each size."""
    generator = np.random.default_rng(0)
    for size in SIZES:
        (folder / f"pictures/{size}").mkdir(parents=True)
        for k in range(NUM_IMAGES):
            pixels = generator.integers(0, 256, (size, size, 1 if size == SIZES[0] else 3), dtype=np.uint8)
            PIL.Image.fromarray(pixels.squeeze()).save(folder / f"pictures/{size}/{k}.png")
        channels = ["--channels", "1"] if size == SIZES[0] else []
        words = ["prepare_data.py", f"pictures/{size}", "--size", str(size), "--out", f"data/{size}", *channels]
        run(words, folder)


def run(words: list[str], folder: Path) -> tuple[str, int]:
    """Run one of the repository's scripts in `folder`: what it said, and its peak in bytes."""
    log = folder / "log.txt"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / words[0]), *words[1:]], cwd=folder, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(words)} failed:\n{log.read_text()}")
    return log.read_text(), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure(command: str, number: int, folder: Path) -> tuple[str, float]:
    """A row of the table, and by how many per cent the estimate is wrong."""
    words = [*command.split(), *SHARED.split()]
    said, peak = run(words if "--out" in words else [*words, "--out", f"checkpoints/{number}"], folder)
    found = re.search(r"^memory +([\d.]+) of", said, re.MULTILINE)
    if found is None:
        raise SystemExit(f"{command} printed no estimate:\n{said}")
    estimated = float(found[1]) * 2**30
    wrong = 100 * (estimated / peak - 1)
    short = command.replace(DISTIL, "distill.py")
    return f"| `{short}` | {estimated / 2**20:,.0f} | {peak / 2**20:,.0f} | {wrong:+.0f} % |", wrong


def main() -> None:
    """Print the table and write it; fail if an estimate is wrong by more than `LIMIT`."""
    lines = [
        "# Memory of a training: estimated and measured",
        "",
        f"`python benchmarks/memory.py`: {os.cpu_count()} cores. MiB of the whole process, Python and its libraries",
        "included. The measurement does not depend on how busy the machine is. Two constants of the estimate",
        "(`vdiff/training/estimate.py`) were fitted to other rows: two updates, without samples and",
        "verdict.",
        "",
        f"All commands: `{SHARED}`; distill.py also: `{DISTIL.removeprefix('distill.py ')}`.",
        "",
        "| command | estimated | measured | difference |",
        "|---|--:|--:|--:|",
    ]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(temporary)
        prepare(folder)
        found = []
        for number, command in enumerate(ROWS):
            found.append(measure(command, number, folder))
            print(found[-1][0], flush=True)
    lines += [line for line, _ in found]
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if max(abs(wrong) for _, wrong in found) > LIMIT:
        raise SystemExit(f"an estimate is wrong by more than {LIMIT} %")


if __name__ == "__main__":
    main()
