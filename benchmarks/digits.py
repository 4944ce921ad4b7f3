"""How near samples of the quickstart's models come to real digits: students against plain DDIM of their teacher.

    python benchmarks/digits.py            # after `make quickstart`

Fréchet distance between vectors of the 64 pixels in [−1, 1]: all 1,797 real digits and as many samples. The models saw
the same digits, so this tells how well they learned, not how they generalise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.cli.console import Console
from vdiff.data.batches import decode
from vdiff.data.store import ImageStore
from vdiff.diffusion.samplers import Ddim
from vdiff.distributed import pick_device
from vdiff.evaluation.metrics import frechet_distance
from vdiff.models.checkpoint import load_checkpoint
from vdiff.models.codec import from_uint8
from vdiff.models.drawing import draw

BATCH = 600


def real_digits(path: Path) -> NDArray[np.float32]:
    """(n, 64): every digit of the dataset."""
    store = ImageStore(path)
    pixels = np.stack([decode(store.encoded(8, index), 1, 8, "a digit")[0] for index in range(len(store))])
    return from_uint8(torch.from_numpy(pixels)).flatten(1).numpy()


@click.command()
@click.option("--checkpoints", type=click.Path(path_type=Path), default=Path("checkpoints"), show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default=Path("data/digits_8"), show_default=True)
@click.option("--seeds", default=1, show_default=True, help="Sets of samples; their mean and spread are printed.")
@click.option("--device", default="auto", show_default=True)
@click.option("--name", default="digits", show_default=True, help="Of the file in benchmarks/results.")
def main(checkpoints: Path, data: Path, seeds: int, device: str, name: str) -> None:
    """Print the table and write it to benchmarks/results/NAME.md."""
    real = real_digits(data)
    console = Console()
    students = sorted(checkpoints.glob("base_*"), key=lambda folder: int(folder.name.removeprefix("base_")))
    steps_of = {folder: load_checkpoint(folder)[1].num_timesteps for folder in students}
    rows = []

    def distance(folder: Path, steps: int) -> str:
        denoiser, config = load_checkpoint(folder, pick_device(device))
        found = []
        for seed in range(1, seeds + 1):
            parts = []
            for first in range(0, len(real), BATCH):
                indices = range(first, min(first + BATCH, len(real)))
                images = draw(
                    denoiser, Ddim(), indices=indices, image_size=config.image_size, num_steps=steps, seed=seed
                )
                parts.append(images.flatten(1).clamp(-1, 1))
            found.append(frechet_distance(torch.cat(parts).numpy(), real))
        spread = f" ± {np.std(found):.3f}" if seeds > 1 else ""
        console.line(f"{folder} at {steps} steps: {np.mean(found):.3f}{spread}")
        return f"{np.mean(found):.3f}{spread}"

    teacher = checkpoints / "original"
    first = 2 * max(steps_of.values(), default=32)
    rows.append([str(first), distance(teacher, first), ""])
    for folder, steps in steps_of.items():
        rows.append([str(steps), distance(teacher, steps), distance(folder, steps)])
    write_report(
        name,
        f"Fréchet distance of 64-pixel vectors, n = {len(real)}, {seeds} set(s) of samples",
        ["steps", "teacher, plain DDIM", "student, DDIM"],
        rows,
        machine(),
    )


if __name__ == "__main__":
    main()
