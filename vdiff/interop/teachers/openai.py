"""Networks of OpenAI's improved-diffusion, guided-diffusion (ADM) and consistency_models, as vdiff's UNet.

A file holds the weights alone. The rest is in the flags that the repository's scripts take, and in their defaults.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from vdiff.diffusion.parameterisation import Edm, Parameterisation, Vp
from vdiff.diffusion.schedules import DdpmCosineSchedule, EdmSchedule, LinearSchedule, Schedule
from vdiff.errors import OptionError, VdiffError, explained, suggestion
from vdiff.files import sha256_of
from vdiff.interop.foreign import IMPORTED_MODEL, NO_DROPOUT, NO_VARIANCE, imported_fields, write_model
from vdiff.interop.teachers.weights import Place, read_state_dict, translated, without_variance
from vdiff.models.checkpoint import MAX_IMAGE_SIZE, CheckpointConfig
from vdiff.models.unet_config import UNetConfig
from vdiff.replacing import check_free

IMPROVED, GUIDED, CONSISTENCY = ("improved-diffusion", "guided-diffusion", "consistency_models")
DEFAULTS: dict[str, Any] = {
    "image_size": 64,
    "num_channels": 128,
    "num_res_blocks": 2,
    "num_heads": 4,
    "num_heads_upsample": -1,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "",
    "class_cond": False,
    "use_scale_shift_norm": True,
    "resblock_updown": False,
    "use_new_attention_order": False,
    "learn_sigma": False,
    "diffusion_steps": 1000,
    "noise_schedule": "linear",
    "predict_xstart": False,
    "rescale_timesteps": False,
    "sigma_min": 0.002,
    "sigma_max": 80.0,
}
"""Flags of the scripts that describe the model, with the defaults of guided-diffusion."""
OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    IMPROVED: {"rescale_timesteps": True},
    GUIDED: {},
    CONSISTENCY: {"attention_resolutions": "32,16,8"},
}
WITHOUT_EFFECT = {
    *("dropout", "use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "sigma_small", "timestep_respacing"),
    *("weight_schedule", "use_ddim", "clip_denoised", "num_samples", "batch_size", "model_path", "training_mode"),
    *("sampler", "steps", "s_churn", "generator", "lr", "schedule_sampler"),
}
"""Flags of training and sampling, which have no effect on the model."""
MULTIPLIERS = {256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2"}
"""The default `channel_mult` for an image size."""
NUM_CLASSES, GROUPS = 1000, 32

_ADM = "--attention_resolutions 32,16,8 --learn_sigma True --num_head_channels 64 --resblock_updown True"
_ADM_256 = f"{_ADM} --image_size 256 --num_channels 256 --num_res_blocks 2"
_ADM_128 = f"{_ADM} --image_size 128 --num_channels 256 --num_res_blocks 2 --num_head_channels -1 --num_heads 4"
_ADM_64 = f"{_ADM} --image_size 64 --num_channels 192 --num_res_blocks 3"
_EDM_256 = _ADM_256.replace("--learn_sigma True ", "") + " --use_scale_shift_norm False"
_EDM_64 = _ADM_64.replace("--learn_sigma True ", "")
_IDDPM = "--num_channels 128 --num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine"
_LSUN = (
    "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True"
    " --use_scale_shift_norm False --attention_resolutions 16 --rescale_timesteps False"
)
KNOWN: dict[str, tuple[str, str]] = {
    "64x64_diffusion": (GUIDED, f"{_ADM_64} --class_cond True --noise_schedule cosine --use_new_attention_order True"),
    "128x128_diffusion": (GUIDED, f"{_ADM_128} --class_cond True"),
    "256x256_diffusion": (GUIDED, f"{_ADM_256} --class_cond True"),
    "256x256_diffusion_uncond": (GUIDED, _ADM_256),
    "lsun_bedroom": (GUIDED, _ADM_256),
    "lsun_cat": (GUIDED, _ADM_256),
    "lsun_horse": (GUIDED, _ADM_256),
    "lsun_horse_nodropout": (GUIDED, _ADM_256),
    "imagenet64_uncond_100M_1500K": (IMPROVED, f"--image_size 64 {_IDDPM}"),
    "imagenet64_uncond_vlb_100M_1500K": (IMPROVED, f"--image_size 64 {_IDDPM}"),
    "cifar10_uncond_50M_500K": (IMPROVED, f"--image_size 32 {_IDDPM}"),
    "cifar10_uncond_vlb_50M_500K": (IMPROVED, f"--image_size 32 {_IDDPM}"),
    "imagenet64_cond_270M_250K": (
        IMPROVED,
        f"--image_size 64 {_IDDPM} --num_channels 192 --class_cond True --rescale_timesteps False",
    ),
    "lsun_uncond_100M_1200K_bs128": (IMPROVED, _LSUN),
    "lsun_uncond_100M_2400K_bs64": (IMPROVED, _LSUN),
    "edm_imagenet64_ema": (CONSISTENCY, f"{_EDM_64} --class_cond True"),
    "edm_bedroom256_ema": (CONSISTENCY, _EDM_256),
    "edm_cat256_ema": (CONSISTENCY, _EDM_256),
}
"""The published files: their repository, and the flags that its README gives for them."""
OF_BLOCK = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "skip": "skip_connection",
}
OF_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}


def import_openai(
    path: Path, out: Path, *, flags: str | None = None, repository: str | None = None, overwrite: bool = False
) -> tuple[CheckpointConfig, list[str]]:
    """Convert a network of OpenAI's repositories to the checkpoint folder `out`.

    Args:
        flags: those that the repository's scripts take for this model; None: those of the published file of this name.
        repository: one of `OTHER_DEFAULTS`, whose defaults complete the flags; None: that of the published file of this
            name, or guided-diffusion.

    Returns:
        The description, and a sentence for each thing that was chosen.

    Raises:
        VdiffError: the file is not of this kind, or `out` exists.
        OptionError: the flags describe no network that can be read.
    """
    check_free(out, IMPORTED_MODEL, overwrite=overwrite)
    _refuse_other_networks(path)
    known = KNOWN.get(path.stem)
    if flags is None and known is None:
        raise OptionError(
            f"{path} does not have the name of a published file, so its --flags are unknown",
            'give those of the repository\'s scripts: --flags "--image_size 64 --num_channels 128 …"',
        )
    origin = repository or (known[0] if known else GUIDED)
    values, remarks = _values(flags if flags is not None else (known or ("", ""))[1], origin)
    if flags is None:
        remarks.append(f"{path.name} is a published file of {origin} by its name: its flags are those of the README")
    with explained("--flags", "give the flags of this network", ValueError):
        unet, (family, schedule) = _unet_config(values, origin), _noise(values, origin)
    tensors, approximated = read_state_dict(path), [NO_DROPOUT]
    if values["learn_sigma"] and "out.2.weight" in tensors:
        tensors = without_variance(tensors, "out.2", unet.out_channels)
        approximated.append(NO_VARIANCE)
    weights = _weights(path, unet, tensors, is_sorted=values["use_new_attention_order"] or origin == CONSISTENCY)
    description = CheckpointConfig(
        unet=unet.to_dict(),
        schedule=schedule.to_dict(),
        **family.config_fields(),
        num_timesteps=schedule.num_levels or schedule.label_scale,
        image_size=values["image_size"],
        class_names=[str(k) for k in range(unet.num_classes)],
        **imported_fields(f"{origin}/{path.name} sha256:{sha256_of(path)}", weights="ema", approximated=approximated),
    )
    write_model(out, weights, description, overwrite=overwrite)
    return description, remarks


def _refuse_other_networks(path: Path) -> None:
    """Refuse published files that are no teachers, by their names."""
    if re.match("(cd|ct)_", path.stem):
        raise VdiffError(
            f"{path} is a consistency model, which has already few steps and another preconditioning",
            "import its teacher, edm_….pt, and distil that",
        )
    if "classifier" in path.stem or "upsampl" in path.stem:
        raise VdiffError(f"{path} is not a model of images alone", "give a diffusion model without a second input")
    if path.stem.startswith("512x512"):
        raise VdiffError(
            f"{path} has a first level of half the channels of its time embedding, which vdiff's UNet lacks",
            "take the model of 256 pixels",
        )


def _values(flags: str, repository: str) -> tuple[dict[str, Any], list[str]]:
    """The values of `DEFAULTS` after the flags, and a sentence about flags without effect."""
    try:
        words = shlex.split(flags)
    except ValueError as error:
        raise OptionError(f"--flags: {error}", "close the quotes") from None
    words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
    values, ignored = {**DEFAULTS, **OTHER_DEFAULTS[repository]}, []
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise OptionError("--flags: need pairs of --name and value", "give them as the repository's README does")
    for word, text in zip(words[::2], words[1::2], strict=True):
        name = word.removeprefix("--")
        if name in WITHOUT_EFFECT:
            ignored.append(word)
        elif name not in values:
            raise OptionError(f"--flags: {word} is not a flag of these scripts", suggestion(name, DEFAULTS))
        else:
            values[name] = _parsed(word, text, type(DEFAULTS[name]))
    return values, [f"flags without effect on the model: {', '.join(ignored)}"] if ignored else []


def _parsed(word: str, text: str, kind: type) -> Any:
    """The value of a flag, as the scripts read it."""
    if kind is bool:
        if text.lower() not in ("true", "false", "yes", "no", "1", "0"):
            raise OptionError(f"--flags: {word} is {text!r}", "give True or False")
        return text.lower() in ("true", "yes", "1")
    try:
        return kind(text)
    except ValueError:
        raise OptionError(f"--flags: {word} is {text!r}", "give a number") from None


def _unet_config(values: Mapping[str, Any], repository: str) -> UNetConfig:
    """The network.

    Raises:
        ValueError: vdiff's UNet has no such network.
    """
    size = values["image_size"]
    if not 1 <= size <= MAX_IMAGE_SIZE:
        raise ValueError(f"image_size {size} is not between 1 and {MAX_IMAGE_SIZE}")
    multipliers = tuple(map(int, (values["channel_mult"] or MULTIPLIERS.get(size, "0")).split(",")))
    if multipliers[0] != 1:
        raise ValueError(f"image_size {size} needs a channel_mult that begins with 1")
    if values["num_heads_upsample"] not in (-1, values["num_heads"]):
        raise ValueError("num_heads_upsample must be num_heads")
    if values["num_channels"] % GROUPS:
        raise ValueError(f"num_channels must be a multiple of {GROUPS}")
    resolutions = [int(each) for each in values["attention_resolutions"].split(",") if each]
    if min(resolutions, default=1) < 1:
        raise ValueError("attention_resolutions must be positive")
    strides = {size // each for each in resolutions}
    levels = [2**level for level in range(len(multipliers))]
    return UNetConfig(
        channels=values["num_channels"],
        embedding_channels=4 * values["num_channels"],
        multipliers=multipliers,
        num_blocks=values["num_res_blocks"],
        attention_strides=tuple(stride for stride in levels if stride in strides),
        num_heads=max(values["num_heads"], 1),
        head_channels=max(values["num_head_channels"], 0),
        resample="block" if values["resblock_updown"] else "conv",
        time_affine=values["use_scale_shift_norm"],
        num_classes=NUM_CLASSES * values["class_cond"],
        num_groups=GROUPS,
        time_scale=1000 / values["diffusion_steps"]
        if values["rescale_timesteps"] and repository != CONSISTENCY
        else 1.0,
    )


def _noise(values: Mapping[str, Any], repository: str) -> tuple[Parameterisation, Schedule]:
    """The parameterisation and the schedule.

    Raises:
        ValueError: no such schedule.
    """
    if repository == CONSISTENCY:
        return Edm(0.5, noise_scale=250.0), EdmSchedule(values["sigma_min"], values["sigma_max"])
    steps, family = values["diffusion_steps"], Vp("x" if values["predict_xstart"] else "eps")
    if values["noise_schedule"] == "cosine":
        return family, DdpmCosineSchedule(steps)
    if values["noise_schedule"] == "linear":
        return family, LinearSchedule(steps, 0.1 / steps, 20 / steps)
    raise ValueError(f"noise_schedule {values['noise_schedule']!r} is neither linear nor cosine")


def _weights(path: Path, config: UNetConfig, tensors: Mapping[str, Tensor], *, is_sorted: bool) -> dict[str, Tensor]:
    """The weights of `UNet(config)`.

    Args:
        is_sorted: q, k and v come one after the other, and not head by head.
    """

    def inner(place: Place) -> dict[str, str]:
        if place.part == "middle":
            block, attention = f"middle_block.{2 * place.index}", "middle_block.1"
        elif place.part == "down":
            block, attention = f"input_blocks.{place.index + 1}.0", f"input_blocks.{place.index + 1}.1"
        else:  # a resampling is the last module of the block before it
            before = config.num_blocks + 1
            count = (len(config.multipliers) - 1 - place.level) * before
            number = count + (place.number if place.number is not None else before - 1)
            attends = config.stride(place.level) in config.attention_strides
            module = 1 + attends if place.number is None else 0
            block, attention = f"output_blocks.{number}.{module}", f"output_blocks.{number}.1"
        names = {f"block.{ours}": f"{block}.{theirs}" for ours, theirs in OF_BLOCK.items()}
        names |= {f"attention.{ours}": f"{attention}.{theirs}" for ours, theirs in OF_ATTENTION.items()}
        return {**names, "conv": f"{block}.{'op' if place.part == 'down' else 'conv'}"}

    outer = {"embed.0": "time_embed.0", "embed.2": "time_embed.2", "embed_class": "label_emb"}
    outer |= {"conv_in": "input_blocks.0.0", "norm_out": "out.0", "conv_out": "out.2"}
    return translated(path, config, tensors, outer, inner, None if is_sorted else _sorted_qkv)


def _sorted_qkv(weight: Tensor, heads: int) -> Tensor:
    """(heads · 3 · width, …) → (3 · heads · width, …)."""
    return weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
