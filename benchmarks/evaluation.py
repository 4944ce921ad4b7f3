"""Whether an evaluation's memory depends on the number of samples: the peak at a small and a large n.

    python benchmarks/evaluation.py                  # n = 2,000 and n = 50,000, a network of a few channels, 8×8 pixels

Each n is measured in a process of its own, which finds the data's statistics in the cache; the peak is the most that
the process had in memory at any time, as the system tells it.
"""

from __future__ import annotations

import io
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.data.store import DatasetMeta, StoreWriter
from vdiff.evaluation.measure import evaluate
from vdiff.models.checkpoint import CheckpointConfig, save_checkpoint
from vdiff.models.unet_config import UNetConfig

SIZE, DATA = 8, 12_000


def write_inputs(folder: Path) -> None:
    """A one-step model with random weights, and images of noise."""
    shape = {"channels": 4, "embedding_channels": 8, "multipliers": [1], "num_blocks": 1, "attention_strides": []}
    unet = UNetConfig.from_dict({**shape, "in_channels": 1, "out_channels": 1})
    config = CheckpointConfig(
        unet=unet.to_dict(),
        schedule={"name": "cosine"},
        prediction="v",
        num_timesteps=1,
        image_size=SIZE,
        method="base",
        weights="raw",
        num_iters=1,
        target_iters=1,
        num_images=1,
        dataset="noise",
        dataset_fingerprint="",
    )
    torch.manual_seed(0)
    save_checkpoint(folder / "model", config.build().state_dict(), config)
    (folder / "data").mkdir()
    rng = np.random.default_rng(0)
    writer = StoreWriter(folder / "data", DatasetMeta("noise", (SIZE,), 1))
    for _ in range(DATA):
        buffer = io.BytesIO()
        PIL.Image.fromarray(rng.integers(0, 256, (SIZE, SIZE), dtype=np.uint8)).save(buffer, format="PNG")
        writer.add({SIZE: buffer.getvalue()}, None)
        if writer.is_due:
            writer.commit()
    writer.finish({"images": DATA})


def peak_megabytes() -> float:
    """The most memory that this program has held; `getrusage` would count what its parent held when it started it."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1e3


def measure(folder: Path, n: int) -> None:
    """One evaluation with all metrics; prints the peak in MB, the seconds it took, and the Fréchet distance."""
    began = time.perf_counter()
    found = evaluate([folder / "model"], folder / "data", n=n, batch_size=500, device="cpu", cache=folder / "cache")
    print(peak_megabytes(), time.perf_counter() - began, found.rows[0].metrics["fd"].value)


@click.command()
@click.option("--few", default=2_000, show_default=True, help="The small n.")
@click.option("--many", default=50_000, show_default=True, help="The large n.")
@click.option("--one", type=int, hidden=True)
@click.option("--place", type=click.Path(path_type=Path), hidden=True)
def main(few: int, many: int, one: int | None, place: Path | None) -> None:
    """Measure the memory of an evaluation."""
    if one is not None and place is not None:
        measure(place, one)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_inputs(folder)
        rows, peaks = [], []
        for n in (few, few, many):  # the first one reads the data, the others find them in the cache
            command = [sys.executable, __file__, "--one", str(n), "--place", str(folder)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            peak, seconds, distance = map(float, done.stdout.split())
            peaks.append(peak)
            rows.append([f"{n:,}", f"{peak:.0f} MB", f"{seconds:.1f}", f"{1000 * seconds / n:.2f}", f"{distance:.4f}"])
        rows = rows[1:]
        rows.append(["ratio", f"{peaks[2] / peaks[1]:.3f}", "", "", ""])
    title = f"Memory of an evaluation: {SIZE}×{SIZE} pixels, all metrics, {DATA:,} images of data"
    write_report(
        "evaluation", title, ["n", "peak memory", "seconds", "ms a sample", "Fréchet distance"], rows, machine()
    )


if __name__ == "__main__":
    main()
