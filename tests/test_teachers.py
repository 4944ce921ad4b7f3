"""Teachers of other repositories: imported, they answer as the repository's own model code did."""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.commands import ROOT, done, error, run
from tests.teacher_files import decoded, numbers, recorded, weight, weights_of
from tests.toy import SIZE, write_dataset
from vdiff import api
from vdiff.interop.foreign import NO_AUGMENTATION, NO_DROPOUT, NO_VARIANCE
from vdiff.interop.graphs import GraphOptions, export_torch
from vdiff.interop.onnx import export_onnx
from vdiff.interop.teachers.edm import import_edm
from vdiff.interop.teachers.google import import_google
from vdiff.interop.teachers.k_diffusion import import_k_diffusion
from vdiff.interop.teachers.lucidrains import import_lucidrains
from vdiff.interop.teachers.openai import KNOWN, _unet_config, _values, import_openai
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config
from vdiff.models.song_config import SongConfig
from vdiff.models.song_unet import SongUNet

EDM = ("edm_ddpmpp", "edm_ncsnpp_ve", "edm_ddpmpp_vp", "edm_adm", "edm2", "edm2_latents")


def state_of(values: dict[str, Any]) -> dict[str, Tensor]:
    """The state dict, with the filters that EDM keeps in it."""
    taps = torch.tensor(values["config"].get("resample_filter", [1, 1]), dtype=torch.float32)
    kernel = (taps[:, None] * taps / taps.sum() ** 2)[None, None]
    return weights_of(values["shapes"]) | dict.fromkeys(values["filters"], kernel)


def write_edm(folder: Path, name: str, *, suffix: str = ".pt", **changes: Any) -> Path:
    """The two files of a network of EDM; returns that of the weights."""
    values = recorded(name)
    path = folder / f"{name}{suffix}"
    (folder / f"{name}.json").write_text(json.dumps({**values["config"], **changes}))
    state = state_of(values)
    if suffix == ".pt":
        torch.save(state, path)
    else:
        save_file({key: tensor.clone() for key, tensor in state.items()}, path)
    return path


def assert_near(found: Tensor, due: Tensor, tolerance: float = 1e-5) -> None:
    """Equal to this part of the largest number."""
    torch.testing.assert_close(found, due, rtol=0, atol=tolerance * max(1.0, float(due.abs().max())))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", EDM)
def test_networks_of_edm_denoise_as_edms_own_code(name, suffix, tmp_path):
    import_edm(write_edm(tmp_path, name, suffix=suffix), tmp_path / "out")
    denoiser, config = load_checkpoint(tmp_path / "out")
    calls = recorded(name)["calls"]
    assert len(calls) >= 3
    for call in calls:
        level = torch.tensor(call["sigma"], dtype=torch.float64)
        z = 2 * torch.from_numpy(numbers("input", call["shape"]))
        classes = None if call["classes"] is None else torch.tensor(call["classes"])
        if classes is None and "classes" in config.signature.names and not config.signature.null:
            classes = torch.full((len(z),), config.signature.num_classes)
        with torch.no_grad():
            found = denoiser(z, denoiser.schedule.time(level.atan()), denoiser.condition(classes=classes)).x
        assert_near(found, decoded(call))


K_DIFFUSION = ("k_diffusion_image_v1", "k_diffusion_patches")


def k_diffusion_state(name: str) -> dict[str, Tensor]:
    """The state dict, with the filters that it holds: (1, 3, 3, 1)/8 for each axis, four times that to enlarge."""
    values, taps = recorded(name), torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    kernels = {key: taps[:, None] * taps * (4 if "u_blocks" in key else 1) for key in values["filters"]}
    return weights_of(values["shapes"]) | kernels


