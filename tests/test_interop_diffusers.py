"""Pipelines of diffusers, both ways: diffusers, where vdiff cannot be imported, draws the images that ours draw."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests import diffusers_side, exported
from tests.commands import ROOT, done, error, tree
from tests.oracles import condition
from tests.toy import assert_equal_bits, write_checkpoint
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import Ddim, Ddpm, Sampler, sample
from vdiff.diffusion.schedules import DdpmCosineSchedule, build_schedule, grid_angles, grid_times
from vdiff.errors import OptionError, VdiffError
from vdiff.interop.diffusers import folders, writing
from vdiff.interop.diffusers.folders import FILES
from vdiff.interop.diffusers.reading import import_pipeline
from vdiff.interop.diffusers.scheduler import (
    BETAS,
    RULES,
    SCHEDULERS,
    WITHOUT_EFFECT,
    betas_of,
    read_schedule,
    remarks,
)
from vdiff.interop.diffusers.unet import ONLY, READ, write_unet_config
from vdiff.interop.diffusers.writing import export_pipeline
from vdiff.interop.foreign import JsonFile
from vdiff.models.checkpoint import WEIGHTS, load_checkpoint, read_config
from vdiff.models.unet_config import UNetConfig
from vdiff.training.presets import DISTILLING, FINE_TUNING, OF_SOUNDS

TOLERANCE = 1e-4
COUNT = 3
UNET_FILE = "unet/diffusion_pytorch_model.safetensors"

# Checkpoints of ours, to be exported

SMALL: dict[str, Any] = {
    "channels": 8,
    "embedding_channels": 12,
    "multipliers": (1, 2),
    "num_blocks": 1,
    "attention_strides": (2,),
    "head_channels": 4,
    "num_groups": 4,
}
TEACHER = {"method": "progressive", "num_timesteps": 16, "teacher": {"method": "base", "path": "checkpoints/original"}}
DISTILLED = {"method": "progressive", "num_timesteps": 8, "teacher": TEACHER}
OURS: dict[str, dict[str, Any]] = {
    "v": {**DISTILLED, "unet": SMALL},
    "x": {
        **DISTILLED,
        "prediction": "x",
        "schedule": {"name": "linear"},
        "unet": SMALL
        | {"resample": "conv", "time_affine": False, "downsample_pad": "end", "freq_shift": 1, "norm_eps": 1e-6},
    },
    "classes": {
        **DISTILLED,
        "schedule": {"name": "ddpm_cosine"},
        "class_names": ["cat", "dog", "7"],
        "unet": SMALL | {"num_classes": 3, "null_class": True},
    },
    "eps": {
        "prediction": "eps",
        "schedule": {"name": "scaled_linear", "first_beta": 0.001, "last_beta": 0.003},
        "num_timesteps": 1000,
        "unet": SMALL | {"multipliers": (1, 1, 2), "num_blocks": 2, "attention_strides": (1, 2), "num_heads": 1},
    },
    "grey": {
        **DISTILLED,
        "unet": SMALL
        | {
            "channels": 32,
            "num_groups": 0,
            "in_channels": 1,
            "out_channels": 1,
            "attention_strides": (1, 2),
            "head_channels": 0,
            "num_heads": 1,
        },
    },
    "uncut": {**DISTILLED, "schedule": {"name": "cosine", "logsnr_max": float("inf")}, "unet": SMALL},
    "sparse": {
        **DISTILLED,
        "schedule": {"name": "ddpm_cosine", "num_levels": 8, "labels_per_level": 128},
        "unet": SMALL,
    },
    "guided": {
        **DISTILLED,
        "class_names": ["cat", "dog"],
        "guidance_range": [0.0, 4.0],
        "unet": SMALL | {"num_classes": 2, "guidance_input": True},
    },
}
EXPORTS: dict[str, dict[str, Any]] = {
    **{f"{name} False": {"checkpoint": name} for name in OURS if name != "guided"},
    **{f"{name} True": {"checkpoint": name, "clip": True} for name in OURS if name != "guided"},
    "one class": {"checkpoint": "classes", "class_name": "dog", "clip": True},
    "number": {"checkpoint": "classes", "class_name": "0"},
    "name before number": {"checkpoint": "classes", "class_name": "7"},
    "no class": {"checkpoint": "classes", "class_name": "none"},
    "one weight": {"checkpoint": "guided", "guidance": 1.5},
    "one of both": {"checkpoint": "guided", "guidance": 3.0, "class_name": "cat"},
}
TOLD: dict[str, dict[str, Any]] = {
    "classes": {"classes": [0, 3, 2]},
    "one class": {"classes": [1] * COUNT},
    "number": {"classes": [0] * COUNT},
    "name before number": {"classes": [2] * COUNT},
    "no class": {"classes": [3] * COUNT},
    "one weight": {"classes": [1, 0, 1], "guidance": 1.5},
    "one of both": {"classes": [0] * COUNT, "guidance": 3.0},
}
"""What our networks are told to answer as the exported ones do."""
FULLY = ("v False", "x False", "classes False", "eps False")
CASES = [(name, steps) for name in EXPORTS for steps in ((1, 2, 4, 8) if name in FULLY else (1, 8))]
SLOW = {"x True", "eps True", "grey True", "uncut True", "sparse True", "uncut False", "name before number"}
"""Exports that diffusers draws for slow tests only."""
CARDS = {"v": "v", "classes": "classes"}
"""Exports with a model card, whose program is run."""

# Pipelines of theirs, to be imported: the layouts of published ones, and others

PUBLISHED = {
    "act_fn": "silu",
    "attention_head_dim": None,
    "center_input_sample": False,
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 4,
    "out_channels": 3,
    "time_embedding_type": "positional",
}
"""The options of google/ddpm-*, but for the 32 groups, as these are a sixteenth as wide."""
LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "num_train_timesteps": 1000}
THEIRS: dict[str, dict[str, Any]] = {
    "ddpm-celebahq-256": {
        "unet": PUBLISHED
        | {
            "sample_size": 32,
            "block_out_channels": [8, 8, 16, 16, 32, 32],
            "down_block_types": [*["DownBlock2D"] * 4, "AttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "AttnUpBlock2D", *["UpBlock2D"] * 4],
        },
        "pipeline": "DDPMPipeline",
        "scheduler_class": "DDPMScheduler",
        "scheduler": LINEAR | {"clip_sample": True, "variance_type": "fixed_small"},
        "flat": True,
    },
    "ddpm-cifar10-32": {
        "unet": PUBLISHED
        | {
            "sample_size": 16,
            "block_out_channels": [8, 16, 16, 16],
            "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
        },
        "pipeline": "DDPMPipeline",
        "scheduler_class": "DDPMScheduler",
        "scheduler": LINEAR | {"num_train_timesteps": 12, "beta_end": 0.5},
        "flat": True,
    },
    "ddim-v": {
        "unet": {
            "sample_size": 8,
            "block_out_channels": [8, 16],
            "time_embedding_dim": 20,
            "down_block_types": ["AttnDownBlock2D", "ResnetDownsampleBlock2D"],
            "up_block_types": ["ResnetUpsampleBlock2D", "AttnUpBlock2D"],
            "downsample_type": "resnet",
            "upsample_type": "resnet",
            "resnet_time_scale_shift": "scale_shift",
            "attn_norm_num_groups": 8,
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "num_class_embeds": 4,
        },
        "pipeline": "DDIMPipeline",
        "scheduler_class": "DDIMScheduler",
        "scheduler": {
            "beta_schedule": "squaredcos_cap_v2",
            "prediction_type": "v_prediction",
            "timestep_spacing": "trailing",
        },
    },
    "x": {
        "unet": {
            "sample_size": [8, 8],
            "in_channels": 1,
            "out_channels": 1,
            "block_out_channels": [16],
            "down_block_types": ["DownBlock2D"],
            "up_block_types": ["UpBlock2D"],
            "norm_num_groups": 2,
            "attention_head_dim": 4,
        },
        "pipeline": "DDIMPipeline",
        "scheduler_class": "DDIMScheduler",
        "scheduler": {
            "beta_schedule": "scaled_linear",
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "prediction_type": "sample",
            "set_alpha_to_one": False,
            "clip_sample": False,
        },
    },
}
TRAILING = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
CLIPPED = {"use_clipped_model_output": True}
DRAWN: dict[str, dict[str, Any]] = {
    "celebahq ddim": {
        "of": "ddpm-celebahq-256",
        "pipeline": "DDIMPipeline",
        "scheduler": TRAILING,
        "call": CLIPPED,
        "steps": 4,
    },
    "celebahq ddpm": {"of": "ddpm-celebahq-256", "pipeline": "DDPMPipeline", "scheduler": TRAILING, "steps": 5},
    "cifar10 as it is": {"of": "ddpm-cifar10-32", "pipeline": "DDPMPipeline", "steps": 12},
    "cifar10 ddim as it is": {"of": "ddpm-cifar10-32", "pipeline": "DDIMPipeline", "call": CLIPPED, "steps": 12},
    "v as it is": {"of": "ddim-v", "pipeline": "DDIMPipeline", "call": CLIPPED, "steps": 8, "classes": [3, 0, 2]},
    "v eta": {
        "of": "ddim-v",
        "pipeline": "DDIMPipeline",
        "call": CLIPPED | {"eta": 0.5},
        "steps": 10,
        "classes": [1, 1, 3],
    },
    "x": {"of": "x", "pipeline": "DDIMPipeline", "scheduler": TRAILING, "steps": 8},
}
OUR_SAMPLERS: dict[str, Sampler] = {
    "celebahq ddim": Ddim(),
    "celebahq ddpm": Ddpm(),
    "cifar10 as it is": Ddpm(),
    "cifar10 ddim as it is": Ddim(),
    "v as it is": Ddim(),
    "v eta": Ddim(eta=0.5),
    "x": Ddim(clipping_value=None),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our checkpoints (`ours/`), their exports (`exports/`), their pipelines (`theirs/`), and what
    diffusers drew of all of them in one process."""
    place = tmp_path_factory.mktemp("exchange")
    for seed, (name, values) in enumerate(OURS.items()):
        unet = UNetConfig(**values["unet"])
        checkpoint = place / "ours" / name
        changes = {"image_size": 8, **values, "unet": unet.to_dict()}
        write_checkpoint(checkpoint, seed=seed, channels=unet.in_channels, **changes)
        randomise(checkpoint, seed)
    jobs: dict[str, list[dict[str, Any]]] = {"make": [], "draw": [], "run": [], "slow": []}
    for name, options in EXPORTS.items():
        values = {"clip": False} | {key: value for key, value in options.items() if key != "checkpoint"}
        export_pipeline(place / "ours" / options["checkpoint"], place / "exports" / name, **values)
        call = CLIPPED if options.get("clip") else {}
        asked = TOLD.get(name.split()[0] if name.startswith("classes") else name, {}).get("classes")
        classes = asked if name.startswith("classes") or name == "one weight" else None
        for steps in [steps for case, steps in CASES if case == name]:
            jobs["slow" if name in SLOW else "draw"].append(
                {"name": f"{name} {steps}", "folder": str(place / "exports" / name), "pipeline": "DDIMPipeline"}
                | {"call": call | {"num_inference_steps": steps}, "classes": classes, "count": COUNT, "seed": steps}
            )
    for name, checkpoint in CARDS.items():
        folder = place / "cards" / name
        export_pipeline(place / "ours" / checkpoint, folder, clip=True, license_name="mit")
        jobs["run"].append({"name": f"card {name}", "folder": str(folder)})
    for seed, (name, values) in enumerate(THEIRS.items()):
        jobs["make"].append({**values, "folder": str(place / "theirs" / name), "seed": seed})
    for name, values in DRAWN.items():
        call = values.get("call", {}) | {"num_inference_steps": values["steps"]}
        folder = str(place / "theirs" / values["of"])
        jobs["draw"].append({**values, "name": name, "folder": folder, "call": call, "count": COUNT, "seed": 0})
    (place / "slow.json").write_text(json.dumps({"make": [], "draw": jobs.pop("slow"), "run": []}))
    (place / "jobs.json").write_text(json.dumps(jobs))
    with exported.without(["vdiff"], place):
        diffusers_side.main("jobs.json", "jobs.safetensors")
    return place


