"""Milliseconds an update: vdiff beside diffusers' `UNet2DModel` of the same shape, as its training script runs it.

    python benchmarks/training.py          # the 7M UNet: 64 channels, multipliers 1,2,2, 32×32, batch 16

Both sides do the same in an update: noise, forward, backward, clip at 1, AdamW, moving average of the weights. A
distillation update adds two passes of the teacher. The sides take turns in one process, and medians are compared.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.data.batches import Batch
from vdiff.data.images import from_uint8
from vdiff.diffusion.distillation import METHODS
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.unet import parameter_count
from vdiff.training.averages import Averages, Exponential
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine, build_engine
from vdiff.training.loop import Run, build_update
from vdiff.training.objectives import DenoisingObjective, DistillationObjective
from vdiff.training.optimisation import build_optimizer

SIZE, STUDENT_STEPS = 32, 4
UNET = {
    "in_channels": 3, "out_channels": 3, "channels": 64, "embedding_channels": 256, "multipliers": [1, 2, 2],
    "num_blocks": 2, "attention_strides": [4], "resample": "conv", "time_affine": False,
}  # fmt: skip
Update = Callable[[int, Tensor], object]


def ours(engine: Engine, config: LoopConfig, *, distil: bool) -> tuple[Update, int]:
    """An update of vdiff's loop, and the parameters it trains."""
    description = CheckpointConfig(
        unet=UNET, schedule={"name": "cosine"}, prediction="v", num_timesteps=1024, image_size=SIZE, method="base",
        weights="ema", num_iters=0, target_iters=1, num_images=0, dataset="", dataset_fingerprint="",
    )  # fmt: skip
    denoiser = engine.place(description.build()).train()
    average, optimizer = Averages(denoiser, Exponential(config.ema)), build_optimizer(denoiser, config)
    objective: DenoisingObjective | DistillationObjective = DenoisingObjective(denoiser.schedule)
    if distil:
        teacher = engine.compiled(engine.place(description.build())).requires_grad_(False).eval()
        objective = DistillationObjective(teacher, METHODS["progressive"], STUDENT_STEPS)
    run = Run(denoiser, objective, None, config, description, Path(tempfile.gettempdir()))  # type: ignore[arg-type]
    update = build_update(run, engine, denoiser, average, optimizer)
    return lambda step, images: update(step, Batch(images, None)), parameter_count(denoiser)


def theirs(accelerator: Accelerator, config: LoopConfig, *, distil: bool) -> tuple[Update, int]:
    """The update of diffusers' `train_unconditional.py` with `--use_ema`; distilling, its v-target from DDIM steps."""
    model = UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(64, 128, 128),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=128,
    )
    ema = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, model_cls=UNet2DModel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.95, 0.999), weight_decay=1e-6)
    scheduler = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    network, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    ema.to(accelerator.device)
    noising = DDPMScheduler(num_train_timesteps=1000, beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")
    ddim = DDIMScheduler.from_config(noising.config)
    ddim.set_timesteps(2 * STUDENT_STEPS)
    teacher = UNet2DModel.from_config(model.config).to(accelerator.device).eval() if distil else None
    alphas_cumprod = noising.alphas_cumprod.to(accelerator.device)

    def target(z: Tensor, start: int) -> tuple[Tensor, int]:
        """v that leads from z to where two steps of the teacher lead."""
        assert teacher is not None
        times = ddim.timesteps[start : start + 2]
        with torch.no_grad(), accelerator.autocast():
            end = z
            for t in times:
                end = ddim.step(teacher(end, t).sample, int(t), end).prev_sample
        after = ddim.timesteps[start + 2] if start + 2 < len(ddim.timesteps) else 0
        a_t, a_s = alphas_cumprod[times[0]], alphas_cumprod[after]
        delta = torch.atan2((1 - a_t).sqrt(), a_t.sqrt()) - torch.atan2((1 - a_s).sqrt(), a_s.sqrt())
        return (delta.cos() * z - end) / delta.sin(), int(times[0])

    def update(step: int, images: Tensor) -> object:
        images = from_uint8(images.to(accelerator.device))
        noise = torch.randn_like(images)
        if teacher is None:
            t = torch.randint(0, 1000, (len(images),), device=images.device)
            z = noising.add_noise(images, noise, t)
            wanted = noising.get_velocity(images, noise, t)
        else:
            start = 2 * (step % STUDENT_STEPS)
            t = ddim.timesteps[start].expand(len(images)).to(images.device)
            z = noising.add_noise(images, noise, t)
            wanted, _ = target(z, start)
        with accelerator.accumulate(network):
            loss = F.mse_loss(network(z, t).sample.float(), wanted.float())
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        ema.step(network.parameters())
        return loss.detach().item()  # the script logs it at every step

    return update, sum(p.numel() for p in model.parameters())


def milliseconds(update: Update, step: int, images: Tensor) -> float:
    """One update, to its end."""
    began = time.perf_counter()
    update(step, images)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - began)


@click.command()
@click.option("--batch_size", default=16, show_default=True)
@click.option("--updates", default=30, show_default=True, help="Timed updates of each side, after 5 that are not.")
@click.option("--device", default="auto", show_default=True)
@click.option("--precision", default="auto", show_default=True)
@click.option("--compile/--no-compile", "compiles", default=None, help="Compile vdiff's side; default: on CUDA.")
def main(batch_size: int, updates: int, device: str, precision: str, compiles: bool | None) -> None:
    """Print the table and write it to benchmarks/results/training.md."""
    config = LoopConfig(
        num_iters=10**6, batch_size=batch_size, lr=1e-4, device=device, precision=precision, compile=compiles
    )
    engine = build_engine(config)
    images = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    rows = []
    for name, distil in (("training", False), ("distillation", True)):
        sides = [ours(engine, config, distil=distil), theirs(engine.accelerator, config, distil=distil)]
        times: list[list[float]] = [[], []]
        for step in range(updates + 5):
            for (update, _), found in zip(sides, times, strict=True):
                found.append(milliseconds(update, step, images))
        medians = [statistics.median(found[5:]) for found in times]
        for who, (_, parameters), median in zip(("vdiff", "diffusers"), sides, medians, strict=True):
            ratio = f"{median / medians[1]:.2f}"
            rows.append([name, who, f"{parameters / 1e6:.2f} M", f"{median:.0f}", ratio])
    write_report(
        "training",
        f"Milliseconds an update: {SIZE}×{SIZE}, batch {batch_size}, {engine.description}",
        ["update", "by", "parameters", "ms (median)", "× diffusers"],
        rows,
        machine(),
    )


if __name__ == "__main__":
    main()
