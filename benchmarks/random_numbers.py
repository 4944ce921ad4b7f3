"""What a process draws for one update: the noise of the whole batch, as earlier versions did, and that of its share.

    python benchmarks/random_numbers.py                # batches of 2048 images of 3×128×128, on the CPU or the GPU
    python benchmarks/random_numbers.py --batch_size 64 --size 32

Each row is a process of its own: seconds are the best of three, memory is what was taken beyond what the process had
before.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import click
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.training.random_numbers import UpdateRandom, WholeBatchRandom

REPEATS = 3
PROCESSES = (1, 2, 8)
HEAD = ["processes", "drawn", "seconds an update", "MiB"]


def measure(kind: str, processes: int, batch_size: int, size: int) -> tuple[float, float]:
    """Seconds and MiB of what the first of `processes` draws."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, shape = range(batch_size // processes), (3, size, size)

    def draw(update: int) -> torch.Tensor:
        if kind == "share":
            return UpdateRandom(0, update, rows, device).normal(shape)
        return WholeBatchRandom(rows, batch_size, device).normal(shape)

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    UpdateRandom(0, 0, range(1), device).normal((8,))  # whatever is made once
    before, seconds = _memory(device), []
    for update in range(REPEATS):
        began = now()
        draw(update)
        seconds.append(now() - began)
    return min(seconds), (_memory(device) - before) / 2**20


def _memory(device: torch.device) -> int:
    """The most bytes that were taken so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@click.command()
@click.option("--batch_size", default=2048, show_default=True)
@click.option("--size", default=128, show_default=True, help="Height and width.")
@click.option("--one", type=(str, int), help="Measure one row, and print it as JSON.")
def main(batch_size: int, size: int, one: tuple[str, int] | None) -> None:
    """Print the table, and write it to benchmarks/results."""
    if one:
        print(json.dumps(measure(*one, batch_size, size)))
        return
    table = []
    for processes in PROCESSES:
        for kind in ("whole", "share"):
            words = [__file__, "--batch_size", batch_size, "--size", size, "--one", kind, processes]
            done = subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, check=True)
            seconds, memory = json.loads(done.stdout)
            table.append([str(processes), {"whole": "whole batch", "share": "its share"}[kind],
                          f"{seconds:.3f}", f"{memory:.0f}"])  # fmt: skip
    title = f"Random numbers of an update in one process, {batch_size} images of 3×{size}×{size}"
    write_report("random_numbers", title, HEAD, table, machine())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