def write_k_diffusion(folder: Path, name: str, layout: str, **changes: Any) -> Path:
    """A file of its train.py (pth) or convert_for_inference.py (safetensors), or a state dict and its JSON (pt)."""
    state, config = k_diffusion_state(name), recorded(name)["config"]
    config = {**config, "model": {**config["model"], **changes}}
    path = folder / f"{name}.{layout}"
    if layout == "safetensors":
        save_file(state, path, metadata={"config": json.dumps(config)})
        return path
    if layout == "pt":
        (folder / f"{name}.json").write_text(json.dumps(config))
        torch.save(state, path)
        return path
    optimizer = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"betas": (0.9, 0.99), "foreach": None}]}
    raw = {key: torch.zeros_like(tensor) for key, tensor in state.items()}
    whole = {"config": config, "model": raw, "model_ema": state, "opt": optimizer, "epoch": 1, "gns_stats": None}
    torch.save(whole, path)
    return path


@pytest.mark.parametrize("layout", ["pth", "safetensors", "pt"])
@pytest.mark.parametrize("name", K_DIFFUSION)
def test_networks_of_k_diffusion_denoise_as_their_own_code(name, layout, tmp_path):
    made = import_k_diffusion(write_k_diffusion(tmp_path, name, layout), tmp_path / "out")
    denoiser, config = load_checkpoint(tmp_path / "out")
    model = recorded(name)["config"]["model"]
    assert config.shape == (model["input_channels"], *model["input_size"])
    assert [math.tan(end) for end in denoiser.schedule.ends] == pytest.approx([model["sigma_min"], model["sigma_max"]])
    assert (NO_VARIANCE in made.approximated, NO_AUGMENTATION in made.approximated) == (
        model["has_variance"],
        model["augment_wrapper"],
    )
    calls = recorded(name)["calls"]
    assert len(calls) >= 2
    for call in calls:
        level = torch.tensor(call["sigma"], dtype=torch.float64)
        z = 2 * torch.from_numpy(numbers("input", call["shape"]))
        with torch.no_grad():
            assert_near(denoiser(z, denoiser.schedule.time(level.atan())).x, decoded(call))


def flags_of(values: dict[str, Any]) -> str:
    return " ".join(f"--{name} {value}" for name, value in values["flags"].items())


OPENAI = {
    "openai_guided_64": "guided-diffusion",
    "openai_guided_128": "guided-diffusion",
    "openai_improved_cosine": "improved-diffusion",
    "openai_improved_linear": "improved-diffusion",
    "openai_consistency_edm": "consistency_models",
}


@pytest.mark.parametrize("name", OPENAI)
def test_networks_of_openai_denoise_as_their_own_code(name, tmp_path):
    values = recorded(name)
    torch.save(weights_of(values["shapes"]), tmp_path / "model.pt")
    import_openai(tmp_path / "model.pt", tmp_path / "out", flags=flags_of(values), repository=OPENAI[name])
    denoiser, config = load_checkpoint(tmp_path / "out")
    assert len(values["calls"]) == 3
    for call in values["calls"]:
        z = 2 * torch.from_numpy(numbers("input", (2, 3, config.image_size, config.image_size)))
        if "sigma" in call:
            t = denoiser.schedule.time(torch.tensor(call["sigma"], dtype=torch.float64).atan())
        else:
            t = (torch.tensor(call["timestep"]).double() + 1) / denoiser.schedule.label_scale
        classes = None if call["classes"] is None else torch.tensor(call["classes"])
        with torch.no_grad():
            found = denoiser(z, t, denoiser.condition(classes=classes)).x
        step = call.get("step", 1)
        assert_near(found[:, :, ::step, ::step], decoded(call))


LUCIDRAINS = {
    "lucidrains_v": ("v", "sigmoid"),
    "lucidrains_eps": ("eps", "linear"),
    "lucidrains_x": ("x", "ddpm_cosine"),
}


