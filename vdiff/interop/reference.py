"""Checkpoints of the v-diffusion repositories: `checkpoint.pt` = {"G": weights, "n_timesteps", "time_scale"}.

Their network is rosinality's UNet, which equals vdiff's except for names and these differences, which the import
compensates exactly in the weights:

- attention scores are divided by √channels, in vdiff by √(channels per head): q is scaled by 1/√heads;
- q, k and v are interleaved by head, in vdiff concatenated: rows are permuted;
- the time embedding is (sin, cos), in vdiff (cos, sin): columns are permuted;
- the label is index × time_scale, in vdiff L·t − 1, which is larger by time_scale − 1: this shift rotates each pair
  (cos ω l, sin ω l) by a fixed angle, and the next layer absorbs the rotation;
- images have OpenCV's channel order, blue first: the channels of the first and the last convolution are reversed.

The schedule is the `ddpm_cosine` table of `n_timesteps` levels, L = n_timesteps · time_scale; the network predicts v.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.diffusion.schedules import MAX_LEVELS, DdpmCosineSchedule
from vdiff.errors import OptionError, VdiffError
from vdiff.files import sha256_of
from vdiff.interop.foreign import IMPORTED_MODEL, NO_DROPOUT, imported_fields, write_model
from vdiff.interop.pickles import check_backed, read_pt
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.unet import Attention, UNet, UNetStage
from vdiff.models.unet_config import UNetConfig
from vdiff.replacing import check_free

KEYS = ("G", "n_timesteps", "time_scale")
BGR, RGB = "bgr", "rgb"
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")
FREQUENCIES = "time.0.inv_freq"


def import_reference(
    path: Path,
    out: Path,
    *,
    image_size: int = 256,
    attention_heads: int = 4,
    image_channels: int | None = None,
    channel_order: str = BGR,
    overwrite: bool = False,
) -> CheckpointConfig:
    """Convert `path` to the checkpoint folder `out`; returns its description.

    Args:
        image_size, attention_heads: not recorded in the file; the defaults are those repositories' for CelebA-HQ.
        image_channels: None: 3 if that fits the output, else 1.
        channel_order: of the training images: "bgr", as those repositories read images, or "rgb".

    Raises:
        VdiffError: the file is not of this kind, the flags do not fit it, or `out` exists.
    """
    check_free(out, IMPORTED_MODEL, overwrite=overwrite)
    tensors, num_levels, time_scale = _read(path)
    unet = unet_config(path, tensors, attention_heads=attention_heads, image_channels=image_channels)
    if image_size % unet.size_multiple:
        raise OptionError(
            f"--image_size {image_size}: the network of {path} needs multiples of {unet.size_multiple}",
            "give the size of its training images",
        )
    description = CheckpointConfig(
        unet=unet.to_dict(),
        schedule=DdpmCosineSchedule(num_levels=num_levels, labels_per_level=time_scale).to_dict(),
        prediction="v",
        num_timesteps=num_levels,
        image_size=image_size,
        **imported_fields(
            f"reference/{path.name} sha256:{sha256_of(path)}",
            method="base" if time_scale == 1 else "progressive",
            weights="ema",
            approximated=[NO_DROPOUT],
        ),
    )
    weights = translate(path, tensors, unet, time_scale)
    if channel_order == BGR and unet.in_channels == 3:
        weights |= _reversed_channels(weights, unet)
    write_model(out, weights, description, overwrite=overwrite)
    return description


def unet_config(
    path: Path, tensors: Mapping[str, Tensor], *, attention_heads: int, image_channels: int | None
) -> UNetConfig:
    """The network's configuration, from the tensors' names and shapes; `path` is for messages.

    Raises:
        VdiffError: they do not describe such a network.
    """
    first, last = _shape(path, tensors, "down.0.weight", 4), _shape(path, tensors, "out.2.weight", 4)
    channels = first[0]
    image_channels = image_channels or (3 if last[0] % 3 == 0 and _root(last[0] // 3) else 1)
    fold = _root(last[0] // image_channels) if last[0] % image_channels == 0 else 0
    if not fold:
        raise OptionError(
            f"--image_channels: the network of {path} has {last[0]} outputs, not {image_channels} times a square",
            "give the number of channels of its images",
        )
    if first[1] != last[0]:
        raise VdiffError(
            f"{path} takes {first[1]} channels and returns {last[0]}: it needs more than the noisy image",
            "only networks with images as their only input can be imported",
        )
    levels: list[list[tuple[int, bool]]] = [[]]
    for i in range(1, len(tensors)):
        if f"down.{i}.resblocks.conv1.weight" in tensors:
            width = _shape(path, tensors, f"down.{i}.resblocks.conv1.weight", 4)[0]
            levels[-1].append((width, f"down.{i}.attention.qkv.weight" in tensors))
        elif f"down.{i}.0.weight" in tensors:
            levels.append([])
        else:
            break
    alike = all(len(level) == len(levels[0]) > 0 and len(set(level)) == 1 for level in levels)
    if not alike or any(level[0][0] % channels for level in levels):
        raise VdiffError(
            f"{path} is not a UNet of these repositories: blocks of {[[w for w, _ in level] for level in levels]} "
            f"channels from {channels}",
            "only networks of unet_ddpm.py can be imported",
        )
    width = levels[0][0][0]
    try:
        return UNetConfig(
            in_channels=image_channels,
            out_channels=image_channels,
            channels=channels,
            embedding_channels=4 * channels,
            multipliers=tuple(level[0][0] // channels for level in levels),
            num_blocks=len(levels[0]),
            attention_strides=tuple(fold * 2**i for i, level in enumerate(levels) if level[0][1]),
            num_heads=attention_heads,
            resample="conv",
            time_affine=_shape(path, tensors, "down.1.resblocks.time.1.weight", 2)[0] == 2 * width,
            fold=fold,
            num_groups=max(channels // 4, 1),
        )
    except ValueError as error:
        raise OptionError(
            f"{path} with --attention_heads {attention_heads}: {error}", "give its number of heads"
        ) from None


def translate(path: Path, tensors: Mapping[str, Tensor], config: UNetConfig, time_scale: int) -> dict[str, Tensor]:
    """The weights with the names and the layout of `UNet(config)`, float32.

    Raises:
        VdiffError: a tensor is missing, superfluous, of another shape or not finite.
    """
    with torch.device("meta"):
        network = UNet(config)
    names = _names(network)
    missing = sorted(set(names.values()) - set(tensors))
    extra = sorted(set(tensors) - set(names.values()) - {FREQUENCIES})
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which is unknown"
        raise VdiffError(f"{path} {what}", "only networks of unet_ddpm.py can be imported")
    modules = dict(network.named_modules())
    expected = network.state_dict()
    found: dict[str, Tensor] = {}
    for name, tensor in expected.items():
        if name not in names:  # the normalisation before scale and shift has no weights
            found[name] = torch.full(tensor.shape, float(name.endswith("weight")))
            continue
        theirs = tensors[names[name]]
        if theirs.numel() != tensor.numel() or theirs.shape[: tensor.ndim] != tensor.shape:
            due = " × ".join(map(str, tensor.shape))
            raise VdiffError(
                f"{path}: {names[name]} is {' × '.join(map(str, theirs.shape))}, not {due}",
                "only networks of unet_ddpm.py can be imported",
            )
        weight = theirs.double().reshape(tensor.shape)
        if not weight.isfinite().all():
            raise VdiffError(f"{path}: {names[name]} holds values that are not finite", "take an earlier checkpoint")
        owner = modules[name.rpartition(".qkv.")[0]] if ".qkv." in name else None
        if isinstance(owner, Attention):
            weight = _sorted_qkv(weight, owner.num_heads)
        elif name == "embed.0.weight":
            weight = _rotated(weight, _frequencies(path, tensors, config.channels), 1 - time_scale)
        found[name] = weight.float()
    return found


def _read(path: Path) -> tuple[dict[str, Tensor], int, int]:
    """The generator's tensors, the number of levels, and the label distance of two levels."""
    values = read_pt(path)
    if lacking := [key for key in KEYS if key not in values]:
        held = ", ".join(map(str, list(values)[:6])) or "nothing"
        raise VdiffError(
            f"{path} lacks {', '.join(map(repr, lacking))}: it holds {held}", 'give a file of "G", "n_timesteps", …'
        )
    numbers = []
    for key in KEYS[1:]:
        number = values[key]
        if type(number) is not int or not 1 <= number <= MAX_LEVELS:
            raise VdiffError(f"{path}: {key} must be a whole number from 1 to {MAX_LEVELS}", "give another file")
        numbers.append(number)
    if math.prod(numbers) > MAX_LEVELS:
        raise VdiffError(f"{path}: n_timesteps × time_scale is {math.prod(numbers)}", f"at most {MAX_LEVELS}")
    weights = values["G"]
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) and tensor.is_floating_point()
        for name, tensor in weights.items()
    ):
        raise VdiffError(f"{path}: 'G' is not a dictionary of weights", "give another file")
    tensors = {WRAPPERS.sub("", name): tensor for name, tensor in weights.items()}
    check_backed(path, tensors)
    return tensors, numbers[0], numbers[1]


