"""Settings: which layer wins, what is refused, the numbers of the papers, and what a network costs."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch

from tests.toy import SIZE, Watcher, distill_config, train_config, write_dataset
from vdiff.data.captions import CaptionSettings
from vdiff.data.store import DatasetMeta, StoreWriter
from vdiff.diffusion.distillation import METHODS
from vdiff.diffusion.parameterisation import PARAMETERISATIONS
from vdiff.diffusion.weighting import WEIGHTINGS
from vdiff.errors import OptionError, VdiffError
from vdiff.models.backbone import count_flops
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig
from vdiff.settings import COMMAND_LINE
from vdiff.training.base import describe, resolve_training
from vdiff.training.config import DistillConfig, TrainConfig, resolve, settings_of, values_of
from vdiff.training.presets import (
    FITTED,
    OF_SOUNDS,
    PRESETS,
    RUN_FILE,
    Settings,
    preset_for,
    read_preset,
    read_run,
    read_settings,
    write_run,
)
from vdiff.training.stages import Stage

ENOUGH = {"num_iters": 5, "batch_size": 4, "lr": 1e-3}
KINDS = (TrainConfig, DistillConfig)
every_kind = pytest.mark.parametrize("kind", KINDS)
every_preset = pytest.mark.parametrize("name", PRESETS)
FIELDS = [(kind, field) for kind in KINDS for field in settings_of(kind).values()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("config") / "toy_4")


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("config") / "classes_4", channels=3, classes=("cat", "dog"))


# Layers


@every_kind
def test_later_layers_win(kind):
    layers = {
        "preset a": {**ENOUGH, "lr": 1.0, "ema": 0.1, "dropout": 0.1, "seed": 1},
        "my.toml": {"lr": 2.0, "ema": 0.2, "dropout": 0.2},
        "environment": {"lr": 3.0, "ema": 0.3},
        COMMAND_LINE: {"lr": 4.0},
    }
    found = resolve(kind, layers)
    assert (found.lr, found.ema, found.dropout, found.seed) == (4.0, 0.3, 0.2, 1)
    assert found.clip_norm == 1.0
    backwards = resolve(kind, dict(reversed(layers.items())))
    assert (backwards.lr, backwards.ema, backwards.dropout, backwards.seed) == (1.0, 0.1, 0.1, 1)


def test_layers_change_single_keys_of_the_network():
    found = resolve(
        TrainConfig,
        {
            "preset a": {**ENOUGH, "unet": {"channels": 16, "num_blocks": 2}},
            "my.toml": {"unet": {"channels": 8, "num_heads": 4}},
        },
    )
    assert found.unet == {"channels": 8, "num_blocks": 2, "num_heads": 4}


def test_layers_are_left_as_they_are():
    preset = {**ENOUGH, "unet": {"channels": 16}}
    resolve(TrainConfig, {"preset a": preset, "my.toml": {"unet": {"channels": 8}}})
    assert preset == {**ENOUGH, "unet": {"channels": 16}}


# What is refused


def refusal(kind, origin: str, **values) -> str:
    with pytest.raises(OptionError) as caught:
        resolve(kind, {"preset a": ENOUGH, origin: values})
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return str(caught.value)


@every_kind
def test_an_unknown_key_names_its_layer_and_the_nearest_known_one(kind):
    assert refusal(kind, "my.toml", num_iter=3) == "my.toml: unknown setting 'num_iter'; did you mean 'num_iters'?"
    assert "unknown setting 'zzz'; choose from data, preset, num_iters, batch_size" in refusal(kind, "my.toml", zzz=3)


def test_settings_of_the_other_command_are_unknown():
    assert "unknown setting 'to_steps'" in refusal(TrainConfig, "my.toml", to_steps=4)
    assert "unknown setting 'prediction'" in refusal(DistillConfig, "my.toml", prediction="v")


WRONG_TYPES = [
    ("num_iters", 1.5, "a whole number"),
    ("num_iters", 5.0, "a whole number"),
    ("num_iters", True, "a whole number"),
    ("num_iters", "5", "a whole number"),
    ("num_iters", None, "a whole number"),
    ("lr", "fast", "a number"),
    ("lr", True, "a number"),
    ("lr", [1e-3], "a number"),
    ("flip", 1, "true or false"),
    ("flip", "yes", "true or false"),
    ("compile", 0, "true or false"),
    ("weighting", 3, "a string"),
    ("data", 3, "a string"),
]


@every_kind
@pytest.mark.parametrize(("key", "value", "wanted"), WRONG_TYPES)
def test_values_of_the_wrong_type(kind, key, value, wanted):
    assert refusal(kind, "my.toml", **{key: value}) == f"my.toml: {key} = {value!r} is not {wanted}; give {wanted}"
    assert refusal(kind, COMMAND_LINE, **{key: value}) == f"--{key} {value!r} is not {wanted}; give {wanted}"


def test_the_network_is_a_table():
    assert refusal(TrainConfig, "my.toml", unet=16) == "my.toml: unet = 16 is not a table; give a table"


def test_a_whole_number_is_a_number():
    found = resolve(TrainConfig, {"my.toml": {**ENOUGH, "lr": 1, "clip_norm": 2}}).lr
    assert found == 1.0
    assert type(found) is float


# lowest and highest that are allowed, and what lies just outside; None: no end
LIMITS = {
    "num_iters": (1, None, 0, None),
    "batch_size": (1, None, 0, None),
    "grad_accum": (1, None, 0, None),
    "max_bad_steps": (0, None, -1, None),
    "ema_images": (0, None, -1, None),
    "ema_interval": (1, None, 0, None),
    "snr_gamma": (1e-3, 1e6, 1e-4, 1e7),
    "class_dropout": (0, 0.99, -1e-9, 0.991),
    "caption_dropout": (0, 0.99, -1e-9, 0.991),
    "caption_keep_tokens": (0, None, -1, None),
    "keep_last": (0, None, -1, None),
    "keep_every": (0, None, -1, None),
    "lr": (5e-324, None, 0, None),
    "warmup_iters": (0, None, -1, None),
    "weight_decay": (0, None, -1e-9, None),
    "clip_norm": (5e-324, None, 0, None),
    "ema": (0, 1, -1e-9, 1.0001),
    "dropout": (0, 0.99, -1e-9, 0.991),
    "log_interval": (1, None, 0, None),
    "sample_interval": (1, None, 0, None),
    "ckpt_interval": (1, None, 0, None),
    "threads": (1, 1024, 0, 1025),
    "seed": (0, 2**32 - 1, -1, 2**32),
    "num_workers": (0, None, -1, None),
    "image_size": (1, None, 0, None),
    "guidance_scale": (1.5, 2**20, 1, 2.0**20 + 1),
    "text_encoder_lr": (5e-324, None, 0, None),
    "random_crop": (0, 2**13, -1, 2**13 + 1),
    "offset_noise": (0, 10, -1e-9, 10.1),
    "input_perturbation": (0, 10, -1e-9, 10.1),
    "lora_rank": (0, 2**12, -1, 2**12 + 1),
    "lora_alpha": (5e-324, 2**20, 0, 2.0**20 + 1),
    "lora_dropout": (0, 0.99, -1e-9, 0.991),
    "num_timesteps": (1, 2**16, 0, 2**16 + 1),
    "to_steps": (1, None, 0, None),
    "stages": (1, None, 0, None),
    "teacher_steps": (2, None, 1, None),
    "last_factor": (5e-324, None, 0, None),
    "ema_remainder": (0, 0.99, -1e-9, 0.991),
    "self_ema": (0, 0.9999, -1e-9, 0.99991),
    "first_steps": (0, None, -1, None),
    "addim": (0, 2, -1e-9, 2.01),
    "path_steps": (2, None, 1, None),
    "path_threshold": (5e-324, 1, 0, 1.0001),
    "tangent_warmup": (0, 1, -1e-9, 1.0001),
    "tangent_norm": (0, 100, -1e-9, 100.1),
    "gap_ratio": (1, 256, 0.99, 256.1),
    "gap_stages": (1, 64, 0, 65),
    "flow_share": (0, 1, -1e-9, 1.0001),
    "loss_power": (0, 2, -1e-9, 2.01),
    "check_images": (0, None, -1, None),
    "distance_images": (2, None, 1, None),
    "distance_every": (0, None, -1, None),
    "max_regression": (1, None, 0.99, None),
    "retries": (0, None, -1, None),
}


@pytest.mark.parametrize(("kind", "field"), [pair for pair in FIELDS if pair[1].name in LIMITS])
def test_ranges(kind, field):
    low, high, below, above = LIMITS[field.name]
    more = {"base": "a", "lora_rank": 1} if field.name.startswith("lora_") else {}
    more |= {"base": "a", "train_text_encoder": True} if field.name == "text_encoder_lr" else {}
    more |= {"weighting": "min_snr"} if field.name == "snr_gamma" else {}
    for value in (low, 10**9 if high is None else high):
        assert values_of(resolve(kind, {"my.toml": {**ENOUGH, **more, field.name: value}}))[field.name] == value
    bound = f"above {below}" if field.metadata["open_low"] else f"at least {low}"
    message = refusal(kind, "my.toml", **{field.name: below})
    assert message.startswith(f"my.toml: {field.name} = ")
    assert message.endswith(f" is too small; it must be {bound}")
    if above is not None:
        message = refusal(kind, COMMAND_LINE, **{field.name: above})
        assert message == f"--{field.name} {above} is too large; it must be at most {high}"
    if "float" in str(field.type):
        for value in (math.nan, math.inf):
            assert f"{value} is not a number" in refusal(kind, "my.toml", **{field.name: value})


def test_every_number_has_limits():
    numbers = {field.name for _, field in FIELDS if str(field.type).removesuffix(" | None") in ("int", "float")}
    of_families = {"sigma_data", "flow_shift", "noise_mean", "noise_std"}  # tests/test_families.py
    assert numbers == set(LIMITS) | of_families


CHOICES = {
    "optimizer": {"adamw", "adamw8bit", "adafactor", "prodigy"},
    "lr_schedule": {"constant", "linear", "cosine"},
    "weighting": {*WEIGHTINGS, "output"},
    "parameterisation": {"vp", "edm", "flow"},
    "device": {"auto", "cpu", "cuda", "mps"},
    "precision": {"auto", "fp32", "bf16", "fp16"},
    "tracker": {"tensorboard", "wandb", "mlflow", "none"},
    "prediction": {"v", "x", "eps", "both"},
    "schedule": {"cosine", "ddpm_cosine", "linear", "scaled_linear", "sigmoid", "vp_sde", "edm", "flow"},
    "method": set(METHODS),
    "then": set(METHODS) - {"guided", "match"},
    "recipe": {"vdiff", "paper"},
    "flow": {"teacher", "data"},
    "gap_weight": {"angle", "sigma", "none"},
    "loss": {"l2", "l1", "huber"},
    "times": {"uniform", "importance"},
    "path_sampler": {"auto", "ddim", "dpmpp_2m", "dpmpp_3m", "unipc", "ipndm", "heun"},
}


@pytest.mark.parametrize(("kind", "field"), [pair for pair in FIELDS if pair[1].name in CHOICES])
def test_choices(kind, field):
    for value in CHOICES[field.name]:
        assert values_of(resolve(kind, {"my.toml": {**ENOUGH, field.name: value}}))[field.name] == value
    message = refusal(kind, "my.toml", **{field.name: "qqq"})
    assert message.startswith(f"my.toml: {field.name} = 'qqq' is unknown; choose from ")
    assert set(message.partition("choose from ")[2].split(", ")) == CHOICES[field.name]


def test_a_parameterisation_brings_its_settings_over_those_of_a_preset():
    preset = {"num_iters": 1, "batch_size": 1, "lr": 1e-3, "prediction": "both", "weighting": "snr", "dropout": 0.5}
    edm = PARAMETERISATIONS["edm"].training
    found = resolve(TrainConfig, {"preset": preset, "flags": {"parameterisation": "edm"}})
    assert found.prediction == "v"
    assert found.dropout == 0.5
    assert {key: getattr(found, key) for key in edm} == edm
    given = resolve(TrainConfig, {"preset": preset, "flags": {"parameterisation": "edm", "weighting": "constant"}})
    assert given.weighting == "constant"


def test_options_of_captions_are_those_of_the_batches():
    values = {"caption_dropout": 0.25, "caption_shuffle": True, "caption_keep_tokens": 3, "caption_prefix": "emoji"}
    config = resolve(TrainConfig, {"preset": {"num_iters": 1, "batch_size": 1, "lr": 1e-3}, "flags": values})
    assert config.captions == CaptionSettings(dropout=0.25, shuffle=True, keep_tokens=3, prefix="emoji")


def test_every_word_has_choices_or_is_a_path():
    words = {field.name for _, field in FIELDS if str(field.type) == "str"}
    assert words - set(CHOICES) == {
        "data", "preset", "base", "ema_more", "phases", "guidance_range", "student_config", "lora_targets", "proposal",
        "caption_prefix", "prompts", "lora",
        "vae", "sample_prompts",
    }  # fmt: skip
    assert "did you mean 'truncated_snr'?" in refusal(TrainConfig, "my.toml", weighting="truncated")


@every_kind
@pytest.mark.parametrize("missing", ENOUGH)
def test_what_no_layer_says(kind, missing):
    with pytest.raises(OptionError) as caught:
        resolve(kind, {"my.toml": {key: value for key, value in ENOUGH.items() if key != missing}})
    assert str(caught.value) == f"missing setting: {missing}; give --{missing}, or a --preset"
    with pytest.raises(
        OptionError, match="missing setting: num_iters, batch_size, lr; give --num_iters, or a --preset"
    ):
        resolve(kind, {})


# ε


def test_an_eps_prediction_is_weighted_by_the_snr_unless_told_otherwise():
    assert resolve(TrainConfig, {"a": {**ENOUGH, "prediction": "eps"}}).weighting == "snr"
    for prediction in ("v", "x", "both"):
        assert resolve(TrainConfig, {"a": {**ENOUGH, "prediction": prediction}}).weighting == "truncated_snr"
    for weighting in set(WEIGHTINGS) - {"truncated_snr"}:
        found = resolve(TrainConfig, {"a": {**ENOUGH, "prediction": "eps"}, "b": {"weighting": weighting}})
        assert found.weighting == weighting


def test_truncated_snr_cannot_weight_an_eps_prediction():
    message = refusal(TrainConfig, "my.toml", prediction="eps", weighting="truncated_snr")
    assert "truncated_snr cannot weight an eps-prediction" in message
    assert "give --weighting snr, or --prediction v" in message


def test_a_gamma_needs_the_weighting_that_has_one():
    assert resolve(TrainConfig, {"a": {**ENOUGH, "weighting": "min_snr", "snr_gamma": 2.0}}).snr_gamma == 2
    message = refusal(TrainConfig, "my.toml", snr_gamma=2.0)
    assert "--snr_gamma: the weighting truncated_snr has no γ; give --weighting min_snr too" in message


# Zero terminal SNR


def test_zero_snr_has_a_constant_weight_in_v_unless_told_otherwise(data):
    table = {**ENOUGH, "schedule": "scaled_linear", "zero_snr": True}
    assert resolve(TrainConfig, {"a": table}).weighting == "snr_plus_one"
    for flags, line in (
        ({}, "zero terminal SNR; the weight snr_plus_one is constant in v"),
        ({"weighting": "min_snr"}, "zero terminal SNR; the weight min_snr is at least 0.1 at the last level"),
    ):
        watcher = Watcher()
        flags = {**table, "data": str(data), "preset": "toy", **flags}
        config, images = resolve_training(flags, None, folder=Path("unused"), resume=False, reporter=watcher)
        assert line in watcher.lines
        assert describe(config, images).schedule["zero_snr"] is True


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "linear", "prediction": "eps"}, "an eps-prediction carries no information about the image; give"),
        ({}, "the cosine schedule has no betas; give --schedule ddpm_cosine or linear or scaled_linear or sigmoid"),
        ({"schedule": "linear", "num_timesteps": 1}, "needs at least two levels"),
    ],
)
def test_zero_snr_is_refused_where_it_means_nothing(values, message):
    assert message in refusal(TrainConfig, COMMAND_LINE, zero_snr=True, **values)


# Presets


def halving(num_steps: int) -> Stage:
    """The stage whose student takes this many steps."""
    return Stage(Path("a"), 2 * num_steps, Path("b"), num_steps)


# design.md, "Numbers kept from the paper"
PAPER = {
    "cifar10": {
        "unet": (256, 1024, [1, 1, 1], 3), "attention_sizes": {8, 16}, "heads": {256: 1}, "dropout": 0.2,
        "prediction": "x", "conditional": False, "batch_size": 128, "lr": (2e-4, 5e-5), "weight_decay": 1e-3,
        "num_timesteps": 8192,
    },
    "imagenet64": {
        "unet": (192, 768, [1, 2, 3, 4], 3), "attention_sizes": {8, 16, 32}, "heads": {192: 3, 768: 12},
        "dropout": 0.1, "prediction": "both", "conditional": True, "batch_size": 2048, "lr": (3e-4, 1e-4),
        "weight_decay": 0, "num_timesteps": 1024,
    },
    "lsun128": {
        "unet": (64, 768, [1, 2, 4, 6, 8], 3), "attention_sizes": {8, 16, 32}, "heads": {256: 4, 512: 8},
        "dropout": 0.1, "prediction": "both", "conditional": False, "batch_size": 2048, "lr": (3e-4, 1e-4),
        "weight_decay": 0, "num_timesteps": 1024,
    },
    "celebahq256": {
        "unet": (112, 448, [1, 2, 2, 4, 4], 2), "attention_sizes": {32, 16}, "heads": {112: 4, 448: 4},
        "dropout": 0.0, "prediction": "v", "conditional": False, "batch_size": 32, "lr": (5e-5, 5e-5),
        "weight_decay": 0, "num_timesteps": 1024,
    },
}  # fmt: skip


def resolved(name: str, folder: Path):
    """A preset as `train.py --preset NAME --dry_run` and `distill.py` resolve it."""
    config, images = resolve_training({"preset": name}, None, folder=folder, resume=False, assume=True)
    return config, resolve(DistillConfig, {f"preset {name}": read_preset(name).distill}), images


@every_preset
def test_every_preset_resolves_and_describes_a_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, distill, images = resolved(name, tmp_path)
    description = describe(train, images)
    assert train.preset == name
    assert description.shape == images.shape
    with torch.device("meta"):
        assert description.build().network.config.dropout == train.dropout
    for config in (train, distill):
        assert (config.clip_norm, config.weighting) == (1.0, "truncated_snr")
        assert config.flip is (name not in ("toy", "digits", *OF_SOUNDS))
    assert train.schedule == "cosine"
    assert description.schedule == {"name": "cosine", "logsnr_max": 20.0, "label_scale": 1024}
    assert (distill.dropout, distill.weight_decay, distill.ema, distill.lr_schedule) == (0, 0, 0, "linear")


@pytest.mark.parametrize("name", PAPER)
def test_presets_have_the_numbers_of_the_papers(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paper = PAPER[name]
    train, distill, images = resolved(name, tmp_path)
    unet = UNetConfig.from_dict(describe(train, images).unet)
    assert (unet.channels, unet.embedding_channels, list(unet.multipliers), unet.num_blocks) == paper["unet"]
    assert {images.image_size // stride for stride in unet.attention_strides} == paper["attention_sizes"]
    assert {width: unet.heads(width) for width in paper["heads"]} == paper["heads"]
    assert (unet.resample, unet.time_affine) == ("block", True)
    assert (unet.dropout, train.dropout) == (paper["dropout"], paper["dropout"])
    assert train.prediction == paper["prediction"]
    assert (train.class_conditional, unet.num_classes > 0) == (paper["conditional"], paper["conditional"])
    assert (train.batch_size, distill.batch_size) == (paper["batch_size"], paper["batch_size"])
    assert (train.lr, distill.lr) == paper["lr"]
    assert (train.weight_decay, distill.weight_decay) == (paper["weight_decay"], 0)
    assert train.num_timesteps == paper["num_timesteps"]
    assert (train.warmup_iters, train.ema, train.lr_schedule) == (1000, 0.9999, "constant")
    assert [halving(steps).updates(distill) for steps in (512, 8, 4, 2, 1)] == [
        50_000,
        50_000,
        50_000,
        100_000,
        100_000,
    ]
    assert images.image_size == {"cifar10": 32, "imagenet64": 64, "lsun128": 128, "celebahq256": 256}[name]
    assert images.channels == 3


def test_the_last_stages_get_at_least_one_update():
    config = distill_config(Path(), Path(), num_iters=3, last_factor=0.1)
    assert [halving(steps).updates(config) for steps in (8, 4, 2, 1)] == [3, 3, 1, 1]


@pytest.mark.parametrize(
    ("sizes", "name"),
    [((1, 8, 16), "digits"), ((17, 28, 32), "32"), ((33, 64), "64"), ((65, 128), "128"), ((129, 256, 1024), "256")],
)
@pytest.mark.parametrize(
    ("num_images", "networks"),
    [
        (1, ("small", "small", "small")),
        (999, ("small", "small", "small")),
        (0, ("small", "base", "base")),
        (1_000, ("small", "base", "base")),
        (99_999, ("small", "base", "base")),
        (10**7, ("small", "base", "large")),
    ],
)
def test_the_preset_fits_image_size_number_of_images_and_device(sizes, name, num_images, networks):
    for device, network in zip(("cpu", "mps", "cuda"), networks, strict=True):
        fitting = name if name == "digits" else network + name
        assert {preset_for((3, size, size), num_images, device) for size in sizes} == {fitting}


@pytest.mark.parametrize("name", FITTED)
def test_fitted_presets_are_networks_of_2_9_and_35_million_parameters(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train, distill, images = resolved(name, tmp_path)
    unet = UNetConfig.from_dict(describe(train, images).unet)
    parameters, flops = count_flops(lambda: UNet(unet), (3, images.image_size, images.image_size))
    millions, gflops = {"small": (2, 2.4), "base": (9, 9), "large": (35, 34)}[FITTED[name][0]]
    assert parameters / 1e6 == pytest.approx(millions, rel=0.15)
    assert flops / 1e9 < gflops
    grid = images.image_size // unet.fold
    assert {grid // (stride // unet.fold) for stride in unet.attention_strides} == {8, 16}
    assert unet.heads(2 * unet.channels) == 2 * unet.channels // 32
    assert (train.batch_size, train.num_iters, train.dropout) == (32, 30_000, 0.1)
    assert (distill.batch_size, distill.num_iters) == (train.batch_size, train.num_iters // 20)


@pytest.mark.parametrize(
    ("network", "many"), [("small", (32, 30_000)), ("base", (64, 100_000)), ("large", (128, 300_000))]
)
def test_batch_updates_and_dropout_follow_the_number_of_images(network, many):
    """And a small network does not get the updates of a large one, which would take weeks on a laptop."""
    rows = {}
    for count in (1, 999, 1_000, 99_999, 100_000, 10**7):
        train, distill = (resolve(kind, {"": values}) for kind, values in pairs(read_preset(f"{network}64", count)))
        rows[count] = (train.batch_size, train.num_iters, train.dropout, distill.batch_size, distill.num_iters)
        assert train.ema**train.num_iters < 1e-3
    assert rows[1] == rows[999] == (16, 10_000, 0.2, 16, 500)
    assert rows[1_000] == rows[99_999] == (32, 30_000, 0.1, 32, 1_500)
    assert rows[100_000] == rows[10**7] == (*many, 0.0, many[0], many[1] // 20)
    assert read_preset("digits", 5) == read_preset("digits", 10**7)


def pairs(settings: Settings) -> list[tuple[type[TrainConfig | DistillConfig], Mapping[str, Any]]]:
    """Kind and settings of both commands."""
    return [(TrainConfig, settings.train), (DistillConfig, settings.distill)]


def test_an_unknown_preset():
    with pytest.raises(OptionError, match="unknown preset 'cifar'; did you mean 'cifar10'"):
        read_preset("cifar")


# Files


@pytest.mark.parametrize(
    "config",
    [
        train_config(Path('data/it\'s "ça" \\ 4')),
        train_config(Path("d"), compile=True, class_conditional=None, image_size=None, lr=1e-05, weight_decay=0.0),
        train_config(Path("d"), prediction="eps", weighting="snr", unet={"multipliers": [1, 2], "time_affine": False}),
        distill_config(Path("d"), Path("checkpoints/base_5")),
        distill_config(Path("d"), Path("b"), to_steps=4, teacher_steps=64, last_factor=0.5, ema=1.0, flip=False),
    ],
)
def test_a_run_s_record_is_its_settings(tmp_path, config):
    write_run(tmp_path, config)
    found = read_run(tmp_path)
    layer, other = (found.train, found.distill) if isinstance(config, TrainConfig) else (found.distill, found.train)
    assert resolve(type(config), {RUN_FILE: layer}) == config
    assert other == {}


@every_preset
def test_every_preset_s_record_is_its_settings(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for config in resolved(name, tmp_path)[:2]:
        write_run(tmp_path, config)
        found = read_run(tmp_path)
        assert resolve(type(config), {RUN_FILE: found.train or found.distill}) == config


def test_a_record_runs_again_as_a_configuration_file(data, tmp_path):
    first, _ = resolve_training({"data": str(data), "preset": "toy", "lr": 0.5}, None, folder=tmp_path, resume=False)
    write_run(tmp_path, first)
    again, _ = resolve_training({}, tmp_path / RUN_FILE, folder=tmp_path / "other", resume=False)
    assert again == first
    resumed, _ = resolve_training({}, None, folder=tmp_path, resume=True)
    assert resumed == first


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(OptionError, match=r"cannot be read: No such file or directory; give --config a TOML file"):
        read_settings(tmp_path / "no.toml")
    (tmp_path / "bad.toml").write_text("lr = = 3")
    with pytest.raises(OptionError, match=r"bad\.toml is not TOML: "):
        read_settings(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b"data = '\xe9'")
    with pytest.raises(OptionError, match=r"latin\.toml cannot be read: .*utf-8"):
        read_settings(tmp_path / "latin.toml")
    with pytest.raises(VdiffError, match="holds no run to resume"):
        read_run(tmp_path)


# Settings and images of a base run


def test_flags_win_over_the_file_and_the_file_over_the_preset(data, tmp_path):
    file = tmp_path / "my.toml"
    file.write_text('lr = 0.25\nseed = 7\nweighting = "snr"\n[unet]\nchannels = 8\n[distill]\nlr = 3.0\n')
    flags = {"data": str(data), "preset": "toy", "seed": 9}
    config, images = resolve_training(flags, file, folder=tmp_path / "out", resume=False)
    assert (config.seed, config.lr, config.weighting) == (9, 0.25, "snr")
    assert (config.batch_size, config.warmup_iters) == (32, 50)
    assert config.unet == {**read_preset("toy").train["unet"], "channels": 8}
    assert (config.data, config.image_size, config.class_conditional) == (str(data), SIZE, False)
    assert (images.image_size, images.channels, images.class_names, len(images.fingerprint)) == (SIZE, 1, [], 64)


def test_the_preset_follows_from_the_images(data, tmp_path):
    assert resolve_training({"data": str(data)}, None, folder=tmp_path, resume=False)[0].preset == "digits"


def test_classes_are_told_where_the_data_have_them(data, classes, tmp_path):
    def conditional(flags):
        config, images = resolve_training({"preset": "imagenet64", **flags}, None, folder=tmp_path, resume=False)
        return config.class_conditional, len(images.class_names)

    assert conditional({"data": str(classes)}) == (True, 2)
    assert conditional({"data": str(classes), "class_conditional": False}) == (False, 2)
    assert conditional({"data": str(data)}) == (False, 0)
    with pytest.raises(OptionError, match="toy_4 has no classes; give --class_conditional False"):
        conditional({"data": str(data), "class_conditional": True})


def test_a_preset_that_leaves_classes_unused_says_so(data, classes, tmp_path):
    def told(flags, place=classes, file=None):
        watcher = Watcher()
        config, _ = resolve_training(
            {"data": str(place), **flags}, file, folder=tmp_path, resume=False, reporter=watcher
        )
        return config.class_conditional, watcher.lines

    line = "preset {} ignores the 2 classes; --class_conditional True uses them"
    why = ", chosen for 10 images of this size on cpu"
    cpu = {"device": "cpu"}
    first = f"preset digits, {classes}: 4×4×3{why}"
    assert told(cpu) == (False, [first, line.format("digits")])
    for name in ("cifar10", "lsun128", "celebahq256"):
        assert told({"preset": name}) == (False, [f"preset {name}, {classes}: 4×4×3", line.format(name)])
    for name in ("toy", "imagenet64", "small32", "large256"):
        assert told({"preset": name}) == (True, [f"preset {name}, {classes}: 4×4×3"])
    assert told(cpu, data) == (False, [f"preset digits, {data}: 4×4×1{why}"])
    assert told({**cpu, "class_conditional": True}) == (True, [first])
    assert told({**cpu, "class_conditional": False}) == (False, [first])
    (tmp_path / "my.toml").write_text("class_conditional = false")
    assert told(cpu, file=tmp_path / "my.toml") == (False, [first])


def test_one_of_several_sizes_must_be_chosen(tmp_path):
    folder = tmp_path / "two"
    folder.mkdir()
    writer = StoreWriter(folder, DatasetMeta("two", (4, 8), 1))
    encoded = {}
    for size in (4, 8):
        buffer = io.BytesIO()
        PIL.Image.new("L", (size, size)).save(buffer, format="PNG")
        encoded[size] = buffer.getvalue()
    writer.add(encoded, None)
    writer.finish({"images": 1})
    flags = {"data": str(folder), "preset": "toy"}
    with pytest.raises(OptionError, match="has the sizes 4, 8; choose one with --image_size"):
        resolve_training(flags, None, folder=tmp_path, resume=False)
    config, images = resolve_training({**flags, "image_size": 8}, None, folder=tmp_path, resume=False)
    assert (config.image_size, images.image_size) == (8, 8)
    with pytest.raises(VdiffError, match="no images of size 16"):
        resolve_training({**flags, "image_size": 16}, None, folder=tmp_path, resume=False)


def test_the_only_data_set_is_taken(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(VdiffError, match="no dataset under data/"):
        resolve_training({}, None, folder=tmp_path, resume=False)
    write_dataset(tmp_path / "data" / "only_4")
    assert resolve_training({}, None, folder=tmp_path, resume=False)[0].data == "data/only_4"


# What a run describes


def described(data: Path, **changes):
    config, images = resolve_training({"data": str(data), "preset": "toy", **changes}, None, folder=data, resume=False)
    return describe(config, images)


def test_a_description_follows_settings_and_images(data, classes):
    found = described(data, num_timesteps=16, dropout=0.3)
    assert (found.num_timesteps, found.image_size, found.method, found.weights) == (16, SIZE, "base", "ema")
    assert (found.dataset, found.num_iters, found.target_iters, found.teacher) == (str(data), 0, 400, None)
    unet = found.unet
    assert (unet["in_channels"], unet["out_channels"], unet["num_classes"], unet["dropout"]) == (1, 1, 0, 0.3)
    found = described(classes, prediction="both", class_conditional=True, ema=0.0)
    assert (found.weights, found.class_names) == ("raw", ["cat", "dog"])
    assert (found.unet["in_channels"], found.unet["out_channels"], found.unet["num_classes"]) == (3, 6, 2)


@pytest.mark.parametrize("name", ["ddpm_cosine", "linear"])
def test_a_table_has_as_many_levels_as_there_are_steps(data, name):
    found = described(data, schedule=name, num_timesteps=48)
    schedule = found.build().schedule
    assert (schedule.name, schedule.num_levels, schedule.label_scale) == (name, 48, 48)
    assert described(data, num_timesteps=48).schedule["label_scale"] == 1024


@pytest.mark.parametrize(
    ("unet", "words"),
    [
        ({"dropout": 0.1}, "[unet] dropout follows from data and other settings"),
        ({"num_classes": 3}, "[unet] num_classes follows"),
        ({"chanels": 8}, "[unet] unknown UNet option chanels"),
        ({"channels": 0}, "[unet] channels must be at least 1"),
        (
            {"multipliers": [1, 1, 1, 1]},
            "images of 4 pixels do not fit a network of 4 levels: it needs a multiple",
        ),
    ],
)
def test_a_network_that_cannot_be(data, unet, words):
    with pytest.raises(OptionError) as caught:
        described(data, unet=unet)
    assert words in str(caught.value)


# Costs


def layers(config: UNetConfig, size: int):
    """(parameters, FLOPs) of every layer of the UNet, counted by hand; a multiply-add is two operations."""
    embedding, c, squares = config.embedding_channels, config.channels, config.fold**2
    size //= config.fold

    def conv(a, b, pixels, kernel=9):
        return a * b * kernel + b, 2 * a * b * kernel * pixels

    def linear(a, b, tokens=1):
        return a * b + b, 2 * a * b * tokens

    def norm(a):
        return 2 * a, 0

    def block(a, b, pixels, up=False):
        yield from (norm(a), norm(b), linear(embedding, b * (2 if config.time_affine else 1)))
        # the convolution behind an upsampling takes 16 of 36 multiplications
        yield (a * b * 9 + b, 2 * a * b * 4 * pixels) if up else conv(a, b, pixels)
        yield conv(b, b, pixels)
        if a != b:
            yield conv(a, b, pixels, 1)

    def attention(a, tokens):
        yield from (norm(a), linear(a, 3 * a, tokens), (0, 2 * 2 * tokens**2 * a), linear(a, a, tokens))

    def resample(a, pixels, up):
        if config.resample == "block":
            yield from block(a, a, pixels, up)
        else:
            yield (a * a * 9 + a, 2 * a * a * 4 * pixels) if up else conv(a, a, pixels)

    yield from (linear(c, embedding), linear(embedding, embedding))
    if config.num_classes:
        yield config.num_classes * embedding, 0
    yield conv(config.in_channels * squares, c, size**2)
    skips = [c]
    levels = [(k, config.channels * m) for k, m in enumerate(config.multipliers)]
    for k, width in levels:
        pixels = (size >> k) ** 2
        for _ in range(config.num_blocks):
            yield from block(c, width, pixels)
            yield from attention(width, pixels) if config.fold * 2**k in config.attention_strides else ()
            c = width
            skips.append(c)
        if k + 1 < len(levels):
            yield from resample(c, pixels // 4, up=False)
            skips.append(c)
    yield from (*block(c, c, pixels), *attention(c, pixels), *block(c, c, pixels))
    for k, width in reversed(levels):
        pixels = (size >> k) ** 2
        for _ in range(config.num_blocks + 1):
            yield from block(c + skips.pop(), width, pixels)
            yield from attention(width, pixels) if config.fold * 2**k in config.attention_strides else ()
            c = width
        if k:
            yield from resample(c, 4 * pixels, up=True)
    yield from (norm(c), conv(c, config.out_channels * squares, size**2))


NETWORKS = {
    "one_level": (UNetConfig(1, 1, 4, 8, (1,), num_blocks=1, attention_strides=()), 4),
    "attention": (UNetConfig(3, 6, 8, 8, (1, 2), num_blocks=2, attention_strides=(1, 2), num_heads=2), 8),
    "conv": (UNetConfig(3, 3, 8, 12, (1, 2, 3), num_blocks=1, attention_strides=(4,), resample="conv"), 16),
    "added_time": (UNetConfig(1, 1, 8, 8, (1, 2), num_blocks=1, time_affine=False, attention_strides=()), 8),
    "classes": (UNetConfig(3, 3, 8, 8, (1,), num_blocks=1, num_classes=10, attention_strides=(1,)), 8),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_costs_are_those_counted_by_hand(name):
    config, size = NETWORKS[name]
    parameters, flops = zip(*layers(config, size), strict=True)
    assert count_flops(lambda: UNet(config), (config.in_channels, size, size)) == (sum(parameters), sum(flops))


@pytest.mark.parametrize(
    "name", [name for name in PRESETS if name not in OF_SOUNDS]
)  # `layers` counts kernels of 3 × 3
def test_costs_of_the_presets(name, tmp_path, monkeypatch):
    """The paper's CIFAR-10 network has about 60 million parameters."""
    monkeypatch.chdir(tmp_path)
    config, _, images = resolved(name, tmp_path)
    unet = UNetConfig.from_dict(describe(config, images).unet)
    parameters, flops = zip(*layers(unet, images.image_size), strict=True)
    assert count_flops(lambda: UNet(unet), describe(config, images).shape) == (
        sum(parameters),
        sum(flops),
    )
    if name == "cifar10":
        assert 55e6 < sum(parameters) < 65e6