def write_lucidrains(path: Path, name: str, *, averaged: bool = True, **changes: Any) -> int:
    """The file of a Trainer; returns the size of its images."""
    values = recorded(name)
    tables = {
        key: torch.frombuffer(bytearray(base64.b64decode(x)), dtype=torch.float32)
        for key, x in values["tables"].items()
    }
    weights = weights_of(values["shapes"])
    state = {**{f"model.{key}": x for key, x in weights.items()}, **tables, **changes}
    state = {key: x for key, x in state.items() if x is not None}
    raw = {key: torch.zeros_like(x) if key.startswith("model.") and averaged else x for key, x in state.items()}
    ema = {"initted": torch.tensor(True), **{f"ema_model.{key}": x for key, x in state.items()}}
    whole = {"step": 7, "model": raw, "opt": {"state": {}, "param_groups": [{"betas": (0.9, 0.99), "foreach": None}]}}
    torch.save({**whole, **({"ema": ema} if averaged else {}), "scaler": None, "version": "2.2.5"}, path)
    return int(values["image_size"])


@pytest.mark.parametrize("averaged", [True, False])
@pytest.mark.parametrize("name", LUCIDRAINS)
def test_networks_of_lucidrains_denoise_as_their_own_code(name, averaged, tmp_path):
    """Its average, or the weights themselves of a file without one."""
    size = write_lucidrains(tmp_path / "model-7.pt", name, averaged=averaged)
    import_lucidrains(tmp_path / "model-7.pt", tmp_path / "out", image_size=size)
    denoiser, config = load_checkpoint(tmp_path / "out")
    assert (config.prediction, config.schedule["name"]) == LUCIDRAINS[name]
    assert config.weights == ("ema" if averaged else "raw")
    assert len(recorded(name)["calls"]) == 2
    for call in recorded(name)["calls"]:
        z = 2 * torch.from_numpy(numbers("input", call["shape"]))
        t = (torch.tensor(call["timestep"]).double() + 1) / config.num_timesteps
        with torch.no_grad():
            assert_near(denoiser(z, t).x, decoded(call))


def flax_state(values: dict[str, Any]) -> bytes:
    """A train state as flax writes it: `ema_params` and the number of steps, arrays as extensions."""
    tree: dict[str, Any] = {}
    for path, shape in values["shapes"].items():
        *folders, last = path.split("/")
        if last == "bias" and len(shape) > 1:
            array = 0.2 * numbers(path, shape)
        else:  # a matrix sums over all axes but the last; q, k and v over the first alone
            inputs = shape[0] if folders[-1] in ("q", "k", "v") else math.prod(shape[:-1])
            array = weight(path, shape, inputs=inputs)
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        packed = msgspec.msgpack.encode((list(shape), "float32", array.astype("<f4").tobytes()))
        node[last] = msgspec.msgpack.Ext(1, packed)
    state = {"step": 7, "optimizer": None, "ema_params": tree, "num_sample_steps": values["num_sample_steps"]}
    return msgspec.msgpack.encode(state)


@pytest.mark.parametrize("name", ["google_cifar", "google_imagenet"])
def test_networks_of_google_denoise_as_their_own_code(name, tmp_path):
    values = recorded(name)
    (tmp_path / "checkpoint_1").write_bytes(flax_state(values))
    import_google(tmp_path / "checkpoint_1", tmp_path / "out", image_size=values["image_size"])
    denoiser, config = load_checkpoint(tmp_path / "out")
    is_student = values["num_sample_steps"] > 0
    assert (config.method, config.is_distilled) == ("progressive" if is_student else "base", is_student)
    assert config.num_timesteps == (values["num_sample_steps"] or 1024)
    assert len(values["calls"]) == 3
    for call in values["calls"]:
        z = 2 * torch.from_numpy(numbers("input", call["shape"]))
        classes = None if call["classes"] is None else torch.tensor(call["classes"])
        with torch.no_grad():
            t = torch.tensor(call["t"], dtype=torch.float64)
            found = denoiser(z, t, denoiser.condition(classes=classes)).x
        # both round a time of up to 1000 to float32, by up to 6e-5, before they compute its sine
        assert_near(found, decoded(call), 1e-5 if max(call["t"]) < 0.5 else 2e-4)


