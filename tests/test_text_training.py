"""Training of text-to-image models: against diffusers' own computation, and whole runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from torch.nn import functional as F

from tests.oracles import randn
from tests.pipelines import pipeline
from tests.text_training import CAPTIONS, PIXELS, write_captioned, write_text_checkpoint
from tests.toy import Watcher, assert_equal_bits, signal_at
from vdiff.data.batches import Batch
from vdiff.errors import Interrupted, OptionError
from vdiff.models.checkpoint import ADAPTER, load_checkpoint, read_config, read_tensors
from vdiff.models.components import read_encoder
from vdiff.models.condition import TIME_IDS
from vdiff.models.tokenizing import Tokenizers
from vdiff.training.base import describe, resolve_training
from vdiff.training.base_training import base_task, begin, train
from vdiff.training.config import TrainConfig
from vdiff.training.engine import build_engine
from vdiff.training.finetuning import with_fingerprint
from vdiff.training.inputs import inputs_of
from vdiff.training.objectives import StudentState
from vdiff.training.random_numbers import POSTERIOR, UpdateRandom
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep, part_losses

KINDS = ("sd15", "sd2", "sdxl")
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the tiny pipelines, and a captioned dataset."""
    folder = tmp_path_factory.mktemp("text")
    write_captioned(folder / "data")
    for kind in KINDS:
        write_text_checkpoint(folder / kind, kind)
    return folder


def resolved(place: Path, kind: str, **flags: Any) -> tuple[TrainConfig, Any]:
    """The settings of a short run of a LoRA, and its images."""
    values = {
        "base": str(place / kind), "data": str(place / "data"), "lora_rank": 2, "num_iters": 4, "batch_size": 4,
        "device": "cpu", "num_workers": 0, "log_interval": 1, "sample_interval": 10, "ckpt_interval": 10, "lr": 1e-3,
        "warmup_iters": 0, "tracker": "none", "threads": 1, **flags,
    }  # fmt: skip
    return resolve_training(values, None, folder=Path("none"), resume=False, reporter=Watcher())


def ours(place: Path, kind: str, **flags: Any) -> tuple[TrainStep, Batch, Any, torch.Tensor]:
    """A step whose LoRA is not zero, its batch, what was drawn for update 0, and the loss, after its backward pass."""
    config, images = resolved(place, kind, flip=False, ema=0.0, **flags)
    description = with_fingerprint(describe(config, images))
    engine = build_engine(config)
    torch.manual_seed(0)
    task = base_task(config, begin(description), inputs_of(description, engine.device))
    step = TrainStep(task, engine)
    for k, (name, weight) in enumerate(step.denoiser.named_parameters()):
        if "lora_B" in name:
            weight.data.copy_(0.1 * randn(*weight.shape, seed=k))
    generator = images.batches(config, engine).start_at(0)
    batch = next(generator)
    generator.close()
    drawn = step.draw(0, batch)
    student = StudentState(step.denoiser, step.denoiser, 0.0)
    losses, _, _ = part_losses(task, step.denoiser, drawn, student, engine)
    losses.mean().backward()
    return step, batch, drawn, losses.mean().detach()