def _names(network: UNet) -> dict[str, str]:
    """vdiff's name of each tensor → theirs, without tensors that they lack."""
    found = {"embed.0": "time.1", "embed.2": "time.3", "conv_in": "down.0", "norm_out": "out.0", "conv_out": "out.2"}
    for part, modules, offset in (("down", network.down, 1), ("middle", network.middle, 0), ("up", network.up, 0)):
        theirs = "mid" if part == "middle" else part
        for i, module in enumerate(modules):
            at, there = f"{part}.{i}", f"{theirs}.{i + offset}"
            found[f"{at}.conv"] = f"{there}.{1 if part == 'up' else 0}"
            for name in ("norm", "qkv", "out"):
                found[f"{at}.attention.{name}"] = f"{there}.attention.{name}"
            for name in ("norm1", "conv1", "norm2", "conv2", "skip"):
                found[f"{at}.block.{name}"] = f"{there}.resblocks.{name}"
            found[f"{at}.block.time"] = f"{there}.resblocks.time.1"
            if isinstance(module, UNetStage) and module.block.time_affine:
                del found[f"{at}.block.norm2"]
    names = {name: name.rpartition(".")[::2] for name in network.state_dict()}
    return {name: f"{found[module]}.{kind}" for name, (module, kind) in names.items() if module in found}