# Commands


def write_song(folder: Path, *, classes: int = 0, **config: Any) -> Path:
    """A DDPM++ for the pictures of 4 × 4 pixels of `tests.toy`, as a file of EDM."""
    config = {
        "class_name": "training.networks.EDMPrecond",
        "model_type": "SongUNet",
        "img_resolution": SIZE,
        "img_channels": 1,
        "label_dim": classes,
        "model_channels": 8,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [2],
        "channel_mult_emb": 2,
        **config,
    }
    keys = ("label_dim", "img_resolution", "img_channels", "model_channels", "num_blocks", "channel_mult_emb")
    shape = SongConfig(
        **{key: config[key] for key in keys}, channel_mult=(1, 2), attn_resolutions=(2,),
        fourier=config.get("embedding_type") == "fourier", residual=config.get("encoder_type") == "residual",
    )  # fmt: skip
    shapes = {f"model.{name}": list(each.shape) for name, each in SongUNet(shape).state_dict().items()}
    (folder / "song.json").write_text(json.dumps(config))
    torch.save(weights_of(shapes), folder / "song.pt")
    return folder / "song.pt"


FAST = "--preset toy --num_iters 2 --batch_size 4 --lr 1e-6 --device cpu --check_images 2 --distance_every 0"
KINDS = {
    "edm": {},
    "ve": {"class_name": "VEPrecond", "embedding_type": "fourier", "encoder_type": "residual"},
    "vp": {"class_name": "VPPrecond"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_import_inspect_sample_and_distil_as_typed(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_song(tmp_path, **KINDS[kind])
    lines = done("vdiff import edm song.pt").stdout.splitlines()
    assert lines[0].startswith("checkpoints/song: 1")
    assert lines[1].startswith("next       python sample.py --checkpoint checkpoints/song")
    said = json.loads(done("vdiff inspect checkpoints/song --json").stdout)
    assert said["noise"]["most"] == pytest.approx({"edm": 80.0, "ve": 100.0, "vp": 152.166}[kind], rel=1e-4)
    assert "song" in done("vdiff inspect checkpoints/song").stdout
    done("sample.py --checkpoint checkpoints/song --num 2 --num_timesteps 3 --sampler unipc --out drawn")
    write_dataset(Path("data/toy_4"))
    done(f"distill.py --base checkpoints/song {FAST} --teacher_steps 8 --to_steps 1")
    student = read_config(Path("checkpoints/base_0"))
    assert (student.kind, student.network_config) == ("song", read_config(Path("checkpoints/song")).network_config)
    last = project_models(Path("checkpoints"))
    assert (last.num_timesteps, last.family.predicts_noise) == (1, False)
    assert (
        "is finished already"
        in done(f"distill.py --base checkpoints/song {FAST} --teacher_steps 8 --to_steps 1").output
    )


def test_a_network_of_edm2_is_inspected_drawn_and_distilled_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_edm(tmp_path, "edm2")
    assert "edm, sigma_data 0.5" in done("vdiff import edm edm2.pt").stdout
    rows = done("vdiff inspect checkpoints/edm2").stdout
    for words in ("EDM2 (edm2), 16 channels × [1, 2]", "sigma/alpha from 0.002 to 80", "0.25 * ln(sigma/alpha)"):
        assert words in rows
    done("sample.py --checkpoint checkpoints/edm2 --num 2 --num_timesteps 3 --classes 2 --out drawn")
    write_dataset(Path("data/toy_8"), size=8, channels=3, classes=("0", "1", "2"))
    done(f"distill.py --base checkpoints/edm2 {FAST} --teacher_steps 4 --to_steps 1")
    last = project_models(Path("checkpoints"))
    assert (last.kind, last.num_timesteps, last.family.prediction) == ("edm2", 1, "edm")
    said = error(
        f"distill.py --base checkpoints/edm2 {FAST} --teacher_steps 2 --to_steps 1 --lora_rank 2 --overwrite", 2
    )
    assert "no layer of the network is called so" in said


def test_a_network_of_k_diffusion_is_inspected_drawn_and_distilled_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_k_diffusion(tmp_path, "k_diffusion_image_v1", "pth")
    said = done(f"vdiff import k-diffusion {path.name} --out checkpoints/k").output
    assert NO_DROPOUT in said
    assert NO_AUGMENTATION in said
    rows = done("vdiff inspect checkpoints/k").stdout
    for words in ("image_v1 of k-diffusion, widths 32, 64, 128", "sigma/alpha from 0.01 to 80", NO_AUGMENTATION):
        assert words in rows
    goes_to_one_step("checkpoints/k", "image_v1", "edm")
    said = json.loads(
        done(f"vdiff inspect checkpoints/{min(p.name for p in Path('checkpoints').glob('base_*'))} --json").stdout
    )
    assert NO_AUGMENTATION in said["approximated"]


@pytest.mark.parametrize(
    ("layout", "changes", "words"),
    [
        ("pth", {"type": "image_transformer_v2"}, "type is 'image_transformer_v2'; only image_v1"),
        ("pt", {"unet_cond_dim": 4}, "unet_cond_dim is 4; only image_v1 without conditions can be read"),
        ("safetensors", {"skip_stages": 1}, "skip_stages is 1"),
        ("pth", {"depths": [1, 2]}, "must be of one length"),
        ("pth", {"depths": [1, 2, 2]}, "lacks u_net.d_blocks.2.3.main.0.mapper.bias"),
        ("pth", {"channels": [32, 64, 100]}, "100 channels do not split"),
        ("pth", {"channels": "many"}, "channels is 'many'"),
        ("pth", {"mapping_out": 7}, "mapping_out even"),
        ("pth", {"input_size": [8, 6]}, "need two multiples of 4 above it"),
        ("pth", {"input_size": [4, 4]}, "need two multiples of 4 above it"),
        ("pth", {"has_variance": True, "input_channels": 1}, "does not fit its configuration"),
    ],
)
def test_files_of_k_diffusion_that_cannot_be_read_are_refused(layout, changes, words, tmp_path):
    path = write_k_diffusion(tmp_path, "k_diffusion_image_v1", layout, **changes)
    assert words in error(f"vdiff import k-diffusion {path} --out {tmp_path / 'out'}", 1)
    assert not (tmp_path / "out").exists()


def test_a_network_of_k_diffusion_without_its_configuration_is_refused(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert "give the JSON file" in error(f"vdiff import k-diffusion {tmp_path / 'model.safetensors'}", 1)
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"config": "{"})
    assert "its config: " in error(f"vdiff import k-diffusion {tmp_path / 'model.safetensors'}", 1)
    (tmp_path / "config.json").write_text("{}")
    line = f"vdiff import k-diffusion {tmp_path / 'model.safetensors'} --network_config {tmp_path / 'config.json'}"
    assert "describes no model of k-diffusion" in error(line, 1)


def test_latents_of_edm2_are_no_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = done(f"vdiff import edm {write_edm(tmp_path, 'edm2_latents')}").output
    assert "latents of 4 channels, which vdiff.load generates as tensors" in said
    samples = api.load("checkpoints/edm2_latents").sample(2, steps=3)
    assert samples.shape == (2, 4, 8, 8)
    said = error("sample.py --checkpoint checkpoints/edm2_latents --num 2", 1)
    assert "have 4 channels, but pictures need 1 or 3" in said


def test_a_network_of_lucidrains_is_inspected_drawn_and_distilled_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lucidrains(tmp_path / "model-3.pt", "lucidrains_v")
    assert "40 steps, 3 × 8 × 8" in done("vdiff import lucidrains model-3.pt --image_size 8").stdout
    rows = done("vdiff inspect checkpoints/model-3").stdout
    assert "lucidrains, widths 8, 8, 16" in rows
    assert "sigmoid" in rows
    goes_to_one_step("checkpoints/model-3", "lucidrains", "v")


@pytest.mark.parametrize(
    ("changes", "size", "code", "words"),
    [
        ({"betas": None}, 8, 1, "lacks betas"),
        ({"model.init_conv.weight": None}, 8, 1, "lacks model.init_conv.weight"),
        ({"betas": torch.full((40,), 0.5)}, 8, 1, "none of sigmoid, cosine and linear"),
        ({"model.init_conv.weight": torch.zeros(8, 6, 7, 7)}, 8, 1, "self-conditioning or a learned variance"),
        ({"model.time_mlp.0.weights": torch.zeros(8)}, 8, 1, "random Fourier features"),
        ({"model.mid_attn.mem_kv": None}, 8, 1, "lacks mid_attn.mem_kv"),
        ({"model.downs.0.2.mem_kv": torch.zeros(2)}, 8, 1, "is of another network"),
        ({"loss_weight": torch.zeros(3)}, 8, 1, "different lengths"),
        ({}, 9, 2, "--image_size 9: this network takes multiples of 2"),
    ],
)
def test_files_of_lucidrains_that_cannot_be_read_are_refused(changes, size, code, words, tmp_path):
    write_lucidrains(tmp_path / "model.pt", "lucidrains_v", **changes)
    assert words in error(
        f"vdiff import lucidrains {tmp_path / 'model.pt'} --image_size {size} --out {tmp_path / 'o'}", code
    )
    assert not (tmp_path / "o").exists()


def goes_to_one_step(model: str, kind: str, prediction: str) -> None:
    """It is sampled, and distilled as typed, whole and with a LoRA; students keep its network and its prediction."""
    done(f"sample.py --checkpoint {model} --num 2 --num_timesteps 3 --out drawn")
    write_dataset(Path("data/toy_8"), size=8, channels=3)
    for more in ("", " --lora_rank 2 --overwrite"):
        done(f"distill.py --base {model} {FAST} --teacher_steps 4 --to_steps 1{more}")
        last = project_models(Path("checkpoints"))
        assert (last.kind, last.num_timesteps, last.prediction) == (kind, 1, prediction)


def project_models(folder: Path) -> CheckpointConfig:
    """The student of the fewest steps."""
    found = [read_config(path) for path in folder.glob("base_*")]
    return min(found, key=lambda config: config.num_timesteps)


def write_classes(folder: Path, kind: str) -> Path:
    """A network with classes and weights that are not 0."""
    return write_edm(folder, "edm2") if kind == "edm2" else write_song(folder, classes=2, label_dropout=0.1)


def import_kind(folder: Path, kind: str) -> None:
    """A network of this kind as the checkpoint `folder/model`."""
    if kind == "lucidrains":
        size = write_lucidrains(folder / "model.pt", "lucidrains_v")
        import_lucidrains(folder / "model.pt", folder / "model", image_size=size)
    elif kind == "image_v1":
        import_k_diffusion(write_k_diffusion(folder, "k_diffusion_patches", "pt"), folder / "model")
    else:
        import_edm(write_classes(folder, kind), folder / "model")


every_own_kind = pytest.mark.parametrize("kind", ["song", "edm2", "lucidrains", "image_v1"])


@every_own_kind
def test_own_kinds_are_exported_as_graphs_and_refused_to_diffusers(kind, tmp_path):
    import_kind(tmp_path, kind)
    denoiser, config = load_checkpoint(tmp_path / "model")
    options = GraphOptions(True, "x", num_steps=2)
    assert export_torch(denoiser, config, options, tmp_path / "model.pt2", fingerprint="") <= 1e-4
    assert export_onnx(denoiser, config, options, tmp_path / "model.onnx", fingerprint="") <= 1e-4
    said = error(f"vdiff export diffusers {tmp_path / 'model'} {tmp_path / 'out'}", 1)
    assert "only vdiff's UNet can be exported to diffusers" in said


@every_own_kind
def test_gradient_checkpointing_gives_the_same_gradients(kind, tmp_path):
    import_kind(tmp_path, kind)
    denoiser, config = load_checkpoint(tmp_path / "model")
    network = denoiser.network
    z, timestep = torch.from_numpy(numbers("z", (2, *config.shape))), torch.tensor([0.1, 0.3])
    condition = {"classes": torch.tensor([0, 1])} if config.class_names else {}
    found = []
    for value in (False, True):
        network.checkpointing = value
        network.zero_grad()
        network(z, timestep, **condition).square().sum().backward()
        found.append([parameter.grad for parameter in network.parameters()])
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in found[0])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


# Refusals


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"class_name": "iDDPMPrecond"}, "only EDMPrecond, VPPrecond, VEPrecond, Precond can be read"),
        ({"decoder_type": "skip"}, "decoder_type is 'skip'"),
        ({"encoder_type": "skip"}, "encoder_type is 'skip'"),
        ({"model_channels": 16}, "does not fit its configuration"),
        ({"num_blocks": 2}, "lacks dec.2x2_block2.affine.bias"),
        ({"img_resolution": 7}, "img_resolution must be a multiple of 2"),
        ({"channel_mult": ["1"]}, "channel_mult is ['1']"),
        ({"sigma_data": "x"}, "sigma_data is 'x'"),
        ({"colour": 1}, "'colour' is not an argument"),
        ({"model_type": "DhariwalUNet"}, "8 channels × [1, 2] cannot be read"),
    ],
)
def test_configurations_that_do_not_fit_are_refused(changes, words, tmp_path):
    path = write_song(tmp_path)
    values = json.loads((tmp_path / "song.json").read_text())
    (tmp_path / "song.json").write_text(json.dumps({**values, **changes}))
    assert words in error(f"vdiff import edm {path} --out {tmp_path / 'out'}", 1)
    assert not (tmp_path / "out").exists()


