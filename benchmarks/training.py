"""Milliseconds an update: vdiff beside other packages at the same shape of UNet, precision and batch.

    python benchmarks/training.py          # the 7M UNet: 64 channels, multipliers 1,2,2, 32×32, batch 16
    python benchmarks/training.py --preset cifar10 --channels 192 --batch_size 512     # on a GPU: about 35M parameters

- diffusers: `UNet2DModel` of the same shape, as `train_unconditional.py` runs it with `--use_ema`.
- denoising-diffusion-pytorch: `Unet` and `GaussianDiffusion` (v), as its `Trainer` runs them; its blocks are others.
- azula: `UNet`, with the recipe of its tutorial; it has no attention, and blocks without norm on the way.

All sides do the same in an update: noise, forward, backward, clip at 1, Adam, moving average of the weights. A
distillation update adds two passes of the teacher. The sides take turns in one process, and medians are compared. As
only diffusers' network can be set alike, there is a column for the arithmetic of one evaluation, and one for the time
of an update over that of a plain matrix product of as many multiplications (three evaluations an update, five with a
teacher), with the part of the product's speed that is used: MFU, against what the device really gives.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click
import torch
from accelerate import Accelerator
from diffusers import DDIMScheduler, DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.data.batches import Batch
from vdiff.diffusion.distillation import METHODS
from vdiff.models.backbone import parameter_count
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import from_uint8
from vdiff.models.unet import timestep_embedding
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine, build_engine
from vdiff.training.objectives import DenoisingObjective, DistillationObjective
from vdiff.training.presets import read_preset
from vdiff.training.step import Task, TrainStep

SIZE, STUDENT_STEPS = 32, 4
UNET = {
    "in_channels": 3, "out_channels": 3, "channels": 64, "embedding_channels": 256, "multipliers": [1, 2, 2],
    "num_blocks": 2, "attention_strides": [4], "resample": "conv", "time_affine": False,
}  # fmt: skip
Update = Callable[[int, Tensor], object]


def ours(engine: Engine, config: LoopConfig, unet: dict[str, Any], *, distil: bool) -> tuple[Update, nn.Module]:
    """An update of vdiff's loop, and the network it trains."""
    description = CheckpointConfig(
        unet=unet, schedule={"name": "cosine"}, prediction="v", num_timesteps=1024, image_size=SIZE, method="base",
        weights="ema", num_iters=0, target_iters=1, num_images=0, dataset="", dataset_fingerprint="",
    )  # fmt: skip
    denoiser = description.build()
    objective: DenoisingObjective | DistillationObjective = DenoisingObjective(denoiser.schedule)
    if distil:
        teacher = engine.compiled(engine.place(description.build())).requires_grad_(False).eval()
        objective = DistillationObjective(teacher, METHODS["progressive"](), STUDENT_STEPS, 2 * STUDENT_STEPS)
    update = TrainStep(Task(denoiser, objective, config), engine)
    return lambda step, images: update(step, Batch(images, None)), denoiser.network


def theirs(accelerator: Accelerator, config: LoopConfig, *, distil: bool) -> tuple[Update, nn.Module]:
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

    return update, model


def lucidrains(accelerator: Accelerator, config: LoopConfig) -> tuple[Update, nn.Module]:
    """The update of denoising-diffusion-pytorch's `Trainer`."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    model = Unet(64, dim_mults=(1, 2, 2), full_attn=(False, False, True), flash_attn=accelerator.device.type == "cuda")
    diffusion = GaussianDiffusion(model, image_size=SIZE, objective="pred_v")
    optimizer = torch.optim.Adam(diffusion.parameters(), lr=config.lr, betas=(0.9, 0.99))
    ema = EMA(diffusion, beta=0.995, update_every=10).to(accelerator.device)
    network, prepared = accelerator.prepare(diffusion, optimizer)

    def update(step: int, images: Tensor) -> object:
        del step
        with accelerator.autocast():
            loss = network(images.to(accelerator.device).float() / 255)  # its data set answers floats in [0, 1]
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(diffusion.parameters(), 1.0)
        prepared.step()
        prepared.zero_grad()
        ema.update()
        return loss.item()  # the trainer sums it at every step

    return update, model


def azula(accelerator: Accelerator, config: LoopConfig) -> tuple[Update, nn.Module]:
    """A training step as azula's tutorial writes it: a modulated UNet, v from x and ε, AdamW, an average."""
    from azula.nn.unet import UNet

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(nn.Linear(64, 256), nn.SiLU(), nn.Linear(256, 256))
            self.unet = UNet(3, 3, mod_features=256, hid_channels=(64, 128, 128), hid_blocks=(2, 2, 2))

        def forward(self, z: Tensor, t: Tensor) -> Tensor:
            answer: Tensor = self.unet(z, self.time(timestep_embedding(1000 * t, 64)))
            return answer

    model = Network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    network, prepared = accelerator.prepare(model, optimizer)
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9999)
    )

    def update(step: int, images: Tensor) -> object:
        del step
        x = from_uint8(images.to(accelerator.device))
        t = torch.rand(len(x), device=x.device)
        alpha, sigma = (f(t * torch.pi / 2)[:, None, None, None] for f in (torch.cos, torch.sin))
        eps = torch.randn_like(x)
        loss = F.mse_loss(network(alpha * x + sigma * eps, t).float(), alpha * eps - sigma * x)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        prepared.step()
        prepared.zero_grad()
        average.update_parameters(model)
        return loss.detach()

    return update, model