@pytest.fixture(scope="module")
def drawn(place: Path) -> dict[str, Tensor]:
    """What diffusers drew."""
    return load_file(place / "jobs.safetensors")


@pytest.fixture(scope="module")
def slowly_drawn(place: Path) -> dict[str, Tensor]:
    """What diffusers drew of `SLOW`, in a process of its own."""
    program = [sys.executable, "-I", str(ROOT / "tests/diffusers_side.py"), "slow.json", "slow.safetensors"]
    process = subprocess.run(program, cwd=place, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert process.returncode == 0, process.stderr.decode()
    return load_file(place / "slow.safetensors")


def randomise(checkpoint: Path, seed: int) -> None:
    """Weights that keep features at their size: the images are neither grey nor clipped all over."""
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(checkpoint / WEIGHTS)
    for name in sorted(tensors):
        tensor = tensors[name]
        fan_in = tensor[0].numel() if tensor.ndim > 1 else 9
        tensors[name] = torch.randn(tensor.shape, generator=generator) / fan_in**0.5
    save_file(tensors, checkpoint / WEIGHTS)


def draw(
    checkpoint: Path, sampler: Sampler, *, steps: int, seed: int, told: dict[str, Any], count: int = COUNT
) -> Tensor:
    """Images of our sampler, from the noise that diffusers' pipelines take."""
    denoiser, config = load_checkpoint(checkpoint)
    shape = (count, denoiser.network.signature.channels, config.image_size, config.image_size)
    generator = torch.Generator().manual_seed(seed)
    classes = torch.tensor(told["classes"]) if told.get("classes") else None
    guidance = torch.full((count,), told["guidance"]) if "guidance" in told else None

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        prediction: Prediction = denoiser(z, t, condition(classes, guidance))
        return prediction

    def noise() -> Tensor:
        return torch.randn(shape, generator=generator)

    with torch.no_grad():
        return sample(denoise, denoiser.schedule, sampler, z=noise(), num_steps=steps, noise=noise)


def assert_drawn(drawn: dict[str, Tensor], name: str, expected: Tensor) -> None:
    """Both of diffusers' ways agree with ours, on images that say something."""
    looped = drawn[f"{name} looped"]
    assert looped.std() > 0.05
    assert (looped.abs() < 1).float().mean() > 0.02
    assert (looped - expected).abs().max() <= TOLERANCE
    if f"{name} called" in drawn:
        shown = (expected / 2 + 0.5).clamp(0, 1)
        assert (drawn[f"{name} called"] - shown).abs().max() <= TOLERANCE


# Export


@pytest.mark.parametrize(
    ("name", "steps"),
    [pytest.param(*case, marks=[pytest.mark.slow] if case[0] in SLOW else []) for case in CASES],
)
def test_diffusers_draws_our_images(place, request, name, steps):
    """Without a clip a plain call does; with one, a call with use_clipped_model_output."""
    drawn = request.getfixturevalue("slowly_drawn" if name in SLOW else "drawn")
    clip = 1.0 if EXPORTS[name].get("clip") else None
    told = TOLD.get(name.split()[0] if name.startswith("classes") else name, {})
    checkpoint = place / "ours" / EXPORTS[name]["checkpoint"]
    expected = draw(checkpoint, Ddim(clipping_value=clip), steps=steps, seed=steps, told=told)
    assert_drawn(drawn, f"{name} {steps}", expected)
    assert (f"{name} {steps} called" in drawn) == ("classes" not in told or "class_name" in EXPORTS[name])


def test_the_program_in_the_model_card_draws_our_images(place, drawn):
    told = {"classes": [k % 4 for k in range(16)]}
    expected = draw(place / "ours/classes", Ddim(), steps=8, seed=0, told=told, count=16)
    assert (drawn["card classes z"] - expected).abs().max() <= TOLERANCE
    expected = draw(place / "ours/v", Ddim(), steps=8, seed=0, told={}, count=16)
    shown = ((expected / 2 + 0.5).clamp(0, 1) * 255).round()
    assert (drawn["card v images"] - shown).abs().max() <= 1


def test_the_levels_of_a_continuous_schedule_are_its_own():
    """∏ (1 − β_j) = cos² φ(k/L), to the last level, whose ᾱ is 2·10⁻⁹."""
    for values in ({"name": "cosine"}, {"name": "cosine", "logsnr_max": 8.0, "label_scale": 50}):
        schedule = build_schedule(values)
        betas = torch.tensor(betas_of(schedule), dtype=torch.float64)
        kept = schedule.angle(grid_times(schedule.label_scale)[1:]).cos() ** 2
        torch.testing.assert_close((1 - betas).cumprod(0), kept, rtol=1e-9, atol=0)


def test_what_is_written(place):
    """Files, and the words that are not checked by images."""
    folder = place / "exports" / "v False"
    assert sorted(path for path, data in tree(folder).items() if data is not None) == sorted(
        [UNET_FILE, "unet/config.json", "scheduler/scheduler_config.json", "model_index.json", "vdiff/config.json"]
    )
    scheduler = json.loads((folder / "scheduler/scheduler_config.json").read_text())
    assert (scheduler["num_train_timesteps"], len(scheduler["trained_betas"])) == (1024, 1024)
    assert (scheduler["timestep_spacing"], scheduler["prediction_type"]) == ("trailing", "v_prediction")
    assert (scheduler["clip_sample"], scheduler["set_alpha_to_one"]) == (False, True)
    unet = json.loads((folder / "unet/config.json").read_text())
    assert (unet["attention_head_dim"], unet["norm_num_groups"], unet["sample_size"]) == (4, 4, 8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prediction": "both"}, "no prediction type 'both'; only eps, v, x can be written"),
        ({"unet": {"fold": 2, "attention_strides": (4,)}}, "UNet2DModel does not support fold 2"),
        ({"unet": {"guidance_input": True}}, "a weight of guidance as an input; give --guidance W"),
        ({"unet": {"multipliers": (2, 4)}}, "a first multiplier of 2"),
        (
            {"unet": {"num_groups": 0}},
            r"different numbers of groups \(8 at 8 channels, 16 at 16 channels, 32 at 32 channels\); train",
        ),
        (
            {"unet": {"attention_strides": (1,), "num_heads": 2, "head_channels": 0}},
            "heads of 4, 8 channels; train with",
        ),
        ({"num_timesteps": 6}, "cannot place 6 equal steps on 1024 timesteps; distil to"),
    ],
)
def test_what_diffusers_cannot_say_is_refused(tmp_path, changes, message):
    values = {**DISTILLED, **changes, "unet": SMALL | changes.get("unet", {})}
    outputs = 6 if values.get("prediction") == "both" else 3
    write_checkpoint(
        tmp_path / "model",
        channels=3,
        **values | {"unet": UNetConfig(**values["unet"], out_channels=outputs).to_dict()},
    )
    with pytest.raises(VdiffError, match=message):
        export_pipeline(tmp_path / "model", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("v", {"class_name": "cat"}, "--class: this network has no classes"),
        ("classes", {"class_name": "3"}, "--class: unknown class '3'; choose from cat, dog, 7, none"),
        ("guided", {"class_name": "none", "guidance": 1.0}, "--class: unknown class 'none'; choose from cat, dog"),
        ("guided", {"guidance": 4.5}, r"--guidance 4.5: the network supports 0.0 to 4.0"),
        ("v", {"guidance": 1.0}, "--guidance: this network does not take a guidance weight"),
    ],
)
def test_unknown_classes_and_weights_are_refused(place, tmp_path, name, options, message):
    with pytest.raises(OptionError, match=message):
        export_pipeline(place / "ours" / name, tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_the_presets_that_can_be_exported():
    """The others have levels with different numbers of groups."""
    for path in sorted((ROOT / "vdiff/presets").glob("*.toml")):
        if path.stem in (*FINE_TUNING, *DISTILLING):
            continue
        config = UNetConfig.from_dict(tomllib.loads(path.read_text())["unet"])
        if path.stem in OF_SOUNDS:
            with pytest.raises(VdiffError, match="does not support sounds"):
                write_unet_config(replace(config, dims=1), 8192)
        elif path.stem in ("celebahq256", "toy"):
            with pytest.raises(VdiffError, match="different numbers of groups"):
                write_unet_config(config, 64)
        else:
            assert write_unet_config(config, 64)["norm_num_groups"] == 32


# Import


@pytest.mark.parametrize("name", DRAWN)
def test_we_draw_the_images_of_diffusers(place, drawn, tmp_path, name):
    values = DRAWN[name]
    import_pipeline(str(place / "theirs" / values["of"]), tmp_path / "model")
    told = {key: values[key] for key in ("classes",) if key in values}
    expected = draw(tmp_path / "model", OUR_SAMPLERS[name], steps=values["steps"], seed=0, told=told)
    assert_drawn(drawn, name, expected)


def test_what_an_imported_model_says_of_itself(place, tmp_path):
    found = {}
    for name in THEIRS:
        made = import_pipeline(str(place / "theirs" / name), tmp_path / name)
        found[name] = read_config(tmp_path / name)
        assert found[name] == made.config
        assert (found[name].method, found[name].teacher, found[name].is_finished) == ("base", None, True)
        assert found[name].dataset == f"imported:diffusers/{name}"
    linear = {"name": "linear", "num_levels": 1000, "first_beta": 1e-4, "last_beta": 0.02}
    assert [config.schedule for config in found.values()] == [
        linear,
        linear | {"num_levels": 12, "last_beta": 0.5},
        DdpmCosineSchedule(1000).to_dict(),
        linear | {"name": "scaled_linear", "first_beta": 0.00085, "last_beta": 0.012},
    ]
    assert [config.prediction for config in found.values()] == ["eps", "eps", "v", "x"]
    assert [config.num_timesteps for config in found.values()] == [1000, 12, 1000, 1000]
    assert [config.image_size for config in found.values()] == [32, 16, 8, 8]
    assert found["ddim-v"].class_names == ["0", "1", "2", "3"]
    shape = UNetConfig.from_dict(found["ddpm-celebahq-256"].unet)
    assert (shape.multipliers, shape.attention_strides, shape.num_blocks) == ((1, 1, 2, 2, 4, 4), (16,), 2)
    assert (shape.freq_shift, shape.norm_eps, shape.downsample_pad, shape.resample) == (1, 1e-6, "end", "conv")


def test_differences_in_sampling_are_told(place, tmp_path):
    def told(name: str) -> list[str]:
        said = import_pipeline(str(place / "theirs" / name), tmp_path / name).remarks
        assert read_config(tmp_path / name).approximated == said
        return said

    leading = "its timesteps are leading, vdiff's are trailing: they agree only at {} steps"
    assert told("ddpm-celebahq-256") == [leading.format(1000)]
    assert told("ddim-v") == []
    assert told("x") == [
        leading.format(1000),
        "its last step ends at its first noise level, not at the image (set_alpha_to_one)",
        "it does not clip the image; vdiff does without --no_clip",
    ]


LEADING = "its timesteps are leading, vdiff's are trailing: they agree only at 1000 steps"
LINSPACE = "its timesteps are linspace, vdiff's are trailing: they agree only at 1000 steps"
UNCLIPPED = "it does not clip the image; vdiff does without --no_clip"


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        ("DDPM", {}, [LEADING]),
        ("DDIM", {"steps_offset": 1}, [LEADING, "its timesteps begin 1 later than vdiff's (steps_offset)"]),
        ("DDIM", {"steps_offset": 1, "timestep_spacing": "trailing"}, []),
        (
            "DDPM",
            {"variance_type": "fixed_large"},
            [LEADING, "its noise has the variance fixed_large (--sampler ddpm --large_variance 1)"],
        ),
        ("DDPM", {"clip_sample_range": 2.0}, [LEADING, "it clips the image to ±2.0: --clipping_value 2.0"]),
        ("DDPM", {"clip_sample_range": 2.0, "clip_sample": False}, [LEADING, UNCLIPPED]),
        (
            "PNDM",
            {},
            [LEADING, "its last step ends at its first noise level, not at the image (set_alpha_to_one)", UNCLIPPED],
        ),
        ("EulerDiscrete", {}, [LINSPACE, UNCLIPPED]),
        (
            "EulerDiscrete",
            {"clip_sample": True, "clip_sample_range": 2.0},
            [LINSPACE, UNCLIPPED],
        ),  # it has no such field
        (
            "EulerDiscrete",
            {"use_karras_sigmas": True, "final_sigmas_type": "sigma_min"},
            [
                LINSPACE,
                "its last step ends at its first noise level, not at the image (final_sigmas_type)",
                UNCLIPPED,
                "its noise levels are spaced by use_karras_sigmas; vdiff's only with --grid",
            ],
        ),
        ("DPMSolverSinglestep", {}, [LINSPACE, UNCLIPPED]),
        (
            "DPMSolverMultistep",
            {"lambda_min_clipped": -5.1, "thresholding": True},
            [
                LINSPACE,
                "it skips its highest noise levels (lambda_min_clipped)",
                "it clips to a quantile of the pixels (thresholding), vdiff to ±1 by default",
            ],
        ),
        ("DDPM", {"zebra": 1}, [LEADING, "theirs has 'zebra', which vdiff does not know: it may draw other images"]),
    ],
)
def test_what_a_scheduler_does_in_another_way_is_told(kind, values, expected):
    assert remarks(JsonFile("theirs", {"_class_name": f"{kind}Scheduler", **values})) == expected