STAND_IN = """
import json, pickle, torch
from vdiff.models.song_config import SongConfig
from vdiff.models.song_unet import SongUNet

class EDMPrecond(torch.nn.Module):
    def __init__(self, model_type, **kwargs):
        super().__init__()
        self.init_kwargs = {"model_type": model_type, **kwargs}
        self.model = SongUNet(SongConfig(**kwargs))

def write(config, weights, out):
    arguments = json.load(open(config))
    arguments.pop("class_name")
    net = EDMPrecond(**arguments)
    net.load_state_dict(torch.load(weights))
    pickle.dump({"ema": net}, open(out, "wb"))
"""
"""A class of a network as EDM pickles it, with the arguments of its constructor."""


def test_a_pickle_of_nvidia_is_refused_with_lines_that_convert_it(tmp_path, monkeypatch):
    """Its owner pastes them where the code of the pickle is."""
    write_song(tmp_path)
    repository = tmp_path / "edm"
    repository.mkdir()
    (repository / "networks.py").write_text(STAND_IN)

    def python(program: str) -> None:
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([sys.executable, "-"], input=program, text=True, cwd=repository, env=env, check=True)

    python("import networks; networks.write('../song.json', '../song.pt', '../my net.pkl')")
    monkeypatch.chdir(tmp_path)
    cause, *lines = run("vdiff import edm 'my net.pkl'").stderr.splitlines()
    assert cause.startswith("error: my net.pkl is a pickle")
    assert cause.endswith("then vdiff import edm 'my net.pt'")
    assert len(lines) == 3
    python("\n".join(lines))
    done("vdiff import edm song.pt")
    done("vdiff import edm 'my net.pt'")
    due, found = (load_checkpoint(Path("checkpoints") / name)[0].state_dict() for name in ("song", "my net"))
    assert all(torch.equal(found[name], tensor) for name, tensor in due.items())
    text = (ROOT / "docs" / "teachers.md").read_text(encoding="utf-8")
    assert "".join(f"    {line.replace(f'{tmp_path}/my net', 'edm')}\n" for line in lines) in text


