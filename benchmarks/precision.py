"""bf16 on CPUs: how much faster an update is than in fp32, and what the model loses.

    python benchmarks/precision.py [--updates 300] [--seeds 3]

Each row is a training of the preset digits on 1,500 images with one thread, in a process of its own. Times are seconds
of that process on the processor, as a busy machine changes them little. The quality is the squared error of v on the
297 other images, computed in fp32 from the same noise for all models. bf16 is as good if its mean differs from that of
fp32 by less than seeds differ.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

OUT = Path(__file__).parent / "results" / "precision.md"
NUM_TRAINED, NUM_TIMES, BATCH, LOGGED = 1500, 32, 64, 10


def measure(precision: str, seed: int, updates: int) -> tuple[float, float]:
    """The milliseconds of an update on the processor, and the error of v on images that were not trained on."""
    import torch
    from sklearn.datasets import load_digits

    import vdiff

    torch.set_num_threads(1)
    images = torch.from_numpy(load_digits().images).float()[:, None] / 8 - 1
    training = vdiff.train(
        "digits", images[:NUM_TRAINED], num_iters=updates, batch_size=BATCH, precision=precision, seed=seed,
        threads=1, device="cpu", log_interval=LOGGED, ema=1 - 10 / updates, flip=False,
    )  # fmt: skip
    next(iter(training))  # the first updates choose kernels
    began = time.process_time()
    training.finish()
    spent = 1000 * (time.process_time() - began) / (updates - LOGGED)
    x, generator = images[NUM_TRAINED:], torch.Generator().manual_seed(0)
    errors = []
    for k in range(NUM_TIMES):
        t = (k + 0.5) / NUM_TIMES
        alpha, sigma = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2)
        noise = torch.randn(x.shape, generator=generator)
        with torch.no_grad():
            v = training.model.denoise(alpha * x + sigma * noise, t=t).v
        errors.append(float((v - (alpha * noise - sigma * x)).square().mean()))
    return spent, statistics.fmean(errors)


def main() -> None:
    """Print the table and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--row", nargs=2, metavar=("PRECISION", "SEED"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row:
        print(*measure(asked.row[0], int(asked.row[1]), asked.updates))
        return
    found: dict[str, list[tuple[float, float]]] = {"fp32": [], "bf16": []}
    lines = [
        "# bf16 on a CPU: speed and quality",
        "",
        f"`python benchmarks/precision.py --updates {asked.updates} --seeds {asked.seeds}`: preset digits,",
        f"batch {BATCH}, one thread. Error: of v, on images that were not trained on.",
        "",
        "| seed | ms an update, fp32 | bf16 | error of v, fp32 | bf16 |",
        "|--:|--:|--:|--:|--:|",
    ]
    for seed in range(asked.seeds):
        for precision, rows in found.items():
            words = [sys.executable, __file__, "--updates", str(asked.updates), "--row", precision, str(seed)]
            env = {**os.environ, "OMP_NUM_THREADS": "1"}
            said = subprocess.run(words, check=True, capture_output=True, text=True, env=env).stdout
            rows.append((float(said.split()[0]), float(said.split()[1])))
        (slow, exact), (fast, rounded) = found["fp32"][-1], found["bf16"][-1]
        lines.append(f"| {seed} | {slow:.0f} | {fast:.0f} | {exact:.4f} | {rounded:.4f} |")
        print(lines[-1], flush=True)
    ratio = statistics.median(slow[0] / fast[0] for slow, fast in zip(found["fp32"], found["bf16"], strict=True))
    errors = {precision: [error for _, error in rows] for precision, rows in found.items()}
    worse = statistics.fmean(errors["bf16"]) - statistics.fmean(errors["fp32"])
    spread = statistics.stdev(errors["fp32"]) if asked.seeds > 1 else math.nan
    lines += [
        "",
        f"An update in bf16 is {ratio:.2f} times as fast. Its error differs from that of fp32 by {worse:+.4f}; seeds",
        f"differ by {spread:.4f} (standard deviation, fp32).",
    ]
    print(*lines[-2:], sep="\n")
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