def _reversed_channels(weights: Mapping[str, Tensor], config: UNetConfig) -> dict[str, Tensor]:
    """The first and the last convolution for images with reversed channels.

    A channel is fold² consecutive rows or columns; an output of several images has one group for each.
    """
    axes = {"conv_in.weight": 1, "conv_out.weight": 0, "conv_out.bias": 0}
    shape = (-1, config.in_channels, config.fold**2)
    return {
        name: weights[name].unflatten(axis, shape).flip(axis + 1).flatten(axis, axis + 2) for name, axis in axes.items()
    }


def _sorted_qkv(weight: Tensor, heads: int) -> Tensor:
    """(heads · 3 · width, …) → (3 · heads · width, …), with q divided by √heads."""
    sorted_rows = weight.unflatten(0, (heads, 3, -1)).transpose(0, 1).clone()
    sorted_rows[0] /= math.sqrt(heads)
    return sorted_rows.flatten(0, 2)


def _rotated(weight: Tensor, frequencies: Tensor, shift: int) -> Tensor:
    """The weights for (cos ω l, sin ω l) that equal `weight` for (sin ω (l + shift), cos ω (l + shift)).

    sin ω(l + d) = sin ωl cos ωd + cos ωl sin ωd, cos ω(l + d) = cos ωl cos ωd − sin ωl sin ωd.
    """
    of_sin, of_cos = weight.chunk(2, dim=1)
    cos, sin = (frequencies * shift).cos(), (frequencies * shift).sin()
    return torch.cat([of_sin * sin + of_cos * cos, of_sin * cos - of_cos * sin], dim=1)


def _frequencies(path: Path, tensors: Mapping[str, Tensor], channels: int) -> Tensor:
    """ω_i, i < channels/2, float64."""
    half = channels // 2
    usual = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10_000.0) / half))
    theirs = tensors.get(FREQUENCIES, usual).double()
    if theirs.shape != usual.shape or channels % 2 or not torch.allclose(theirs, usual, rtol=1e-2, atol=0):
        raise VdiffError(f"{path}: {FREQUENCIES} is another time embedding", "it cannot be imported")
    return theirs


def _shape(path: Path, tensors: Mapping[str, Any], name: str, ndim: int) -> tuple[int, ...]:
    """The shape of a tensor that every such network has."""
    if name not in tensors or tensors[name].ndim != ndim or 0 in tensors[name].shape:
        raise VdiffError(f"{path} is not a UNet of these repositories: it has no {name}", "give another file")
    return tuple(tensors[name].shape)


def _root(number: int) -> int:
    """√number if that is whole, else 0."""
    root = math.isqrt(number)
    return root if root * root == number else 0