@pytest.mark.parametrize(
    ("name", "flags", "code", "words"),
    [
        ("model.pt", "", 2, "does not have the name of a published file"),
        ("cd_imagenet64_l2.pt", "", 1, "is a consistency model"),
        ("64x64_classifier.pt", "", 1, "is not a model of images alone"),
        ("512x512_diffusion.pt", "", 1, "take the model of 256 pixels"),
        ("64x64_diffusion.pt", "", 1, "lacks input_blocks.0.0.bias"),
        ("model.pt", "--flags --colour=3", 2, "--colour is not a flag"),
        ("model.pt", "--flags --image_size", 2, "need pairs"),
        ("model.pt", "--flags '--image_size big'", 2, "--image_size is 'big'"),
        ("model.pt", "--flags '--class_cond perhaps'", 2, "give True or False"),
        ("model.pt", "--flags '--image_size 48'", 1, "needs a channel_mult that begins with 1"),
        ("model.pt", "--flags '--noise_schedule square'", 1, "neither linear nor cosine"),
        ("model.pt", "--flags '--num_channels 50'", 1, "must be a multiple of 32"),
        ("model.pt", "--flags '--num_res_blocks -1'", 1, "num_blocks must be at least 1"),
    ],
)
def test_networks_of_openai_that_cannot_be_read_are_refused(name, flags, code, words, tmp_path):
    torch.save({"x": torch.zeros(1)}, tmp_path / name)
    assert words in error(f"vdiff import openai {tmp_path / name} {flags} --out {tmp_path / 'out'}", code)


