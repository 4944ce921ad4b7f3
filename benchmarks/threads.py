"""Updates a second by threads, by how threads wait for each other, by precision, and beside other programs.

    python benchmarks/threads.py             # results/threads.md; alone on the machine: it makes its own load
    python benchmarks/threads.py --quick     # a minute, to see that it runs; writes nothing

The network and batch of the preset digits; each cell is a process of its own, as OpenMP reads its variables once.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

SECONDS = 5.0
WAITING = {
    "default": {},
    "spin 10000": {"GOMP_SPINCOUNT": "10000"},
    "spin 1000": {"GOMP_SPINCOUNT": "1000"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
}


def measure(num_threads: int, precision: str) -> float:
    """Updates a second of the preset digits, in this process."""
    import torch

    from vdiff.data.batches import Batch
    from vdiff.training.base import describe, resolve_training
    from vdiff.training.base_training import base_task
    from vdiff.training.engine import build_engine
    from vdiff.training.step import TrainStep

    flags = {"preset": "digits", "device": "cpu", "threads": num_threads, "precision": precision}
    config, images = resolve_training(flags, None, folder=Path("none"), resume=False, assume=True)
    step = TrainStep(base_task(config, describe(config, images).build()), build_engine(config))
    batch = Batch(torch.zeros(config.batch_size, *images.shape, dtype=torch.uint8), None)
    step(0, batch)
    began, done = time.monotonic(), 0
    while time.monotonic() - began < SECONDS:
        done += 1
        step(done, batch)
    return done / (time.monotonic() - began)


def rates(num_threads: int, precision: str, environment: dict[str, str], num_others: int) -> float:
    """The same in a new process, beside so many programs that compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(num_others)]
    try:
        words = [sys.executable, __file__, str(num_threads), precision]
        done = subprocess.run(words, check=True, capture_output=True, text=True, env={**os.environ, **environment})
    finally:
        for other in others:
            other.kill()
            other.wait()
    return float(done.stdout)


def main() -> None:
    """Print the table and write it."""
    quick = sys.argv[1:] == ["--quick"]
    if len(sys.argv) > 1 and not quick:
        print(measure(int(sys.argv[1]), sys.argv[2]))
        return

    from benchmarks.report import machine, write_report

    cores = os.cpu_count() or 1
    load = f", load {os.getloadavg()[0]:.1f} before it began" if hasattr(os, "getloadavg") else ""
    settings = [(1, "default", "fp32"), *((cores, waiting, "fp32") for waiting in WAITING), (cores, "default", "bf16")]
    rows = []
    for num_threads, waiting, precision in settings[:1] if quick else settings:
        found = [rates(num_threads, precision, WAITING[waiting], others) for others in (0, cores)]
        rows.append([str(num_threads), waiting, precision, *(f"{rate:.2f}" for rate in found)])
        print(*rows[-1], flush=True)
    if not quick:
        columns = ["threads", "waiting", "precision", "alone", f"beside {cores} busy programs"]
        write_report("threads", "Updates a second of the preset digits on CPUs", columns, rows, machine() + load)


if __name__ == "__main__":
    main()
