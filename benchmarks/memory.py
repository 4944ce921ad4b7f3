"""How much memory a training takes, estimated before it and measured: a process for each row.

    python benchmarks/memory.py

The peak is what the operating system says of the process (on CUDA, torch of its tensors), after two updates. Some
batches are smaller than the preset's, as large ones take long. Two constants of `vdiff/training/estimate.py` were
fitted to these rows on a CPU, so the differences there say how well they fit, not how well they predict.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROWS = [
    ("digits", 8, []),
    ("small32", 16, []),
    ("small64", 16, []),
    ("small64", 16, ["--checkpointing", "True"]),
    ("base64", 8, []),
    ("base64", 8, ["--precision", "bf16"]),
    ("small256", 8, []),
    ("large64", 4, []),
]
OUT = Path(__file__).parent / "results" / "memory.md"


def measure(preset: str, batch_size: int, more: list[str]) -> str:
    """A row of the table: the estimate, then the peak of two updates, in this process."""
    import torch

    from vdiff.data.batches import Batch
    from vdiff.training.base import describe, resolve_training
    from vdiff.training.base_training import base_task, memory_of_base
    from vdiff.training.engine import build_engine
    from vdiff.training.meter import memory_bytes
    from vdiff.training.step import TrainStep

    words = dict(zip(more[::2], more[1::2], strict=True))
    flags = {"preset": preset, "batch_size": batch_size, "checkpointing": "--checkpointing" in words}
    if precision := words.get("--precision"):
        flags["precision"] = precision
    config, images = resolve_training(flags, None, folder=Path("none"), resume=False, assume=True)
    engine, description = build_engine(config), describe(config, images)
    memory = memory_of_base(config, images, description, engine)
    step = TrainStep(base_task(config, description.build()), engine)
    for n in range(2):
        step(n, Batch(torch.zeros(batch_size, *description.shape, dtype=torch.uint8), None))
    estimated = memory.total if engine.device.type != "cuda" else memory.total - memory.program
    peak = memory_bytes(engine.device)
    cells = [preset, str(batch_size), " ".join(more) or "–", engine.device.type]
    cells += [f"{number / 2**20:,.0f}" for number in (estimated, peak)]
    return f"| {' | '.join(cells)} | {100 * (estimated / peak - 1):+.0f} % |"


def main() -> None:
    """Print the table and write it."""
    if len(sys.argv) > 1:
        print(measure(sys.argv[1], int(sys.argv[2]), sys.argv[3:]))
        return
    lines = [
        "# Memory of a training: estimated and measured",
        "",
        f"`python benchmarks/memory.py`: {os.cpu_count()} cores. MiB of the whole process, Python and its libraries",
        "included (on CUDA, of tensors). The measurement does not depend on how busy the machine is. Two constants of",
        "the estimate were fitted to these rows on a CPU.",
        "",
        "| preset | batch | further flags | device | estimated | measured | difference |",
        "|---|--:|---|---|--:|--:|--:|",
    ]
    for preset, batch_size, more in ROWS:
        words = [sys.executable, __file__, preset, str(batch_size), *more]
        done = subprocess.run(words, check=True, capture_output=True, text=True)
        lines.append(done.stdout.strip())
        print(lines[-1], flush=True)
    OUT.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
