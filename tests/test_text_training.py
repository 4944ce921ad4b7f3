"""Training of text-to-image models: against diffusers' own computation, and whole runs."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from torch.nn import functional as F

import vdiff
from tests.oracles import randn
from tests.pipelines import pipeline
from tests.programs import ends, launch
from tests.text_training import CAPTIONS, PIXELS, write_captioned, write_text_checkpoint
from tests.toy import Watcher, assert_equal_bits, logged_pictures, signal_at
from vdiff.data.batches import Batch
from vdiff.data.images import prompt_picture
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.models.checkpoint import ADAPTER, WEIGHTS, load_checkpoint, read_config, read_tensors, save_checkpoint
from vdiff.models.components import read_encoder
from vdiff.models.condition import TIME_IDS
from vdiff.models.tokenizing import Tokenizers
from vdiff.training import run_log
from vdiff.training.base import describe, resolve_training
from vdiff.training.base_training import base_task, begin, memory_of_base, train
from vdiff.training.config import TrainConfig
from vdiff.training.engine import build_engine
from vdiff.training.estimate import memory_of
from vdiff.training.finetuning import with_fingerprint
from vdiff.training.inputs import inputs_of
from vdiff.training.objectives import StudentState
from vdiff.training.random_numbers import OFFSET, PERTURBATION, POSTERIOR, UpdateRandom
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
    task = base_task(
        config, begin(description, train_text_encoder=config.train_text_encoder), inputs_of(description, engine.device)
    )
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


def theirs(
    kind: str, step: TrainStep, batch: Batch, u: torch.Tensor, *,
    prediction: str, zero_snr: bool = False, gamma: float = 0, offset: float = 0, perturbation: float = 0,
):  # fmt: skip
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
    noise = random.normal(latents.shape[1:]) + offset * random.normal((latents.shape[1], 1, 1), OFFSET)
    timesteps = (u * 1000).long()
    new_noise = noise + perturbation * random.normal(latents.shape[1:], PERTURBATION)
    noisy = scheduler.add_noise(latents, new_noise, timesteps)
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
    "offset noise": ("sdxl", {"offset_noise": 0.3}, {"prediction": "epsilon", "offset": 0.3}),
    "perturbed": ("sd15", {"input_perturbation": 0.4}, {"prediction": "epsilon", "perturbation": 0.4}),
    "perturbed v": (
        "sdxl", {"prediction": "v", "zero_snr": True, "input_perturbation": 0.4, "offset_noise": 0.2},
        {"prediction": "v_prediction", "zero_snr": True, "perturbation": 0.4, "offset": 0.2},
    ),
    "min-SNR, γ = 2": (
        "sd15", {"weighting": "min_snr", "snr_gamma": 2.0}, {"prediction": "epsilon", "zero_snr": False, "gamma": 2},
    ),
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


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
@pytest.mark.parametrize(
    ("rank", "learns_text", "fsdp"),
    [(2, True, False), (2, True, True), (0, True, True)],
)
def test_two_processes_train_as_one(place, tmp_path, rank, learns_text, fsdp):
    """DDP and FSDP: resumed to the same bits, with samples of prompts; a checkpoint holds what learns, nothing else."""
    (tmp_path / "prompts.txt").write_text("a red fox\na sad cat\na car\n")
    flags = {"lora_rank": rank, "train_text_encoder": learns_text, "sample_prompts": str(tmp_path / "prompts.txt")}
    flags |= {"sample_interval": 2, "caption_dropout": 0.5, "ema": 0.5 if learns_text else 0.0}
    run(place, "sdxl", tmp_path / "one", **flags)
    for name, updates in (("two", 4), ("cut", 2), ("cut", 4)):
        act = partial(run, place, "sdxl", tmp_path / name, **flags, num_iters=updates, fsdp=fsdp)
        codes, stdout, stderr = ends(launch(act, tmp_path))
        assert codes == [0, 0], stdout + stderr
    file = ADAPTER if rank else WEIGHTS
    assert_equal_bits(tmp_path / "two" / file, tmp_path / "cut" / file)
    assert_equal_bits(state_path(tmp_path / "two"), state_path(tmp_path / "cut"))
    one, two = (read_tensors(tmp_path / name / file) for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(".lora_" in name for name in two) if rank else any(".lora_" not in name for name in two)
    assert any("text_encoders" in name for name in two) == learns_text
    began = {} if rank else dict(load_checkpoint(place / "sdxl")[0].state_dict())
    learned = [torch.cat([(found[n] - began.get(n, 0)).flatten() for n in one]) for found in (one, two)]
    assert learned[0].norm() > 0
    assert (learned[0] - learned[1]).norm() < 0.01 * learned[0].norm()
    pictures = [sorted((tmp_path / name / "samples").iterdir()) for name in ("one", "two")]
    assert [path.name for path in pictures[0]] == [path.name for path in pictures[1]] != []


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


@pytest.mark.parametrize("source", ["file", "captions"])
def test_samples_have_prompts_and_change_no_bit_of_the_training(place, tmp_path, monkeypatch, source):
    """The last samples are those that the finished model draws of the same prompts, by the same seed."""
    shown = []
    monkeypatch.setattr(run_log, "prompt_picture", lambda *facts: shown.append(facts) or prompt_picture(*facts))
    texts = ["a blue cat", "a red fox", "photo of a house", "a car", "the sea"]
    (tmp_path / "prompts.txt").write_text("\n".join([*texts[:2], " ", *texts[2:]]))
    flags = {"sample_prompts": str(tmp_path / "prompts.txt")} if source == "file" else {}
    flags |= {"sample_interval": 2, "tracker": "tensorboard", "seed": 3}
    run(place, "sdxl", tmp_path / "drawn", **flags)
    run(place, "sdxl", tmp_path / "plain", seed=3, sample_interval=100)
    assert_equal_bits(tmp_path / "drawn" / ADAPTER, tmp_path / "plain" / ADAPTER)
    assert sorted(path.name for path in (tmp_path / "drawn" / "samples").iterdir()) == ["0000002.png", "0000004.png"]
    assert logged_pictures(tmp_path / "drawn") == {"samples": [2, 4]}
    images, prompts, title = shown[1]
    assert prompts == texts if source == "file" else set(prompts) <= set(CAPTIONS)
    assert title == "drawn · update 4 of 4 · 8 steps · seed 3 · guidance 4"
    expected = vdiff.load(tmp_path / "drawn").sample(prompts=prompts, steps=8, seed=3, sampler="dpmpp_2m")
    torch.testing.assert_close(images, expected.as_subclass(torch.Tensor), rtol=0, atol=2e-3)
    assert (shown[0][0] - images).abs().max() > 0.01


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"--sample_prompts .*none.txt cannot be read: No such file or directory; give a text file, one prompt"),
        (b"\n \n", r"--sample_prompts .*none.txt has no prompt; write one on each line"),
        (b"\xff\xfe", r"--sample_prompts .*none.txt cannot be read: it is not UTF-8 text; give a text file"),
    ],
)
def test_a_file_of_prompts_that_cannot_be_used_is_refused(place, tmp_path, content, message):
    file = tmp_path / "none.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(OptionError, match=message):
        resolved(place, "sd15", sample_prompts=str(file))


def test_a_line_of_80_columns_says_what_is_cut_off_a_prompt(place, tmp_path):
    (tmp_path / "long.txt").write_text("a cat\n" + "a large red fox " * 20 + "in snow\n")
    watcher = Watcher()
    run(place, "sdxl", tmp_path / "run", watcher, sample_prompts=str(tmp_path / "long.txt"), num_iters=1)
    [line] = [line for line in watcher.lines if "cut off" in line]
    assert line == "prompt 'a large red fox a …': 'fox a large red fox …' is cut off (77 tokens)"
    assert len(line) <= 80


# Text encoders


def encoder_gradients(kind: str, batch: Batch, u: torch.Tensor) -> dict[str, torch.Tensor]:
    """Gradients of all weights of text encoders, computed with modules of transformers and diffusers alone."""
    root = pipeline(kind)
    unet = diffusers.UNet2DConditionModel.from_pretrained(root / "unet")
    encoders = [read_encoder(root, name) for name in ("text_encoder", "text_encoder_2") if (root / name).is_dir()]
    scheduler = diffusers.DDPMScheduler(1000, 0.00085, 0.012, "scaled_linear")
    vae = diffusers.AutoencoderKL.from_pretrained(root / "vae")
    random = UpdateRandom(0, 0, range(len(u)), torch.device("cpu"))
    with torch.no_grad():
        posterior = vae.encode(batch.images.float() / 127.5 - 1).latent_dist
    sample = posterior.mean + posterior.std * random.normal(posterior.mean.shape[1:], POSTERIOR)
    noise, timesteps = random.normal(sample.shape[1:]), (u * 1000).long()
    noisy = scheduler.add_noise(sample * vae.config.scaling_factor, noise, timesteps)
    numbers = [
        part(list(batch.captions or []), padding="max_length", truncation=True, return_tensors="pt").input_ids
        for part in Tokenizers.read(root).parts
    ]
    outputs = [encoder(ids, output_hidden_states=True) for encoder, ids in zip(encoders, numbers, strict=True)]
    added, text = None, outputs[0][0]
    if kind == "sdxl":
        text = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        time_ids = torch.tensor([[PIXELS, PIXELS, 0, 0, PIXELS, PIXELS]]).repeat(len(u), 1)
        added = {"time_ids": time_ids, "text_embeds": outputs[1][0]}
    F.mse_loss(unet(noisy, timesteps, text, added_cond_kwargs=added, return_dict=False)[0], noise).backward()
    return {
        f"network.text_encoders.{k}.{name}": weight.grad
        for k, encoder in enumerate(encoders)
        for name, weight in encoder.named_parameters()
        if weight.grad is not None
    }


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_gradients_of_text_encoders_are_those_of_diffusers(place, kind):
    step, batch, drawn, _ = ours(place, kind, lora_rank=0, train_text_encoder=True, text_encoder_lr=1e-5)
    expected = encoder_gradients(kind, batch, drawn.u)
    learning = {name: weight for name, weight in step.denoiser.named_parameters() if weight.requires_grad}
    assert {name for name in learning if "text_encoders" in name} == expected.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(learning[name].grad, gradient, rtol=1e-5, atol=1e-5 * largest)
    step.descend(1, torch.tensor(False))
    assert [group["lr"] for group in step.optimizer.param_groups] == pytest.approx([1e-3, 1e-5])
    assert {id(weight) for weight in step.optimizer.param_groups[1]["params"]} == {id(learning[n]) for n in expected}


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("rank", [0, 2])
def test_trained_text_encoders_are_saved_resumed_and_loaded(place, tmp_path, kind, rank):
    flags = {"lora_rank": rank, "train_text_encoder": True, "ema": 0.0, "lr": 1e-2, "sample_interval": 3}
    run(place, kind, tmp_path / "whole", **flags)
    with pytest.raises(Interrupted):
        run(place, kind, tmp_path / "cut", signal_at(2), **flags)
    run(place, kind, tmp_path / "cut", **flags)
    name = ADAPTER if rank else WEIGHTS
    assert_equal_bits(tmp_path / "whole" / name, tmp_path / "cut" / name)
    base, loaded = (load_checkpoint(folder) for folder in (place / kind, tmp_path / "whole"))
    before, after = (dict(each[0].named_parameters()) for each in (base, loaded))
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    for k in range(len(base[0].network.text_encoders)):
        moved = {name for name in changed if name.startswith(f"network.text_encoders.{k}.")}
        assert moved
        if rank:
            assert all(
                name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight")) for name in moved
            )
    prompts = ["a red fox", "a sad cat"]
    drawn = vdiff.load(tmp_path / "whole").sample(prompts=prompts, steps=2, seed=1)
    save_checkpoint(tmp_path / "merged", loaded[0].state_dict(), loaded[1])
    again = vdiff.load(tmp_path / "merged").sample(prompts=prompts, steps=2, seed=1)
    torch.testing.assert_close(drawn, again, rtol=0, atol=1e-5)
    run(place, kind, tmp_path / "next", base=str(tmp_path / "whole"), num_iters=1, lora_rank=2)
    further = dict(load_checkpoint(tmp_path / "next")[0].named_parameters())
    assert all(torch.equal(further[name], after[name]) for name in after if "text_encoders" in name)
    first = read_tensors(state_path(tmp_path / "next"))
    assert not any("text_encoders" in name for name in first)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"text_encoder_lr": 1e-5}, "--text_encoder_lr: the text encoders do not learn; give --train_text_encoder"),
        (
            {"text_encoder_lr": 1e-5, "train_text_encoder": True, "optimizer": "prodigy"},
            "--text_encoder_lr: prodigy has one step for all weights; leave it out",
        ),
    ],
)
def test_settings_of_text_encoders_that_do_nothing_are_refused(place, flags, message):
    with pytest.raises(OptionError, match=message):
        resolved(place, "sd15", **flags)


def test_the_example_trains_as_diffengine_s_page(place, tmp_path):
    """Every number of examples/sdxl_v_prediction.toml, with small crops of small pictures and another autoencoder."""
    root = pipeline("sdxl")
    text = Path("examples/sdxl_v_prediction.toml").read_text(encoding="utf-8")
    assert "random_crop = 1024\n" in text
    (tmp_path / "run.toml").write_text(text.replace("random_crop = 1024\n", "random_crop = 32\n"))
    flags = {"base": str(place / "sdxl"), "data": str(place / "data"), "vae": str(root), "device": "cpu"}
    flags |= {"num_workers": 0, "tracker": "none", "threads": 1, "precision": "fp32"}
    config, images = resolve_training(flags, tmp_path / "run.toml", folder=Path("none"), resume=False)
    assert (config.lora_rank, config.lora_alpha, config.batch_size, config.lr) == (8, 8.0, 2, 1e-5)
    assert (config.weight_decay, config.clip_norm, config.flip, config.random_crop) == (1e-2, 1.0, True, 32)
    assert (config.lora_targets, config.prediction) == ("to_q,to_k,to_v,to_out.0", "v")
    assert config.num_iters == 50 * 10 // 2
    config = replace(config, num_iters=1)
    train(config, images, folder=tmp_path / "run", resume=False, overwrite=False, reporter=Watcher())
    found = read_config(tmp_path / "run")
    assert (found.shape, found.prediction, found.adapter.rank) == ((4, 4, 4), "v", 8)
    engine = build_engine(config)
    batches = images.batches(config, engine).start_at(0)
    batch = next(batches)
    batches.close()
    inputs = inputs_of(found, engine.device, vae=config.vae)
    assert batch.images.shape == (2, 3, 32, 32)
    ids = inputs.condition(batch, found.signature).tensors[TIME_IDS]
    assert torch.equal(ids[:, [0, 1, 4, 5]], torch.tensor([[64.0, 64, 32, 32]]).expand(2, 4))
    assert ids[:, 2:4].max() > 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"random_crop": 128},
            "--random_crop 128: .* has images of 64 pixels; give at most 64, or prepare",
        ),
        ({"random_crop": 36}, "the base takes 3 channels and sides that are multiples of"),
        ({"vae": "nowhere"}, "nowhere holds no autoencoder; give a pipeline's folder, or its folder vae"),
    ],
)
def test_crops_and_autoencoders_that_do_not_fit_are_refused(place, flags, message):
    with pytest.raises(VdiffError, match=message):
        resolved(place, "sdxl", **flags)


def test_a_preset_s_crops_larger_than_the_images_are_left_out(place):
    watcher = Watcher()
    values = {"base": str(place / "sdxl"), "data": str(place / "data"), "preset": "sdxl_lora_v"}
    config, images = resolve_training(values, None, folder=Path("none"), resume=False, reporter=watcher)
    assert (config.random_crop, images.crop) == (0, 0)
    assert "images of 64 pixels stay whole, as crops of 1024 do not fit" in watcher.lines


def test_the_memory_of_a_training_includes_the_autoencoder(place, tmp_path):
    """Its weights; and the decoding of samples, where that takes more than an update: here 2 pictures of 512×512."""
    config, images = resolved(place, "sd15", lora_rank=0, batch_size=2)
    description, engine = describe(config, images), build_engine(config)
    model = diffusers.AutoencoderKL.from_pretrained(pipeline("sd15") / "vae")
    found = memory_of_base(config, images, description, engine)
    assert found.autoencoder == 4 * sum(weight.numel() for weight in model.parameters())

    wide = dict(model.config) | {"block_out_channels": (32, 32, 32, 32)}
    diffusers.AutoencoderKL.from_config(wide).save_pretrained(tmp_path)

    def activations(vae: Path | None) -> int:
        return memory_of(lambda _: base_task(config, description.build()), (4, 64, 64), 0, engine, vae).activations

    layer = 2 * 32 * 512**2 * 4  # float32, at the size of the pictures
    assert activations(None) < 2 * layer <= activations(tmp_path) < 6 * layer
