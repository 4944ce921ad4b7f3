"""LoRA training of text-to-image models beside diffusers' own scripts, on tiny pipelines of Stable Diffusion.

Both sides do the same in an update: tokenise captions, encode pictures and prompts, noise, UNet, backward, clip at 1,
AdamW. diffusers' side is the loop of `train_text_to_image_lora.py` and `train_text_to_image_lora_sdxl.py` at their
defaults without mixed precision. The sides take turns, update by update, and medians of the processor's time are
compared, so that waiting for other programs on the machine does not count: run it with OMP_NUM_THREADS=1. Memory is
that of tensors at its peak. `base` is how often the weights of the pipeline are in memory, without what learns.
"""

from __future__ import annotations

import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import diffusers
import torch
import transformers
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from tests.pipelines import pipeline
from tests.text_training import PIXELS, write_captioned, write_text_checkpoint
from vdiff.data.batches import Batch
from vdiff.models.checkpoint import save_checkpoint
from vdiff.reporting import Silent
from vdiff.training.base import describe, resolve_training
from vdiff.training.base_training import base_task, begin
from vdiff.training.engine import build_engine
from vdiff.training.estimate import LiveBytes, num_bytes
from vdiff.training.finetuning import with_fingerprint
from vdiff.training.inputs import inputs_of
from vdiff.training.step import TrainStep
from vdiff.training.weights import trainable

RANK, LR = 8, 1e-4
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


@dataclass(frozen=True)
class Side:
    """One trainer.

    Attributes:
        update: does update n on a batch.
        learns: the weights of the LoRA.
        save: writes the checkpoint into a folder.
    """

    update: Callable[[int, Batch], object]
    learns: list[Tensor]
    save: Callable[[Path], object]


def ours(place: Path, kind: str, batch_size: int) -> Side:
    """vdiff's step, as `train.py --base CHECKPOINT --lora_rank 8 --ema 0` runs it."""
    values = {
        "base": str(place / kind), "data": str(place / "data"), "lora_rank": RANK, "num_iters": 1000, "lr": LR,
        "batch_size": batch_size, "device": "cpu", "precision": "fp32", "num_workers": 0, "ema": 0.0, "flip": False,
        "warmup_iters": 0, "weight_decay": 1e-2, "tracker": "none", "threads": torch.get_num_threads(),
    }  # fmt: skip
    config, images = resolve_training(values, None, folder=Path("none"), resume=False, reporter=Silent())
    description, engine = with_fingerprint(describe(config, images)), build_engine(config)
    step = TrainStep(base_task(config, begin(description), inputs_of(description, engine.device)), engine)
    return Side(
        lambda n, batch: float(step(n, batch).losses.mean()),
        list(trainable(step.denoiser).values()),
        lambda folder: save_checkpoint(folder, step.denoiser.state_dict(), description),
    )


