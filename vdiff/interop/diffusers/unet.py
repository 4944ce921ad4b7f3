"""Conversion between vdiff's UNet and diffusers' `UNet2DModel`: the same network with other names.

Both are the UNet of Ho et al. 2020. Besides the names, two things differ: vdiff's q, k and v are one matrix, and
diffusers may put the sines of the time embedding before the cosines; swapping columns of the next matrix corrects this.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vdiff.errors import VdiffError
from vdiff.interop.foreign import JsonFile
from vdiff.models.checkpoint import MAX_IMAGE_SIZE
from vdiff.models.unet import Resample, UNet
from vdiff.models.unet_config import UNetConfig

MAX_SIZE, MAX_LEVELS, MAX_BLOCKS, MAX_CLASSES = 2**16, 12, 64, 2**20
"""Limits for a plausible network: channels, levels, blocks per level, classes."""
PLAIN = {"block": ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"), "conv": ("DownBlock2D", "UpBlock2D")}
"""Levels without attention, by `UNetConfig.resample`."""
ATTENDING = ("AttnDownBlock2D", "AttnUpBlock2D")
RESAMPLE_TYPES: dict[Literal["block", "conv"], str] = {"block": "resnet", "conv": "conv"}
ONLY: dict[str, list[Any]] = {
    "center_input_sample": [False],
    "time_embedding_type": ["positional"],
    "mid_block_type": ["UNetMidBlock2D"],
    "mid_block_scale_factor": [1],
    "act_fn": ["silu", "swish"],
    "add_attention": [True],
}
"""Options of diffusers that vdiff supports only at their defaults."""
READ = {
    *("sample_size", "in_channels", "out_channels", "time_embedding_dim", "freq_shift", "flip_sin_to_cos", "dropout"),
    *("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "downsample_padding"),
    *("downsample_type", "upsample_type", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "norm_eps"),
    *("resnet_time_scale_shift", "class_embed_type", "num_class_embeds"),
    "num_train_timesteps",  # has an effect only with time_embedding_type learned, which is refused
}
"""The other options."""
OF_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
OF_ATTENTION = {"norm": "group_norm", "out": "to_out.0"}
OF_NETWORK = {
    "embed.0": "time_embedding.linear_1",
    "embed.2": "time_embedding.linear_2",
    "embed_class": "class_embedding",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
QKV = ("to_q", "to_k", "to_v")
OLD_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""Names of attention weights in files from before 2023."""


# Configurations