@pytest.mark.parametrize("name", KNOWN)
def test_flags_of_published_files_describe_a_network(name):
    repository, flags = KNOWN[name]
    values, remarks = _values(flags, repository)
    unet = _unet_config(values, repository)
    assert remarks == []
    assert (unet.num_classes == 1000) == ("cond" in name.split("_") or name in CLASS_CONDITIONAL)


CLASS_CONDITIONAL = {"64x64_diffusion", "128x128_diffusion", "256x256_diffusion", "edm_imagenet64_ema"}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "cannot be read"),
        (b"\xdd\xff\xff\xff\xff", "cannot be read"),
        (msgspec.msgpack.encode({"params": 1}), "it holds no ema_params"),
        (msgspec.msgpack.encode({"ema_params": {"a": 1}}), "a is not an array"),
        (msgspec.msgpack.encode({"ema_params": {}}), "conv_in.weight"),
        (
            msgspec.msgpack.encode(
                {"ema_params": {"a": msgspec.msgpack.Ext(1, msgspec.msgpack.encode(([9], "float32", b"1234")))}}
            ),
            "cannot be read",
        ),
    ],
)
def test_files_that_are_no_checkpoint_of_google_are_refused(content, words, tmp_path):
    (tmp_path / "file").write_bytes(content)
    assert words in error(f"vdiff import google {tmp_path / 'file'} --out {tmp_path / 'out'}", 1)


def test_the_image_size_of_an_unknown_shape_is_asked_for(tmp_path):
    (tmp_path / "checkpoint_1").write_bytes(flax_state(recorded("google_cifar")))
    assert "--image_size is needed" in error(f"vdiff import google {tmp_path / 'checkpoint_1'}", 2)
    assert "--image_size 9" in error(f"vdiff import google {tmp_path / 'checkpoint_1'} --image_size 9", 2)