NOT_READ = {
    "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler",  # shifted noise levels
    "LCMScheduler", "TCDScheduler",  # consistency models
    "DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler", "RePaintScheduler",  # they draw no images
    "SASolverScheduler", "DPMSolverSDEScheduler",  # seldom met
}  # fmt: skip


def test_every_field_of_every_scheduler_is_known():
    """A class, a field or a default that a new version of diffusers brings fails here first."""
    diffusers = pytest.importorskip("diffusers")
    names = [name for name in dir(diffusers) if name.endswith("Scheduler")]
    fields = {name: inspect.signature(getattr(diffusers, name).__init__).parameters for name in names}
    gaussian = {name: values for name, values in fields.items() if "trained_betas" in values and "beta_end" in values}
    assert gaussian.keys() - NOT_READ == SCHEDULERS.keys()
    for name in SCHEDULERS:
        defaults = {key: value.default for key, value in gaussian[name].items() if key != "self"}
        assert BETAS <= defaults.keys() <= BETAS | RULES.keys() | WITHOUT_EFFECT, name
        told = {key: value for key, value in defaults.items() if key in RULES or key in ("beta_start", "beta_end")}
        assert told == SCHEDULERS[name], name
        assert (defaults["num_train_timesteps"], defaults["beta_schedule"]) == (1000, "linear")
        assert (defaults["prediction_type"], defaults["trained_betas"]) == ("epsilon", None)
    known = inspect.signature(diffusers.UNet2DModel.__init__).parameters.keys() - {"self"}
    assert known <= ONLY.keys() | READ


