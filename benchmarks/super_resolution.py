"""Super-resolution of digits, 4 × 4 → 8 × 8: a conditioned teacher and its few-step students beside bicubic resizing.

    python benchmarks/super_resolution.py           # ten minutes of one core: results/super_resolution.md and .png
    python benchmarks/super_resolution.py --quick   # a minute, to see that it runs; writes nothing

A small image is the mean of each 2 × 2 pixels of a digit; its condition is bicubic, from `prepare_data.py --condition`.
The models learn on five sixths of scikit-learn's digits; all figures are those of the other sixth, from one sample of
each condition. PSNR to the truth: 10 log₁₀(2² / mean squared error). Distance: Fréchet distance on pixels to the true
digits. The mean of eight samples shows what PSNR rewards: it is nearer to E[x | condition], and no digit.
"""

from __future__ import annotations

import math
import shutil
import sys
from pathlib import Path

import click
import numpy as np
import PIL.Image
import torch
from sklearn.datasets import load_digits
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks.distances import PixelDistance
from benchmarks.report import RESULTS, machine, write_report
from vdiff.data.conversion import ConversionConfig
from vdiff.data.disk_sources import Folder
from vdiff.data.images import captioned_grid, save_png
from vdiff.data.preparation import prepare
from vdiff.data.source import SourceOptions
from vdiff.evaluation.reference import ReferenceImages
from vdiff.models.codec import from_uint8

SIDE, STEPS, TEACHER_STEPS = 8, (16, 4, 1), 64
"""Pixels of a side; steps of the first teacher of the ladder and of the students that are shown."""
UNET = {"channels": 32, "embedding_channels": 128, "multipliers": [1, 2], "num_blocks": 1, "attention_strides": []}
SHOWN = 8


def write_pairs(work: Path) -> dict[str, Path]:
    """The datasets `train` and `test`, prepared from folders of digits and of small digits."""
    pixels = np.floor(load_digits().images * (255 / 16) + 0.5).astype(np.uint8)
    config = ConversionConfig(sizes=(SIDE,), channels=1, resample="bicubic", image_format="png")
    datasets = {}
    for name, chosen in (("train", lambda k: k % 6 != 0), ("test", lambda k: k % 6 == 0)):
        datasets[name] = work / "data" / name
        if datasets[name].exists():
            continue
        for k in filter(chosen, range(len(pixels))):
            image = PIL.Image.fromarray(pixels[k])
            small = image.resize((SIDE // 2, SIDE // 2), PIL.Image.Resampling.BOX)
            for folder, picture in (("large", image), ("small", small)):
                path = work / folder / name / f"{k:04d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)
        source = Folder(work / "large" / name, SourceOptions(condition=str(work / "small" / name)))
        prepare(source, datasets[name], config)
    return datasets


def psnr(images: Tensor, truth: Tensor) -> float:
    """10 log₁₀(2² / mean squared error), in dB."""
    return 10 * math.log10(4 / float((images - truth).square().mean()))


@click.command()
@click.option("--quick", is_flag=True, help="Few updates; nothing is written.")
@click.option("--work", type=click.Path(path_type=Path), default=Path("super_resolution"), show_default=True)
def main(quick: bool, work: Path) -> None:
    """Print the table and write it to benchmarks/results/super_resolution.md, the picture beside it."""
    torch.set_num_threads(1)
    datasets = write_pairs(work)
    updates, part, count = (4, 1, 64) if quick else (2400, 300, 300)
    common = {"device": "cpu", "threads": 1, "batch_size": 64, "num_workers": 0, "lr": 1e-3}
    learning = {**common, "num_iters": updates, "num_timesteps": TEACHER_STEPS, "unet": UNET, "ema": 0.995}
    teacher = vdiff.train("digits", datasets["train"], out=work / "teacher", **learning).finish()
    ladder = {**common, "num_iters": part, "teacher_steps": STEPS[0], "to_steps": STEPS[-1]}
    vdiff.distill(work / "teacher", data=datasets["train"], out=work / "students", **ladder).finish()

    images, conditions, _ = ReferenceImages(datasets["test"], SIDE).pairs(range(count), 0)
    truth, given = from_uint8(images), from_uint8(conditions)
    distance = PixelDistance(truth)
    students = [vdiff.load(path, device="cpu") for path in sorted((work / "students").glob("base_*"))]
    drawn = {"bicubic": given, f"teacher, {TEACHER_STEPS} steps": teacher.sample(condition=given)}
    drawn[f"teacher, {STEPS[0]} steps"] = teacher.sample(condition=given, steps=STEPS[0])
    for steps in STEPS[1:]:
        drawn[f"teacher, {steps} step{'s' * (steps > 1)}"] = teacher.sample(condition=given, steps=steps)
        student = next(model for model in students if model.config.num_timesteps == steps)
        drawn[f"student, {steps} step{'s' * (steps > 1)}"] = student.sample(condition=given)
    means = [teacher.sample(condition=given, steps=STEPS[0], seed=seed) for seed in range(8)]
    drawn["mean of 8 samples"] = torch.stack([torch.as_tensor(each) for each in means]).mean(0)
    drawn["truth"] = truth
    rows = [
        [name, "" if each is truth else f"{psnr(torch.as_tensor(each), truth):.2f}", f"{distance(each):z.3f}"]
        for name, each in drawn.items()
    ]
    if quick:
        print("\n".join(" | ".join(row) for row in rows))
        return
    write_report(
        "super_resolution",
        f"Super-resolution of digits, 4 × 4 → 8 × 8, on {len(truth)} digits that the models have not seen: teacher of "
        f"{updates:,} updates, students of {part} an halving (twice as many for 2 and 1 steps), batch 64",
        ["images", "PSNR to truth, dB", "Fréchet distance to truth"],
        rows,
        machine(),
    )
    names = [name for name in drawn if "mean" not in name]
    grid = [[torch.as_tensor(drawn[name])[k] for name in names] for k in range(SHOWN)]
    picture = captioned_grid(grid, [name.replace(", ", "\n") for name in names], title="from 4 to 8 pixels")
    save_png(picture, work / "super_resolution.png")
    shutil.copyfile(work / "super_resolution.png", RESULTS / "super_resolution.png")


if __name__ == "__main__":
    main()