PEERS = (("denoising-diffusion-pytorch", "denoising_diffusion_pytorch", lucidrains), ("azula", "azula", azula))


def gigaflops(model: nn.Module, device: torch.device) -> float:
    """Of one evaluation on one image, a multiply-add counting as two."""
    z, t = torch.zeros(1, 3, SIZE, SIZE, device=device), torch.ones(1, device=device)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(z, t)
    return float(counter.get_total_flops()) / 1e9


def product_gigaflops_per_second(device: torch.device, dtype: torch.dtype) -> float:
    """What the device gives in a plain matrix product of 2048² (on a GPU 8192²), the best of ten."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = math.inf
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return 2 * side**3 / best / 1e9


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
@click.option("--preset", default="", help="The network of a preset, for vdiff alone: no other package has it.")
@click.option("--channels", type=int, help="With --preset: another width.")
def main(
    batch_size: int,
    updates: int,
    device: str,
    precision: str,
    compiles: bool | None,
    preset: str,
    channels: int | None,
) -> None:
    """Print the table and write it to benchmarks/results/training.md."""
    config = LoopConfig(
        num_iters=10**6, batch_size=batch_size, lr=1e-4, device=device, precision=precision, compile=compiles
    )
    engine = build_engine(config)
    unet = UNET if not preset else UNET | read_preset(preset).train["unet"] | {"resample": "block", "time_affine": True}
    unet |= {"channels": channels} if channels else {}
    images = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    images = images.pin_memory() if engine.device.type == "cuda" else images
    dtype = torch.float32 if "fp32" in engine.description else torch.bfloat16
    speed = product_gigaflops_per_second(engine.device, dtype)
    where = f"{machine()}; a plain matrix product: {speed:,.0f} GFLOP/s"
    rows = []
    for name, distil in (("training", False), ("distillation", True)):
        sides = [("vdiff", *ours(engine, config, unet, distil=distil))]
        if not preset:
            sides.append(("diffusers", *theirs(engine.accelerator, config, distil=distil)))
        if not preset and not distil:
            for who, module, side in PEERS:
                if find_spec(module):  # they come with the extra `benchmarks`
                    sides.append((who, *side(engine.accelerator, config)))
        times: dict[str, list[float]] = {who: [] for who, _, _ in sides}
        peaks = dict.fromkeys(times, 0)
        for step in range(updates + 5):
            for who, update, _ in sides:
                if engine.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                times[who].append(milliseconds(update, step, images))
                if engine.device.type == "cuda":
                    peaks[who] = max(peaks[who], torch.cuda.max_memory_allocated())
        medians = {who: statistics.median(found[5:]) for who, found in times.items()}
        for who, _, model in sides:
            flops = gigaflops(model, engine.device)
            ideal = (5 if distil else 3) * flops * batch_size / speed * 1000
            rows.append(
                [
                    name,
                    who,
                    f"{parameter_count(model) / 1e6:.2f} M",
                    f"{flops:.2f}",
                    f"{medians[who]:.0f}",
                    f"{medians[who] / medians.get('diffusers', medians['vdiff']):.2f}",
                    f"{1000 * batch_size / medians[who]:.1f}",
                    f"{medians[who] / ideal:.2f} ({100 * ideal / medians[who]:.0f} %)",
                    f"{peaks[who] / 2**30:.1f} GiB" if peaks[who] else "–",
                ]
            )
    columns = [
        "update",
        "by",
        "parameters",
        "GFLOP",
        "ms",
        "× diffusers",
        "images/s",
        "× plain product (MFU)",
        "memory",
    ]
    title = f"An update: {SIZE}×{SIZE}, batch {batch_size}, {engine.description}" + (f", {preset}" if preset else "")
    write_report(f"training_{preset}_{unet['channels']}" if preset else "training", title, columns, rows, where)


if __name__ == "__main__":
    main()