@pytest.mark.filterwarnings("ignore:__array_")  # in their set_timesteps
@pytest.mark.parametrize("name", SCHEDULERS)
def test_noise_levels_and_labels_are_theirs(name, tmp_path):
    """At timestep k of theirs the network sees the noise, and is told the label, of our t = (k + 1)/L."""
    diffusers = pytest.importorskip("diffusers")
    kind = getattr(diffusers, name)
    takes_spacing = "timestep_spacing" in SCHEDULERS[name]
    theirs = kind(num_train_timesteps=60, beta_end=0.1, **{"timestep_spacing": "trailing"} if takes_spacing else {})
    theirs.save_config(tmp_path)
    schedule = read_schedule(JsonFile.read(tmp_path / "scheduler_config.json", ""))
    tangents = grid_angles(schedule, grid_times(60)).tan()
    kept = theirs.alphas_cumprod.double()
    torch.testing.assert_close(tangents[1:], ((1 - kept) / kept).sqrt(), rtol=1e-4, atol=0)
    theirs.set_timesteps(10)
    levels = theirs.timesteps.round().long()
    assert 0 <= levels.min() < levels.max() < 60
    if hasattr(theirs, "sigmas") and not name.startswith("KDPM2"):  # whose steps are between levels
        torch.testing.assert_close(theirs.sigmas[:-1].double(), tangents[levels + 1], rtol=1e-3, atol=0)
    if takes_spacing and not name.startswith("KDPM2"):
        t = (levels.double() + 1) / schedule.label_scale
        torch.testing.assert_close(schedule.timestep(t), theirs.timesteps.double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("form", ["fp16", "parts", "fp16 in parts"])
def test_variants_and_parts_are_read(place, tmp_path, form):
    diffusers = pytest.importorskip("diffusers")
    theirs, variant = tmp_path / "theirs", "fp16" if "fp16" in form else None
    shutil.copytree(place / "theirs/x", theirs)
    import_pipeline(str(theirs), tmp_path / "expected")
    network = diffusers.UNet2DModel.from_pretrained(theirs / "unet")
    (theirs / UNET_FILE).unlink()
    size = {"max_shard_size": "20KB"} if "parts" in form else {}
    (network.half() if variant else network).save_pretrained(theirs / "unet", variant=variant, **size)
    assert (len(list((theirs / "unet").glob("*.safetensors"))) > 1) == ("parts" in form)
    assert not (theirs / UNET_FILE).exists()
    made = import_pipeline(str(theirs), tmp_path / "made")
    assert any("the variant diffusion_pytorch_model.fp16" in remark for remark in made.remarks) == bool(variant)
    expected, found = (load_file(tmp_path / name / WEIGHTS) for name in ("expected", "made"))
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor.half().float() if variant else tensor)
    if form == "parts":
        index = theirs / f"{UNET_FILE}.index.json"
        index.write_text(json.dumps({"weight_map": {"conv_in.weight": "../../x/diffusion_pytorch_model.safetensors"}}))
        with pytest.raises(VdiffError, match="weight_map is "):
            import_pipeline(str(theirs), tmp_path / "other")
        index.unlink()
        for name in ("fp16", "ema"):
            shutil.copy(tmp_path / "made" / WEIGHTS, theirs / f"unet/diffusion_pytorch_model.{name}.safetensors")
        with pytest.raises(VdiffError, match=r"model.ema.safetensors and diffusion_pytorch_model.fp16.safet.*; rename"):
            import_pipeline(str(theirs), tmp_path / "other")