def write_unet_config(config: UNetConfig, image_size: int) -> dict[str, Any]:
    """The arguments of the `UNet2DModel` that equals the network of `config`.

    Raises:
        VdiffError: UNet2DModel does not support an option; names it.
    """
    if config.dims == 1:
        raise _cannot_say("sounds, and its UNet1DModel has other layers")
    if config.fold > 1:
        raise _cannot_say(f"fold {config.fold}: it always reads single pixels")
    if config.guidance_input:
        raise _cannot_say("a weight of guidance as an input", "give --guidance W to write the network for one weight")
    if config.image_input:
        raise _cannot_say("a condition image as an input")
    if config.second_time:
        raise _cannot_say("a second time as an input")
    if (config.time_scale, config.time_offset) != (1, 0):
        raise _cannot_say(f"a timestep times {config.time_scale:g} plus {config.time_offset:g}")
    if config.multipliers[0] != 1:
        raise _cannot_say(f"a first multiplier of {config.multipliers[0]}: its first level has the channels of conv_in")
    with torch.device("meta"):
        norms = [module for module in UNet(config).modules() if isinstance(module, nn.GroupNorm)]
    groups = {norm.num_groups: norm.num_channels for norm in norms}
    if len(groups) > 1:
        found = ", ".join(f"{count} at {channels} channels" for count, channels in sorted(groups.items()))
        raise _cannot_say(f"different numbers of groups ({found})", "train with [unet] num_groups = one that fits all")
    widths = [config.channels * multiplier for multiplier in config.multipliers]
    attends = [config.stride(level) in config.attention_strides for level in range(len(widths))]
    attending = {widths[-1], *(width for width, attend in zip(widths, attends, strict=True) if attend)}
    head_channels = {width // config.heads(width) for width in attending}
    single = all(config.heads(width) == 1 for width in attending)
    if len(head_channels) > 1 and not single:
        found = ", ".join(map(str, sorted(head_channels)))
        raise _cannot_say(f"heads of {found} channels", "train with [unet] head_channels instead of num_heads")
    plain_down, plain_up = PLAIN[config.resample]
    down, up = ATTENDING
    return {
        "sample_size": image_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "time_embedding_type": "positional",
        "time_embedding_dim": config.embedding_channels,
        "freq_shift": config.freq_shift,
        "flip_sin_to_cos": True,
        "down_block_types": [down if attend else plain_down for attend in attends],
        "mid_block_type": "UNetMidBlock2D",
        "up_block_types": [up if attend else plain_up for attend in reversed(attends)],
        "block_out_channels": widths,
        "layers_per_block": config.num_blocks,
        "downsample_padding": 1 if config.downsample_pad == "sides" else 0,
        "downsample_type": RESAMPLE_TYPES[config.resample],
        "upsample_type": RESAMPLE_TYPES[config.resample],
        "dropout": config.dropout,
        "act_fn": "silu",
        "attention_head_dim": None if len(head_channels) > 1 else head_channels.pop(),
        "norm_num_groups": min(groups),
        "attn_norm_num_groups": min(groups),
        "norm_eps": config.norm_eps,
        "resnet_time_scale_shift": "scale_shift" if config.time_affine else "default",
        "class_embed_type": None,
        "num_class_embeds": config.num_classes + config.null_class or None,
    }


def read_unet_config(file: JsonFile) -> tuple[UNetConfig, int]:
    """The network that a `UNet2DModel`'s configuration describes, and the size of its images.

    Raises:
        VdiffError: diffusers does not know a value, or vdiff's UNet does not support it; names the file and the key.
    """
    if file.get("_class_name") != "UNet2DModel":
        raise file.refusal("_class_name", "only UNet2DModel can be read")
    for key, allowed in ONLY.items():
        if file.values.get(key, allowed[0]) not in allowed:
            raise file.refusal(key, f"only {allowed[0]} can be read")
    if file.get("class_embed_type") is not None:
        raise file.refusal("class_embed_type", "only null can be read")
    widths = file.items("block_out_channels", int, high=MAX_LEVELS)
    if min(widths) < 1 or max(widths) > MAX_SIZE or any(width % widths[0] for width in widths):
        raise file.refusal("block_out_channels", f"multiples of the first, up to {MAX_SIZE}, can be read")
    attends, resample = _read_levels(file, len(widths))
    image_size = file.get("sample_size")
    if type(image_size) is list and len(set(map(str, image_size))) == 1:
        image_size = image_size[0]
    if type(image_size) is not int or not 1 <= image_size <= MAX_IMAGE_SIZE:
        raise file.refusal("sample_size", "need the side length of square images")
    channels = file.whole("in_channels", 3, low=1, high=MAX_SIZE)
    if channels not in (1, 3):
        raise file.refusal("in_channels", "only images of 1 or 3 channels can be read: latents need an autoencoder")
    groups = file.whole("norm_num_groups", 32, low=1, high=MAX_SIZE)
    affine = file.word("resnet_time_scale_shift", "default", ["default", "scale_shift"]) == "scale_shift"
    if file.get("attn_norm_num_groups", None if affine else groups) != groups:  # null and scale_shift: no normalisation
        raise file.refusal("attn_norm_num_groups", f"only norm_num_groups, {groups}, can be read")
    head_channels = _read_head_channels(file, {widths[-1], *(w for w, a in zip(widths, attends, strict=True) if a)})
    try:
        config = UNetConfig(
            in_channels=channels,
            out_channels=file.whole("out_channels", 3, low=1, high=MAX_SIZE),
            channels=widths[0],
            embedding_channels=file.whole("time_embedding_dim", 4 * widths[0], low=1, high=MAX_SIZE),
            multipliers=tuple(width // widths[0] for width in widths),
            num_blocks=file.whole("layers_per_block", 2, low=1, high=MAX_BLOCKS),
            attention_strides=tuple(2**level for level, attend in enumerate(attends) if attend),
            head_channels=head_channels,
            dropout=file.number("dropout", 0.0, low=-1, high=1),
            resample=resample,
            time_affine=affine,
            num_classes=file.whole("num_class_embeds", 0, low=0, high=MAX_CLASSES),
            num_groups=groups,
            norm_eps=file.number("norm_eps", 1e-5, low=0, high=1),
            freq_shift=file.whole("freq_shift", 0, low=0, high=MAX_SIZE),
            downsample_pad="sides" if file.whole("downsample_padding", 1, low=0, high=1) else "end",
        )
    except (ValueError, TypeError) as error:
        raise VdiffError(f"{file.where} describes no network of vdiff: {error}", "choose another model") from None
    if config.in_channels != config.out_channels:
        raise file.refusal("out_channels", f"only as many as in_channels, {config.in_channels}, can be read")
    if image_size % config.size_multiple:
        raise file.refusal("sample_size", f"{len(widths)} levels need a multiple of {config.size_multiple}")
    return config, image_size


def _read_levels(file: JsonFile, count: int) -> tuple[list[bool], Literal["block", "conv"]]:
    """Which levels have attention, from the first down, and how the size changes between them."""
    attends: list[list[bool]] = []
    types = set()
    for direction, key in enumerate(("down_block_types", "up_block_types")):
        names = [str(name).removeprefix("UNetRes") for name in file.items(key, str, high=MAX_LEVELS)]
        kinds = {ATTENDING[direction]: "attending"} | {PLAIN[kind][direction]: kind for kind in RESAMPLE_TYPES}
        if len(names) != count or set(names) - set(kinds):
            raise file.refusal(key, f"{count} names among {', '.join(kinds)} can be read")
        chosen = file.word(("downsample_type", "upsample_type")[direction], "conv", [*RESAMPLE_TYPES.values()])
        by_option = next(kind for kind, name in RESAMPLE_TYPES.items() if name == chosen)
        resampling = names[:-1] or names  # the last level does not resize, neither down nor up
        types |= {by_option if kinds[name] == "attending" else kinds[name] for name in resampling}
        attends.append([kinds[name] == "attending" for name in names])
    if attends[0] != attends[1][::-1]:
        raise file.refusal("up_block_types", "only the down_block_types in reverse can be read")
    if len(types) > 1:
        raise file.refusal("down_block_types", "only levels that all change their size in the same way can be read")
    resample: Literal["block", "conv"] = "conv" if "conv" in types else "block"
    return attends[0], resample


def _read_head_channels(file: JsonFile, widths: set[int]) -> int:
    """Channels per attention head; 0 (null in the file): one head."""
    value = file.values.get("attention_head_dim", 8)
    if value is None:
        return 0
    if type(value) is not int or value < 1 or any(width % value for width in widths):
        raise file.refusal("attention_head_dim", f"need a number that divides {', '.join(map(str, sorted(widths)))}")
    return value


def _cannot_say(what: str, advice: str = "export another network, or to another format") -> VdiffError:
    return VdiffError(f"diffusers' UNet2DModel does not support {what}", advice)


# Weights


def write_unet_weights(config: UNetConfig, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' weights from vdiff's: `weights` is the state dict of vdiff's UNet."""
    written: dict[str, Tensor] = {}
    for ours, theirs in _names(config):
        parts = weights[ours].chunk(3) if len(theirs) == 3 else (weights[ours],)
        written |= dict(zip(theirs, parts, strict=True))
    return written


def read_unet_weights(config: UNetConfig, weights: Mapping[str, Tensor], *, sines_first: bool) -> dict[str, Tensor]:
    """vdiff's weights from diffusers', in float32: the state dict of vdiff's UNet.

    Args:
        sines_first: `flip_sin_to_cos` is off.
    """
    read = {ours: torch.cat([weights[name].float() for name in theirs]) for ours, theirs in _names(config)}
    if sines_first:
        sines, cosines, rest = read["embed.0.weight"].tensor_split([config.channels // 2, config.channels // 2 * 2], 1)
        read["embed.0.weight"] = torch.cat([cosines, sines, rest], 1)
    return read


def unet_shapes(config: UNetConfig) -> dict[str, tuple[int, ...]]:
    """diffusers' names and shapes of all tensors; nothing is allocated."""
    with torch.device("meta"):
        state = UNet(config).state_dict()
    shapes: dict[str, tuple[int, ...]] = {}
    for ours, theirs in _names(config):
        rows, *rest = state[ours].shape
        shapes |= dict.fromkeys(theirs, (rows // len(theirs), *rest))
    return shapes


def current_name(name: str) -> str:
    """`mid_block.attentions.0.query.weight` → `mid_block.attentions.0.to_q.weight`; other names as they are."""
    path, _, kind = name.rpartition(".")
    module, _, last = path.rpartition(".")
    return f"{module}.{OLD_NAMES[last]}.{kind}" if last in OLD_NAMES and ".attentions." in module else name


def _names(config: UNetConfig) -> Iterator[tuple[str, list[str]]]:
    """vdiff's name of each tensor, and diffusers' names: three for q, k and v, whose rows vdiff concatenates."""
    with torch.device("meta"):
        network = UNet(config)
    places = dict(_places(network))
    for name in network.state_dict():
        path, _, kind = name.rpartition(".")
        ours = next(prefix for prefix in places if f"{path}.".startswith(f"{prefix}."))
        theirs, inside = places[ours]
        part = path[len(ours) + 1 :]
        if part == "qkv":
            yield name, [f"{theirs}.{each}.{kind}" for each in QKV]
        else:
            yield name, [f"{'.'.join(filter(None, [theirs, inside.get(part, part)]))}.{kind}"]


def _places(network: UNet) -> Iterator[tuple[str, tuple[str, dict[str, str]]]]:
    """The parts of the network: vdiff's prefix, diffusers' prefix, and the names inside."""
    for ours, theirs in OF_NETWORK.items():
        yield ours, (theirs, {})
    for stage, (block, attention) in enumerate([("resnets.0", "attentions.0"), ("resnets.1", "")]):
        yield f"middle.{stage}.block", (f"mid_block.{block}", OF_BLOCK)
        yield f"middle.{stage}.attention", (f"mid_block.{attention}", OF_ATTENTION)
    for ours, theirs, sampler in (("down", "down_blocks", "downsamplers"), ("up", "up_blocks", "upsamplers")):
        level = stage = 0
        for i, module in enumerate(getattr(network, ours)):
            if isinstance(module, Resample):
                yield f"{ours}.{i}.block", (f"{theirs}.{level}.{sampler}.0", OF_BLOCK)
                yield f"{ours}.{i}.conv", (f"{theirs}.{level}.{sampler}.0.conv", {})
                level, stage = level + 1, 0
            else:
                yield f"{ours}.{i}.block", (f"{theirs}.{level}.resnets.{stage}", OF_BLOCK)
                yield f"{ours}.{i}.attention", (f"{theirs}.{level}.attentions.{stage}", OF_ATTENTION)
                stage += 1
