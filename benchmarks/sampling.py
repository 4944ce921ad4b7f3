"""Milliseconds an evaluation and images a second: vdiff beside diffusers' pipeline with the very same weights.

    python benchmarks/sampling.py                                  # the 6.5M UNet of benchmarks/training.py, 32×32
    python benchmarks/sampling.py --batch_size 256 --precision fp32,bf16 --compile both    # on a GPU
    python benchmarks/sampling.py --checkpoint checkpoints/base_5  # a checkpoint of one's own

The checkpoint (without --checkpoint: random weights) is written as a `DDIMPipeline` by `vdiff export diffusers`, and
loaded by diffusers alone, as it comes and channels-last. All draw with DDIM without a clip, in the same steps and the
same number of images at once, in one process and in turns, there and back again; medians are compared. That both sides
draw the same images from the same noise is looked at first. On CUDA fp32 means products and convolutions in TF32 for
every side, as `sample.py` has it; torch alone has convolutions in it only.

An evaluation is one call of the network at its time; drawing is everything from noise to float images on the CPU:
`Model.sample` here, `DDIMPipeline.__call__` with `output_type="np"` there.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
from diffusers import DDIMPipeline
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks.report import machine, write_report
from vdiff.distributed import pick_device
from vdiff.interop.diffusers.writing import export_pipeline
from vdiff.models.backbone import count_flops
from vdiff.models.checkpoint import CheckpointConfig, read_config, save_checkpoint
from vdiff.models.speed import DTYPES
from vdiff.models.unet_config import UNetConfig

SIZE = 32
UNET: dict[str, Any] = {
    "in_channels": 3, "out_channels": 3, "channels": 64, "embedding_channels": 256, "multipliers": [1, 2, 2],
    "num_blocks": 2, "attention_strides": [4], "resample": "conv", "time_affine": False,
}  # fmt: skip
TOLERANCE = 1e-3
WARM_UP = 3
Run = Callable[[], object]


class Side:
    """One way of drawing: an evaluation and a drawing, and the times they took."""

    def __init__(self, by: str, precision: str, evaluate: Run, draw: Run | None) -> None:
        self.by, self.precision = by, precision
        self.runs = {"evaluation": evaluate, "drawing": draw}
        self.milliseconds: dict[str, list[float]] = {name: [] for name in self.runs}

    def time(self, name: str) -> None:
        """Run once, to the end."""
        run = self.runs[name]
        if run is None:
            return
        # one switch for the whole process, which `vdiff.load` sets as its own precision wants it
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        began = time.perf_counter()
        run()
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.milliseconds[name].append(1000 * (time.perf_counter() - began))

    def median(self, name: str) -> float:
        """Milliseconds, without the first runs; NaN where nothing ran."""
        return statistics.median(self.milliseconds[name][WARM_UP:] or [math.nan])


def write_random(folder: Path) -> None:
    """A checkpoint of random weights, none of them zero as they are before training."""
    config = CheckpointConfig(
        unet=UNetConfig.from_dict(UNET).to_dict(), schedule={"name": "cosine"}, prediction="v", num_timesteps=1024,
        image_size=SIZE, method="base", weights="raw", num_iters=0, target_iters=0, num_images=0, dataset="",
        dataset_fingerprint="",
    )  # fmt: skip
    denoiser = config.build()
    generator = torch.Generator().manual_seed(0)
    for parameter in denoiser.parameters():
        if not parameter.any():
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=generator)
    save_checkpoint(folder, denoiser.state_dict(), config)


def ours(checkpoint: Path, device: str, precision: str, *, compiled: bool, batch_size: int, steps: int) -> Side:
    """`vdiff.load`, as it is."""
    asked = "auto" if precision == "fp32" else precision
    model = vdiff.load(checkpoint, device=device, precision=asked, compiled=compiled)
    z = torch.randn(batch_size, *model.shape, device=model.device)
    timestep = torch.full((batch_size,), 511.0, device=model.device)

    def evaluate() -> None:
        with torch.inference_mode():
            model.denoiser.network(z, timestep)

    def draw() -> Tensor:
        return model.sample(batch_size, steps=steps, clipping_value=None, batch_size=batch_size)

    return Side("vdiff" + (" compiled" if compiled else ""), precision, evaluate, draw)


def load_theirs(folder: Path, device: torch.device, precision: str) -> DDIMPipeline:
    """The pipeline, without its progress bar."""
    pipeline = DDIMPipeline.from_pretrained(folder).to(device, DTYPES[precision])
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def theirs(
    folder: Path,
    device: torch.device,
    precision: str,
    layout: torch.memory_format,
    *,
    compiled: bool,
    batch_size: int,
    steps: int,
) -> Side:
    """The pipeline, as its model card says; another layout of its weights is what its documentation advises."""
    pipeline = load_theirs(folder, device, precision)
    pipeline.unet.to(memory_format=layout)
    if compiled:
        pipeline.unet.compile(mode="reduce-overhead" if device.type == "cuda" else None)
    size, channels = pipeline.unet.config.sample_size, pipeline.unet.config.in_channels
    z = torch.randn(batch_size, channels, size, size, device=device, dtype=DTYPES[precision])
    timestep = torch.tensor(511, device=device)

    def evaluate() -> None:
        with torch.inference_mode():
            pipeline.unet(z, timestep)

    def draw() -> Any:
        return pipeline(batch_size=batch_size, num_inference_steps=steps, output_type="np").images

    # its pipeline makes NumPy arrays of what the network answers, and there are none of bfloat16
    drawing = None if precision == "bf16" else draw
    name = "diffusers" + (" channels-last" if layout is torch.channels_last else "") + (" compiled" if compiled else "")
    return Side(name, precision, evaluate, drawing)


def difference(checkpoint: Path, folder: Path, device: torch.device, steps: int) -> float:
    """The largest difference between the images of both sides from the same noise, in plain fp32."""
    model = vdiff.load(checkpoint, device=device.type, precision="fp32")
    pipeline = load_theirs(folder, device, "fp32")
    noise = torch.randn(4, *model.shape, generator=torch.Generator().manual_seed(1))
    expected = model.sample(noise=noise, steps=steps, clipping_value=None)
    pipeline.scheduler.set_timesteps(steps)
    z = noise.to(pipeline.device)
    with torch.inference_mode():
        for t in pipeline.scheduler.timesteps:
            z = pipeline.scheduler.step(pipeline.unet(z, t).sample, t, z).prev_sample
    return float((z.clamp(-1, 1).cpu() - expected).abs().max())


def figure(value: float, digits: int) -> str:
    """A number, or a dash for none."""
    return "–" if math.isnan(value) else f"{value:.{digits}f}"


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="Default: random weights of the 6.5M UNet.")
@click.option("--batch_size", default=16, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Of a drawing.")
@click.option("--runs", default=30, show_default=True, help="Timed runs of each side, after 3 that are not.")
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="fp32", show_default=True, help="Several by commas: fp32, bf16, fp16.")
@click.option("--compile", "compiles", type=click.Choice(["no", "yes", "both"]), default="no", show_default=True)
def main(
    checkpoint: Path | None, batch_size: int, steps: int, runs: int, device: str, precision: str, compiles: str
) -> None:
    """Print the table and write it to benchmarks/results/sampling.md."""
    place = pick_device(device)
    with tempfile.TemporaryDirectory() as scratch:
        if checkpoint is None:
            write_random(checkpoint := Path(scratch) / "random")
        config = read_config(checkpoint)
        export_pipeline(checkpoint, folder := Path(scratch) / "pipeline", clip=False)
        if (found := difference(checkpoint, folder, place, steps)) > TOLERANCE:
            raise click.ClickException(f"the two draw other images: they differ by {found:.2g}")
        sides: list[Side] = []
        for name in precision.split(","):
            for compiled in {"no": [False], "yes": [True], "both": [False, True]}[compiles]:
                options = {"compiled": compiled, "batch_size": batch_size, "steps": steps}
                sides.append(ours(checkpoint, place.type, name, **options))
                sides += [
                    theirs(folder, place, name, layout, **options)
                    for layout in (torch.contiguous_format, torch.channels_last)
                ]
        for name in ("evaluation", "drawing"):
            for turn in range(runs + WARM_UP):
                for side in sides if turn % 2 else reversed(sides):
                    side.time(name)
    base = sides[1]  # diffusers as it comes, uncompiled where that is asked for, in the first precision
    rows = [
        [
            side.by,
            side.precision,
            figure(side.median("evaluation"), 1),
            figure(side.median("evaluation") / base.median("evaluation"), 2),
            figure(1000 * batch_size / side.median("drawing"), 1),
            figure(side.median("drawing") / base.median("drawing"), 2),
        ]
        for side in sides
    ]
    parameters, flops = count_flops(lambda: config.build().network, config.shape)
    size = config.image_size
    title = (
        f"Sampling: {parameters / 1e6:.1f} M parameters, {flops / 1e9:.2f} GFLOP an evaluation, "
        f"{size}×{size}, batch {batch_size}, {steps} steps, {place.type}"
    )
    columns = ["by", "precision", "ms an evaluation", "× diffusers", "images/s", "time × diffusers"]
    where = f"{machine()}, diffusers {diffusers.__version__}; largest difference of the images: {found:.1g}"
    write_report("sampling", title, columns, rows, where)


if __name__ == "__main__":
    main()