@pytest.mark.parametrize("name", OURS)
def test_a_checkpoint_survives_the_way_there_and_back(place, tmp_path, name):
    """Bit for bit, with its steps, classes and lineage."""
    options = {"guidance": 2.0} if name == "guided" else {}
    made = export_pipeline(place / "ours" / name, tmp_path / "there", **options)
    back = import_pipeline(str(tmp_path / "there"), tmp_path / "back")
    assert back.remarks == []
    before, after = made.config, read_config(tmp_path / "back")
    teacher = {**TEACHER, "teacher": {"method": "base", "path": "original"}} if before.teacher else None  # no paths
    assert after == replace(before, dataset="imported:diffusers/there, trained by vdiff on toy", teacher=teacher)
    if name != "guided":
        assert before == read_config(place / "ours" / name)
        assert_equal_bits(place / "ours" / name / WEIGHTS, tmp_path / "back" / WEIGHTS)


@pytest.mark.parametrize("name", THEIRS)
def test_a_pipeline_survives_the_way_here_and_back(place, tmp_path, name):
    """What cannot be seen in the configuration, the order of sines and cosines, is in the weights."""
    theirs = place / "theirs" / name
    import_pipeline(str(theirs), tmp_path / "here")
    export_pipeline(tmp_path / "here", tmp_path / "there")
    shutil.rmtree(tmp_path / "there/vdiff")  # as if another program had written it
    back = import_pipeline(str(tmp_path / "there"), tmp_path / "back")
    here = read_config(tmp_path / "here")
    assert (back.config.schedule, back.config.prediction) == (here.schedule, here.prediction)
    assert_equal_bits(tmp_path / "here" / WEIGHTS, tmp_path / "back" / WEIGHTS)
    before = json.loads((theirs / ("config.json" if THEIRS[name].get("flat") else "unet/config.json")).read_text())
    after = json.loads((tmp_path / "there/unet/config.json").read_text())
    derived = {"_diffusers_version", "sample_size", "time_embedding_dim", "flip_sin_to_cos", "attn_norm_num_groups"}
    derived |= {"downsample_type", "upsample_type", "attention_head_dim"}
    assert {
        key: (value, before[key]) for key, value in after.items() if key not in derived and value != before[key]
    } == {}