def theirs(kind: str, step: TrainStep, batch: Batch, u: torch.Tensor, *, prediction: str, zero_snr: bool, gamma: float):
    """Loss and gradients of a LoRA as `train_text_to_image_lora(_sdxl).py` of diffusers computes them.

    The noise of posterior and image, and the weights of the LoRA, are those of vdiff's update 0; its times are levels.
    """
    root = pipeline(kind)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        prediction_type=prediction, rescale_betas_zero_snr=zero_snr,
    )  # fmt: skip
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "unet")
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=TARGETS))
    own = dict(step.denoiser.named_parameters())
    for name, weight in unet.named_parameters():
        if "lora_" in name:
            weight.data.copy_(own[f"network.unet.model.{name}"])
    vae = diffusers.AutoencoderKL.from_pretrained(root / "vae")
    posterior = vae.encode(batch.images.float() / 127.5 - 1).latent_dist
    random = UpdateRandom(0, 0, range(len(u)), torch.device("cpu"))
    sample = posterior.mean + posterior.std * random.normal(posterior.mean.shape[1:], POSTERIOR)
    latents = (sample * vae.config.scaling_factor).detach()
    noise = random.normal(latents.shape[1:])
    timesteps = (u * 1000).long()
    noisy = scheduler.add_noise(latents, noise, timesteps)
    parts = Tokenizers.read(root).parts
    numbers = [
        part(list(batch.captions or []), padding="max_length", truncation=True, return_tensors="pt").input_ids
        for part in parts
    ]
    if kind == "sdxl":
        outputs = [
            read_encoder(root, name)(ids, output_hidden_states=True)
            for name, ids in zip(("text_encoder", "text_encoder_2"), numbers, strict=True)
        ]
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        time_ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]]).repeat(len(u), 1)
        added = {"time_ids": time_ids, "text_embeds": outputs[1][0].detach()}
    else:
        text, added = read_encoder(root, "text_encoder")(numbers[0])[0], None
    predicted = unet(noisy, timesteps, text.detach(), added_cond_kwargs=added, return_dict=False)[0]
    target = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, timesteps)
    if not gamma:
        loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
    else:
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(timesteps)], dim=1).min(dim=1)[0]
        weights = weights / snr if prediction == "epsilon" else weights / (snr + 1)
        loss = F.mse_loss(predicted.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
        loss = (loss * weights).mean()
    loss.backward()
    return loss.detach(), {name: weight.grad for name, weight in unet.named_parameters() if weight.grad is not None}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sd15": ("sd15", {}, {"prediction": "epsilon", "zero_snr": False, "gamma": 0}),
    "sd2": ("sd2", {"weighting": "snr_plus_one"}, {"prediction": "v_prediction", "zero_snr": False, "gamma": 0}),
    "sdxl": ("sdxl", {}, {"prediction": "epsilon", "zero_snr": False, "gamma": 0}),
    "sdxl v": (
        "sdxl", {"prediction": "v", "zero_snr": True}, {"prediction": "v_prediction", "zero_snr": True, "gamma": 0},
    ),
    "sd15 v": (
        "sd15", {"prediction": "v", "zero_snr": True}, {"prediction": "v_prediction", "zero_snr": True, "gamma": 0},
    ),
    "min-SNR": ("sd15", {"weighting": "min_snr"}, {"prediction": "epsilon", "zero_snr": False, "gamma": 5}),
    "min-SNR v": ("sd2", {"weighting": "min_snr"}, {"prediction": "v_prediction", "zero_snr": False, "gamma": 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_an_update_is_that_of_diffusers(place, name):
    kind, flags, options = CASES[name]
    step, batch, drawn, loss = ours(place, kind, **flags)
    assert set(batch.captions or []) <= set(CAPTIONS)
    expected, gradients = theirs(kind, step, batch, drawn.u, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    found = {name: weight.grad for name, weight in step.denoiser.named_parameters() if weight.grad is not None}
    assert found.keys() == {f"network.unet.model.{name}" for name in gradients}
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 1e-4
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[f"network.unet.model.{name}"], gradient, rtol=1e-5, atol=1e-5 * largest)


def test_sizes_of_a_picture_are_height_and_width_of_original_crop_and_target(place):
    """An image whose sizes the dataset does not know is whole, also if it is not square."""
    inputs = inputs_of(read_config(place / "sdxl"), torch.device("cpu"))
    takes = read_config(place / "sdxl").signature
    pictures = torch.zeros(2, 3, 64, 32, dtype=torch.uint8)
    for sizes in (None, torch.arange(12.0).reshape(2, 6)):
        found = inputs.condition(Batch(pictures, None, ["a", "b"], sizes), takes).tensors[TIME_IDS]
        expected = torch.tensor([[64.0, 32, 0, 0, 64, 32]] * 2) if sizes is None else sizes
        assert torch.equal(found, expected)


# Whole runs


def run(place: Path, kind: str, folder: Path, reporter: Watcher | None = None, **flags: Any) -> None:
    config, images = resolved(place, kind, **flags)
    resume = folder.exists()
    train(config, images, folder=folder, resume=resume, overwrite=False, reporter=reporter or Watcher())


@pytest.mark.parametrize("kind", ["sd15", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_a_cut_run_ends_with_the_same_bits_and_holds_the_lora_alone(place, tmp_path, kind):
    flags = {"caption_dropout": 0.5, "caption_shuffle": True}
    run(place, kind, tmp_path / "whole", **flags)
    with pytest.raises(Interrupted):
        run(place, kind, tmp_path / "cut", signal_at(2), **flags)
    run(place, kind, tmp_path / "cut", **flags)
    for name in (ADAPTER, state_path(Path())):
        assert_equal_bits(tmp_path / "whole" / name, tmp_path / "cut" / name)
    tensors = read_tensors(tmp_path / "whole" / ADAPTER)
    assert all(name.startswith("network.unet.model.") for name in tensors)
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)
    denoiser, config = load_checkpoint(tmp_path / "whole")
    base, _ = load_checkpoint(place / kind)
    assert config.components == read_config(place / kind).components
    tuned = denoiser.state_dict()
    changed = [name for name, tensor in base.state_dict().items() if not torch.equal(tensor, tuned[name])]
    assert changed
    assert all(name.endswith(tuple(f"{target}.weight" for target in TARGETS)) for name in changed)


def test_all_weights_of_the_unet_learn_and_text_encoders_stay(place, tmp_path):
    run(place, "sd15", tmp_path / "run", lora_rank=0, num_iters=1, lr=1e-3)
    names = read_tensors(tmp_path / "run" / "model.safetensors").keys()
    assert names
    assert all("unet" in name for name in names)
    base, tuned = (load_checkpoint(folder)[0].state_dict() for folder in (place / "sd15", tmp_path / "run"))
    for name, tensor in base.items():
        if "text_encoders" in name:
            assert torch.equal(tensor, tuned[name])


def test_a_dataset_without_captions_or_of_another_size_is_refused(place, tmp_path):
    write_captioned(tmp_path / "silent", captions=False)
    with pytest.raises(OptionError, match=r"silent has no captions, and .*sd15 is a text-to-image model; prepare"):
        resolved(place, "sd15", data=str(tmp_path / "silent"))