def theirs(kind: str) -> Side:
    """The update of diffusers' scripts, and what they save."""
    root, accelerator = pipeline(kind), Accelerator(mixed_precision="no")
    is_xl = kind == "sdxl"
    noising = diffusers.DDPMScheduler.from_pretrained(root / "scheduler")
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "unet").requires_grad_(False)
    vae = diffusers.AutoencoderKL.from_pretrained(root / "vae").requires_grad_(False)
    tokenizers = [transformers.CLIPTokenizer.from_pretrained(root / "tokenizer")]
    encoders = [transformers.CLIPTextModel.from_pretrained(root / "text_encoder").requires_grad_(False)]
    if is_xl:
        tokenizers.append(transformers.CLIPTokenizer.from_pretrained(root / "tokenizer_2"))
        second = transformers.CLIPTextModelWithProjection.from_pretrained(root / "text_encoder_2")
        encoders.append(second.requires_grad_(False))
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=TARGETS))
    learns = [weight for weight in unet.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(learns, lr=LR, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    scheduler = get_scheduler("constant", optimizer=optimizer)
    network, optimizer, scheduler = accelerator.prepare(unet, optimizer, scheduler)
    network.train()

    def embeddings(numbers: list[Tensor], count: int) -> tuple[Tensor, dict[str, Tensor] | None]:
        if not is_xl:
            return encoders[0](numbers[0], return_dict=False)[0], None
        outputs = [
            encoder(ids, output_hidden_states=True, return_dict=False)
            for encoder, ids in zip(encoders, numbers, strict=True)
        ]
        text = torch.cat([output[-1][-2] for output in outputs], dim=-1)
        time_ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]] * count)
        return text, {"time_ids": time_ids, "text_embeds": outputs[1][0]}

    def update(n: int, batch: Batch) -> object:
        del n
        numbers = [
            part(batch.captions, max_length=77, padding="max_length", truncation=True, return_tensors="pt").input_ids
            for part in tokenizers
        ]
        pixels = batch.images.float() / 127.5 - 1
        with accelerator.accumulate(network):
            latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
            noise = torch.randn_like(latents)
            times = torch.randint(0, noising.config.num_train_timesteps, (len(latents),))
            noisy = noising.add_noise(latents, noise, times)
            text, added = embeddings(numbers, len(latents))
            predicted = network(noisy, times, text, added_cond_kwargs=added, return_dict=False)[0]
            loss = F.mse_loss(predicted.float(), noise.float(), reduction="mean")
            accelerator.gather(loss.repeat(len(latents))).mean()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(learns, 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        return loss.detach().item()

    def save(folder: Path) -> None:
        kind_of = diffusers.StableDiffusionXLPipeline if is_xl else diffusers.StableDiffusionPipeline
        state = convert_state_dict_to_diffusers(get_peft_model_state_dict(accelerator.unwrap_model(network)))
        kind_of.save_lora_weights(folder, unet_lora_layers=state, safe_serialization=True)

    return Side(update, learns, save)


def held() -> int:
    """Bytes of all tensors that are alive."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]
    return sum({each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in tensors}.values())


def batches(place: Path, size: int) -> Iterator[Batch]:
    """The same batch again and again, as both sides get it."""
    from vdiff.data.store import ImageStore

    store = ImageStore(place / "data")
    captions = [store.caption(k) for k in range(size)]
    generator = torch.Generator().manual_seed(0)
    while True:
        pixels = torch.randint(0, 256, (size, 3, PIXELS, PIXELS), dtype=torch.uint8, generator=generator)
        yield Batch(pixels, None, captions)


def measure(place: Path, kind: str, batch_size: int, updates: int) -> list[list[str]]:
    """The rows of both sides."""
    weights = sum(path.stat().st_size for path in pipeline(kind).glob("*/*.safetensors"))
    makers: dict[str, Callable[[], Side]] = {
        "vdiff": lambda: ours(place, kind, batch_size),
        "diffusers": lambda: theirs(kind),
    }
    sides, base, peaks = {}, {}, {}
    source = batches(place, batch_size)
    for make in makers.values():  # what libraries keep after a first call is not counted
        make().update(0, next(source))
    for name, make in makers.items():
        before = held()
        side = sides[name] = make()
        for n in range(3):  # moments exist after the first update
            side.update(n, next(source))
        with LiveBytes() as live:
            side.update(3, next(source))
        learns = num_bytes(side.learns)
        base[name] = (held() - before - 3 * learns) / weights
        peaks[name] = live.peak + held() - before
    times: dict[str, list[float]] = {name: [] for name in sides}
    for n in range(updates):
        batch = next(source)
        for name in list(sides) if n % 2 else list(sides)[::-1]:
            began = time.process_time()
            sides[name].update(n + 4, batch)
            times[name].append(time.process_time() - began)
    medians = {name: statistics.median(values) for name, values in times.items()}
    ratios = [a / b for a, b in zip(times["vdiff"], times["diffusers"], strict=True)]
    rows = []
    for name, side in sides.items():
        with tempfile.TemporaryDirectory() as folder:
            side.save(Path(folder) / "checkpoint")
            size = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
        rows.append(
            [
                kind,
                name,
                f"{1000 * medians[name]:.1f}",
                f"{1 / medians[name]:.2f}",
                f"{statistics.median(ratios):.2f}" if name == "vdiff" else "1",
                f"{base[name]:.2f}",
                f"{peaks[name] / 1e6:.2f}",
                f"{size:,}",
            ]
        )
    return rows


@click.command()
@click.option("--batch_size", default=2, show_default=True)
@click.option("--updates", default=100, show_default=True, help="Timed updates of each side, after 4 that are not.")
def main(batch_size: int, updates: int) -> None:
    """Print the table and write it to benchmarks/results/text_training.md."""
    rows: list[Any] = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_captioned(place / "data")
        for kind in ("sd15", "sdxl"):
            write_text_checkpoint(place / kind, kind)
            rows += measure(place, kind, batch_size, updates)
    columns = ["pipeline", "by", "processor ms", "updates/s", "× diffusers", "base", "peak MB", "checkpoint bytes"]
    busy = f"load of the machine {os.getloadavg()[1]:.1f} on {os.cpu_count()} cores"
    versions = f"diffusers {diffusers.__version__}, {busy}"
    title = f"An update of LoRA training: tiny pipelines, {PIXELS}×{PIXELS}, batch {batch_size}, rank {RANK}, fp32"
    write_report("text_training", title, columns, rows, f"{machine()}, {versions}")


if __name__ == "__main__":
    main()