def test_a_description_that_does_not_fit_is_left_aside(place, tmp_path):
    """The folder was changed after the export: what diffusers' files say holds."""
    export_pipeline(place / "ours/v", tmp_path / "there")
    for change in ("unet", "image_size", "prediction", "schedule", "class_names", "json"):
        own = json.loads((place / "exports/v False/vdiff/config.json").read_text())
        other = {"unet": {**own["unet"], "num_groups": 2}, "image_size": 16, "prediction": "x", "class_names": ["a"]}
        other |= {"schedule": {"name": "cosine", "logsnr_max": 19.0}}
        text = json.dumps(own | {change: other[change]}) if change in other else "{"
        (tmp_path / "there/vdiff/config.json").write_text(text)
        made = import_pipeline(str(tmp_path / "there"), tmp_path / change)
        assert f"{tmp_path}/there/vdiff/config.json" in made.remarks[-1]
        assert "is ignored: " in made.remarks[-1]
        assert (made.config.method, made.config.num_timesteps) == ("base", 1024)
        assert made.config.dataset == "imported:diffusers/there"


@pytest.mark.parametrize("name", [name for name in OURS if name != "guided"])
def test_tables_of_seven_digits_are_recognised(place, tmp_path, name):
    shutil.copytree(place / "exports" / f"{name} False", tmp_path / "there")
    shutil.rmtree(tmp_path / "there/vdiff")
    path = tmp_path / "there/scheduler/scheduler_config.json"
    values = json.loads(path.read_text())
    values["trained_betas"] = torch.tensor(values["trained_betas"], dtype=torch.float32).tolist()
    path.write_text(json.dumps(values))
    if name == "sparse":  # a table of 8 levels, written as one of 1,024: none that has a name
        with pytest.raises(VdiffError, match="only linear, scaled_linear, cosine and sigmoid ones can be read"):
            import_pipeline(str(tmp_path / "there"), tmp_path / "back")
        return
    found = build_schedule(import_pipeline(str(tmp_path / "there"), tmp_path / "back").config.schedule)
    expected = build_schedule(read_config(place / "ours" / name).schedule)
    assert found.name == expected.name
    assert vars(found) == pytest.approx(vars(expected), rel=1e-6)


# Bad folders


def with_values(path: str, **values: Any) -> Callable[[Path], object]:
    """Change a JSON file of a folder; `...` takes a key out."""

    def change(folder: Path) -> None:
        whole = json.loads((folder / path).read_text()) | values
        (folder / path).write_text(json.dumps({key: value for key, value in whole.items() if value is not ...}))

    return change


def unet(**values: Any) -> Callable[[Path], object]:
    return with_values("unet/config.json", **values)


def scheduler(**values: Any) -> Callable[[Path], object]:
    return with_values("scheduler/scheduler_config.json", **values)


def with_weights(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], object]:
    def rewrite(folder: Path) -> None:
        tensors = load_file(folder / UNET_FILE)
        change(tensors)
        save_file(tensors, folder / UNET_FILE)

    return rewrite


def written(path: str, data: bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / path).write_bytes(data)


def without(path: str) -> Callable[[Path], object]:
    return lambda folder: (folder / path).unlink()


def as_pickle(folder: Path) -> None:
    (folder / UNET_FILE).rename((folder / UNET_FILE).with_suffix(".bin"))


def cut(folder: Path) -> None:
    os.truncate(folder / UNET_FILE, 3000)


def huge(folder: Path) -> None:
    with open(folder / "unet/config.json", "r+b") as file:
        file.truncate(2**30)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda folder: (shutil.rmtree(folder), folder.mkdir()), "holds no model_index.json; give a folder"),
    "index": (written("model_index.json", b"[]"), "model_index.json cannot be read: it is not a JSON object"),
    "pipeline": (with_values("model_index.json", _class_name="KandinskyPipeline"), "_class_name is 'Kandinsky"),
    "network": (with_values("model_index.json", unet=["diffusers", "UNet2DConditionModel"]), "only UNet2DModel"),
    "no scheduler": (without("scheduler/scheduler_config.json"), "scheduler_config.json is missing"),
    "no unet": (without("unet/config.json"), "unet/config.json is missing"),
    "no weights": (without(UNET_FILE), "safetensors is missing; vdiff never reads weights in pickles"),
    "pickle": (as_pickle, "diffusion_pytorch_model.safetensors is missing; vdiff never reads weights in pickles"),
    "cut": (cut, "truncated or damaged"),
    "huge header": (written(UNET_FILE, b"\xff" * 64), "truncated or damaged"),
    "huge": (huge, "1,024 MiB"),
    "deep": (written("unet/config.json", b"[" * 100_000), "nested too deeply"),
    "other class": (unet(_class_name="UNet2DConditionModel"), "_class_name is 'UNet2DConditionModel'"),
    "absurd width": (unet(block_out_channels=[10**9, 10**9]), "block_out_channels is [1000000000, 1000000000]"),
    "absurd depth": (unet(layers_per_block=10**9), "layers_per_block is 1000000000"),
    "absurd levels": (unet(block_out_channels=[8] * 10**5), "block_out_channels is [8, 8, 8, 8, 8, 8, ...]"),
    "absurd size": (unet(sample_size=10**9), "sample_size is 1000000000"),
    "absurd table": (scheduler(num_train_timesteps=10**9, trained_betas=None), "num_train_timesteps is 1000000000"),
    "oblong": (unet(sample_size=[8, 16]), "sample_size is [8, 16]"),
    "odd size": (unet(sample_size=7), "sample_size is 7; 2 levels need a multiple of 2"),
    "no size": (unet(sample_size=None), "sample_size is None"),
    "a word": (unet(norm_eps="small"), "norm_eps is 'small'"),
    "true": (unet(layers_per_block=True), "layers_per_block is True"),
    "no multiple": (unet(block_out_channels=[8, 12]), "block_out_channels is [8, 12]"),
    "skip blocks": (unet(down_block_types=["SkipDownBlock2D"] * 2), "down_block_types is ['SkipDownBlock2D', 'Skip"),
    "lopsided": (unet(up_block_types=["ResnetUpsampleBlock2D"] * 2), "only the down_block_types in reverse"),
    "both ways": (unet(down_block_types=["DownBlock2D", "AttnDownBlock2D"]), "all change their size in the same way"),
    "fourier": (unet(time_embedding_type="fourier"), "time_embedding_type is 'fourier'"),
    "no middle": (unet(mid_block_type=None), "mid_block_type is None"),
    "no attention": (unet(add_attention=False), "add_attention is False"),
    "absurd dropout": (unet(dropout=10**400), "dropout is 1000"),
    "strange spacing": (scheduler(timestep_spacing="a\nb"), "timestep_spacing is 'a\\nb'"),
    "heads": (unet(attention_head_dim=3), "attention_head_dim is 3; need a number that divides 16"),
    "no norm": (unet(attn_norm_num_groups=None), "attn_norm_num_groups is None"),
    "groups": (unet(norm_num_groups=3, attn_norm_num_groups=3), "8 channels do not split into 3 groups"),
    "variance": (unet(out_channels=6), "out_channels is 6"),
    "class embedding": (unet(class_embed_type="timestep"), "class_embed_type is 'timestep'"),
    "other weights": (unet(layers_per_block=2), "tensors missing (down_blocks.0.resnets.1.conv1.bias, …)"),
    "wider": (unet(in_channels=1, out_channels=1), "conv_in.weight is (8, 3, 3, 3), not (8, 1, 3, 3)"),
    "more weights": (with_weights(lambda w: w.update(more=torch.zeros(1))), "1 tensors unexpected (more, …)"),
    "fewer weights": (with_weights(lambda w: w.pop("conv_out.bias")), "1 tensors missing (conv_out.bias, …)"),
    "other scheduler": (scheduler(_class_name="EDMEulerScheduler"), "_class_name is 'EDMEulerScheduler'; only DDPMSch"),
    "predicts flow": (scheduler(prediction_type="flow_prediction"), "prediction_type is 'flow_prediction'"),
    "sigmoid": (scheduler(beta_schedule="sigmoid", trained_betas=None), "beta_schedule is 'sigmoid'"),
    "rescaled": (scheduler(rescale_betas_zero_snr=True), "rescale_betas_zero_snr is True"),
    "short table": (scheduler(trained_betas=[0.1, 0.2]), "trained_betas is [0.1, 0.2]; need 1024 numbers from 0 to 1"),
    "strange table": (scheduler(trained_betas=[0.1] * 512 + [0.2] * 512), "only linear, scaled_linear, cosine"),
    "table of one": (scheduler(trained_betas=[1.0] + [0.5] * 1023), "only linear, scaled_linear, cosine"),
    "little noise": (scheduler(trained_betas=[1e-5, 2e-5] * 512), "only linear, scaled_linear, cosine"),
    "continuous": (
        scheduler(_class_name="EulerDiscreteScheduler", timestep_type="continuous"), "timestep_type is 'continuous'; on"
    ),
    "learned": (scheduler(_class_name="DDPMScheduler", variance_type="learned_range"), "variance_type is 'learned_ran"),
    "flow": (scheduler(_class_name="UniPCMultistepScheduler", use_flow_sigmas=True), "use_flow_sigmas is True; only "),
    "absurd clip": (scheduler(clip_sample=True, clip_sample_range=10**400), "need a number from 0"),
    "latents": (unet(in_channels=4, out_channels=4), "in_channels is 4; only images of 1 or 3 channels can be read: "),
    "words in a table": (scheduler(trained_betas=["a"] * 1024), "need 1024 numbers from 0 to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_refused_in_one_line(place, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "exports/v False", "bad")
    change, message = BAD[name]
    change(Path("bad"))
    before = sorted(tmp_path.rglob("*"))
    assert message in error("vdiff import diffusers bad --out made", 1)
    assert sorted(tmp_path.rglob("*")) == before


def test_nothing_is_replaced_unasked(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    export = f"vdiff export diffusers {place}/ours/v"
    Path("mine").mkdir()
    Path("mine/model_index.json").write_text("{}")
    assert "mine exists and is not a pipeline that vdiff wrote" in error(f"{export} mine --overwrite", 1)
    assert error(f"{export} ours", 1) if Path("ours").exists() else done(f"{export} ours")
    before = tree(Path("ours"))
    assert "ours exists already; give another " in error(f"{export} ours", 1)
    assert "holds no model_index.json" in error(f"vdiff import diffusers {place}/ours/v --out made", 1)
    assert "missing" in error("vdiff export diffusers nowhere ours --overwrite", 1) or tree(Path("ours")) == before
    assert tree(Path("ours")) == before
    done(f"vdiff export diffusers {place}/ours/x ours --overwrite")
    assert tree(Path("ours")).keys() == before.keys()
    assert tree(Path("ours")) != before
    done("vdiff import diffusers ours --out made")
    assert "made exists already; give another " in error("vdiff import diffusers ours --out made", 1)
    done("vdiff import diffusers ours --out made --overwrite --num_timesteps 4")
    assert read_config(Path("made")).num_timesteps == 4
    shutil.copytree(place / "ours/v", "trained")
    assert "trained exists and is not an imported model" in error(
        "vdiff import diffusers ours --out trained --overwrite", 1
    )
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []


def test_a_disk_that_is_full_leaves_what_was_there(place, tmp_path, monkeypatch):
    export_pipeline(place / "ours/v", tmp_path / "there")
    before = tree(tmp_path)

    def full(*_: object) -> None:
        raise VdiffError("cannot write: No space left on device", "free space")

    monkeypatch.setattr(writing, "write_tensors", full)
    with pytest.raises(VdiffError, match="No space left"):
        export_pipeline(place / "ours/x", tmp_path / "there", overwrite=True)
    assert tree(tmp_path) == before


# Commands


def test_commands_say_what_they_made_and_what_comes_next(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = done(f"vdiff export diffusers {place}/ours/v out").stdout.splitlines()
    assert lines == [
        "out: DDIMPipeline, 8 steps",
        "next       python -c 'from diffusers import DDIMPipeline as P; "
        'P.from_pretrained("out")(num_inference_steps=8, use_clipped_model_output=True).images[0].show()\'',
    ]
    result = done(f"vdiff export diffusers {place}/ours/classes classes")
    assert result.stdout == "classes: DDIMPipeline, 8 steps\n"
    assert result.stderr == ("DDIMPipeline has no argument for a class: see README.md, or fix a class with --class\n")
    assert "library_name: diffusers" in Path("out/README.md").read_text()
    assert "unet(z, t, class_labels=classes)" in Path("classes/README.md").read_text()
    result = done("vdiff import diffusers out")
    assert result.stdout.splitlines() == [
        "checkpoints/out: predicts v, schedule cosine, 8 steps, 8 × 8 × 3, 8 channels × [1, 2]",
        "next       python sample.py --checkpoint checkpoints/out",
    ]
    assert result.stderr == ""
    done("sample.py --checkpoint checkpoints/out --num 1 --out samples")
    assert "--num_timesteps 3: this model was made for 8 steps" in error(
        "vdiff import diffusers out --out more --num_timesteps 3", 2
    )


# The hub


def test_a_name_of_the_hub_is_fetched(place, tmp_path, monkeypatch):
    """Configurations, tokenizers and safetensors alone; a folder of that name comes first."""
    asked: list[tuple[str, list[str]]] = []

    def fake(name: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert "*.fp16.safetensors" in ignore_patterns
        asked.append((name, allow_patterns))
        return str(place / "theirs/ddpm-cifar10-32")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake)
    monkeypatch.setattr(folders, "hub_answers", lambda: True)
    monkeypatch.chdir(tmp_path)
    done("vdiff import diffusers google/ddpm-cifar10-32")
    assert asked == [("google/ddpm-cifar10-32", FILES)]
    assert {Path(name).suffix for name in FILES} == {".json", ".model", ".safetensors", ".txt"}
    config = read_config(Path("checkpoints/ddpm-cifar10-32"))
    assert config.dataset == "imported:diffusers/google/ddpm-cifar10-32"
    read = [path for path in tree(place / "theirs/ddpm-cifar10-32") if any(fnmatch(path, name) for name in FILES)]
    assert sorted(read) == sorted(["model_index.json", "config.json", "scheduler_config.json", Path(UNET_FILE).name])
    shutil.copytree(place / "theirs/x", "google/ddpm-cifar10-32")
    done("vdiff import diffusers google/ddpm-cifar10-32 --out local")
    assert len(asked) == 1
    assert read_config(Path("local")).prediction == "x"


@pytest.mark.parametrize(
    "failure",
    [
        OSError("no route\nto host"),
        ValueError("Repo id must be in the form"),
        LocalEntryNotFoundError("offline"),
        RuntimeError(),
    ],
)
def test_a_hub_that_cannot_be_reached_is_one_line(tmp_path, monkeypatch, failure):
    def fail(*_: object, **__: object) -> str:
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    monkeypatch.setattr(folders, "hub_answers", lambda: True)
    monkeypatch.chdir(tmp_path)
    message = error("vdiff import diffusers owner/name", 1)
    assert message.startswith("owner/name: no such folder, and the hub does not provide it (")
    assert "\n" not in message
    assert tree(tmp_path) == {}


@pytest.mark.parametrize("source", ["nowhere", "./a/b", "a/b/c", "/none/there", "owner/"])
def test_what_is_no_name_of_the_hub_is_not_asked_for(tmp_path, monkeypatch, source):
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    monkeypatch.chdir(tmp_path)
    assert f"{source}: no such folder; give a folder" in error(f"vdiff import diffusers {source}", 1)
    Path("file").write_text("")
    assert "file is a file" in error("vdiff import diffusers file", 1)
