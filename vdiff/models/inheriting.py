"""Initial weights of a smaller student: the parts of its teacher's weights that fit.

Weights are matched by meaning, not by position: a level by its resolution, a block by its place in the level, a channel
by its number among the channels of one source. Every width keeps its leading channels, so all branches whose sum is one
feature map keep the same channels.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vdiff.models.backbone import Backbone, parameter_count
from vdiff.models.text import TextBackbone
from vdiff.models.unet import Attention, Resample, ResBlock, UNet, UNetStage
from vdiff.models.unet_config import UNetConfig
from vdiff.models.wrapped import DiffusersBackbone

Parts = tuple[int, ...]
"""The lengths of the pieces of an axis of a tensor; for instance q, k and v are three pieces."""


@dataclass(frozen=True)
class Inherited:
    """How much of a network was copied from another.

    Attributes:
        whole, part, fresh: number of tensors that were copied whole, copied in part, and not copied.
        copied, parameters: copied numbers, and all numbers.
    """

    whole: int
    part: int
    fresh: int
    copied: int
    parameters: int

    def __str__(self) -> str:
        return (
            f"{self.copied / self.parameters:.0%} of {self.parameters:,} parameters from the teacher "
            f"({self.whole} tensors whole, {self.part} in part, {self.fresh} fresh)"
        )


def inherit(student: Backbone, teacher: Backbone) -> Inherited:
    """Copy the fitting parts of the teacher's weights to the student; its other weights do not change.

    Both are `UNet`, or both are UNets of diffusers, with or without text encoders, which are not copied.

    - Fewer channels: the leading ones, separately for h and the skip on the way up, for scale and shift, for q, k and v
      and for each head. With fewer heads, each represents a group of the teacher's.
    - Fewer blocks per level, or layers of a transformer: the first, the last and evenly between. On the way up, `UNet`
      keeps the blocks that take their skips, and a UNet of diffusers the first and the last ones too, whose inputs have
      the same channels (Kim et al. 2023, *BK-SDM*).
    - The embeddings of times and guidance: the nearest frequencies.
    - A block that changes its width, unlike the teacher's, begins with the identity.

    Equal shapes give equal networks. Dropout, new attention, guidance as an input and omitted classes do not change the
    output.

    Raises:
        ValueError: the channels of images, the condition image, the classes or the scale of the timestep differ.
    """
    student, teacher = (each.unet if isinstance(each, TextBackbone) else each for each in (student, teacher))
    if isinstance(student, DiffusersBackbone) and isinstance(teacher, DiffusersBackbone):
        found, own = (_weights_of_diffusers(each.model, student.model) for each in (teacher, student))
    else:
        assert isinstance(student, UNet)
        assert isinstance(teacher, UNet)
        for name in ("in_channels", "image_input", "num_classes", "time_scale", "time_offset"):
            mine, theirs = getattr(student.config, name), getattr(teacher.config, name)
            if mine != theirs:
                raise ValueError(f"the student's {name} is {mine}, the teacher's {theirs}: they must be the same")
        found, own = (_weights(each, student.config) for each in (teacher, student))
    counts = {"whole": 0, "part": 0, "fresh": 0}
    copied = 0
    for name, weight in own.items():
        if not isinstance(weight.tensor, nn.Parameter):
            continue
        source = found.get(name)
        if source is None:
            counts["fresh"] += 1
            continue
        numbers = _copy(weight, source)
        is_whole = isinstance(source.tensor, nn.Parameter) and numbers == source.tensor.numel() == weight.tensor.numel()
        counts["whole" if is_whole else "part"] += 1
        copied += numbers
    return Inherited(**counts, copied=copied, parameters=parameter_count(student))


@dataclass(frozen=True)
class _Weight:
    """A tensor, and the pieces of each axis (without the axes of a convolution's kernel)."""

    tensor: Tensor
    axes: tuple[Parts, ...]


@torch.no_grad()
def _copy(weight: _Weight, source: _Weight) -> int:
    """Copy the leading numbers of each piece of `source` to the same piece of `weight`; returns how many."""
    pairs = [_alike(mine, theirs) for mine, theirs in zip(weight.axes, source.axes, strict=True)]
    copied = 0
    for pieces in itertools.product(*pairs):
        to, of = weight.tensor, source.tensor
        for axis, (start, length, start_of, length_of) in enumerate(pieces):
            kept = min(length, length_of)
            to, of = to.narrow(axis, start, kept), of.narrow(axis, start_of, kept)
        to.copy_(of)
        copied += to.numel()
    return copied


def _alike(mine: Parts, theirs: Parts) -> list[tuple[int, int, int, int]]:
    """The corresponding pieces: start and length of mine, start and length of theirs.

    If the numbers of pieces differ, neighbours are merged until they agree.
    """
    count = math.gcd(len(mine), len(theirs))
    mine, theirs = _joined(mine, count), _joined(theirs, count)
    starts, starts_of = (itertools.accumulate(parts, initial=0) for parts in (mine, theirs))
    return list(zip(starts, mine, starts_of, theirs, strict=False))


def _joined(parts: Parts, count: int) -> Parts:
    size = len(parts) // count
    return tuple(sum(parts[i : i + size]) for i in range(0, len(parts), size))


# The meaning of a network's weights


def _weights(network: UNet, like: UNetConfig) -> dict[str, _Weight]:
    """Name by meaning → weight. Blocks have their numbers in a network of shape `like`; blocks without one are omitted.

    If a block passes its input on, the identity is given as a 1×1 convolution.
    """
    config = network.config
    emb, c = (config.embedding_channels,), config.channels
    found: dict[str, _Weight] = {}

    embeddings = {"time": network.embed, "guidance": network.embed_guidance, "second time": network.embed_second}
    for name, mlp in embeddings.items():
        if mlp is not None:
            first = cast(nn.Linear, mlp[0])
            weight = _at_frequencies(first.weight, config.freq_shift, like.channels, like.freq_shift)
            found[f"{name}.0.weight"] = _Weight(weight, (emb, _pieces(like.channels)))
            found[f"{name}.0.bias"] = _Weight(first.bias, (emb,))
            found |= _linear(f"{name}.2", mlp[2], emb, emb)
    if network.embed_class is not None:
        classes = (network.embed_class.num_embeddings,)  # "no class" is the last
        found["classes"] = _Weight(network.embed_class.weight, (classes, emb))

    at = f"fold {config.fold}"
    found |= _linear(f"in, {at}", network.conv_in, (c,), config.input_parts)
    for place, module, inputs in _places(network, like):
        if isinstance(module, UNetStage):
            found |= _block(place, module.block, config, inputs)
            if isinstance(module.attention, Attention):
                found |= _attention(f"{place}, attention", module.attention)
        elif module.block is not None:
            found |= _block(place, module.block, config, inputs)
        else:
            assert module.conv is not None
            found |= _linear(f"{place}, conv", module.conv, inputs, inputs)
    last = (network.norm_out.num_channels,)
    found |= _norm(f"out, {at}, norm", network.norm_out, last)
    if config.out_channels == like.out_channels:
        found |= _linear(f"out, {at}", network.conv_out, (config.out_channels * config.fold**2,), last)
    return found


def _places(network: UNet, like: UNetConfig) -> Iterator[tuple[str, UNetStage | Resample, Parts]]:
    """Name by meaning, module, and the channels of its inputs (two for h and a skip)."""
    config = network.config
    blocks = config.num_blocks
    number = _numbers(blocks, like.num_blocks)
    down, middle, up = (
        iter(cast(Iterable[UNetStage | Resample], modules)) for modules in (network.down, network.middle, network.up)
    )
    levels = [(config.stride(i), config.channels * m) for i, m in enumerate(config.multipliers)]
    width = config.channels
    skips = [width]
    for stride, channels in levels:
        for k in range(blocks):
            stage = next(down)
            if k in number:
                yield f"down, stride {stride}, block {number[k]}", stage, (width,)
            width = channels
            skips.append(width)
        if stride != levels[-1][0]:
            yield f"down, from stride {stride}", next(down), (width,)
            skips.append(width)
    for k, stage in enumerate(middle):
        yield f"middle, block {k}", stage, (width,)
    for stride, channels in reversed(levels):
        for k in range(blocks + 1):
            stage, skip = next(up), skips.pop()
            taken = blocks - 1 - k  # the block on the way down that provides this one's skip
            if k == blocks:
                yield f"up, stride {stride}, entry", stage, (width, skip)
            elif taken in number:
                yield f"up, stride {stride}, skip {number[taken]}", stage, (width, skip)
            width = channels
        if stride != levels[0][0]:
            yield f"up, from stride {stride}", next(up), (width,)


def _numbers(blocks: int, wanted: int) -> dict[int, int]:
    """Block of a level → its number in a level of `wanted` blocks: the first, the last, and evenly between."""
    count = min(blocks, wanted)
    return dict(zip(_spread(count, blocks), _spread(count, wanted), strict=True))


def _spread(count: int, size: int) -> list[int]:
    """`count` of 0 … size − 1, evenly: (3, 5) → [0, 2, 4]."""
    return [0] if count == 1 else [round(i * (size - 1) / (count - 1)) for i in range(count)]


def _block(name: str, block: ResBlock, config: UNetConfig, inputs: Parts) -> dict[str, _Weight]:
    """The weights of a residual block."""
    out = (block.conv1.out_channels,)
    emb = (config.embedding_channels,)
    found = _norm(f"{name}, norm1", block.norm1, inputs)
    found |= _linear(f"{name}, conv1", block.conv1, out, inputs)
    if config.time_affine:
        found |= _linear(f"{name}, scale and shift", block.time, out * 2, emb)
    else:
        found |= _linear(f"{name}, added time", block.time, out, emb)
    found |= _norm(f"{name}, norm2", block.norm2, out)
    found |= _linear(f"{name}, conv2", block.conv2, out, out)
    if isinstance(block.skip, nn.Conv2d):
        found |= _linear(f"{name}, skip", block.skip, out, inputs)
    else:
        weight = block.conv1.weight
        found[f"{name}, skip.weight"] = _Weight(torch.eye(*out).to(weight)[:, :, None, None], (out, inputs))
        found[f"{name}, skip.bias"] = _Weight(torch.zeros(*out).to(weight), (out,))
    return found


def _attention(name: str, attention: Attention) -> dict[str, _Weight]:
    """The weights of an attention block: q, k and v are divided into heads."""
    c, heads = attention.norm.num_channels, attention.num_heads
    by_head = (c // heads,) * heads
    found = _norm(f"{name}, norm", attention.norm, (c,))
    found |= _linear(f"{name}, qkv", attention.qkv, by_head * 3, (c,))
    return found | _linear(f"{name}, out", attention.out, (c,), by_head)


def _linear(name: str, module: nn.Module, out: Parts, inputs: Parts) -> dict[str, _Weight]:
    assert isinstance(module, nn.Linear | nn.Conv2d)
    assert module.bias is not None
    return {f"{name}.weight": _Weight(module.weight, (out, inputs)), f"{name}.bias": _Weight(module.bias, (out,))}


def _norm(name: str, norm: nn.GroupNorm, channels: Parts) -> dict[str, _Weight]:
    return {f"{name}.weight": _Weight(norm.weight, (channels,)), f"{name}.bias": _Weight(norm.bias, (channels,))}


def _pieces(channels: int) -> Parts:
    """The pieces of a time embedding: cosines, sines, and a zero if the number is odd."""
    return channels // 2, channels // 2, channels % 2


def _at_frequencies(weight: Tensor, shift: int, like_channels: int, like_shift: int) -> Tensor:
    """Weights (…, C′) for another time embedding with nearly the output of `weight` (…, C) for its own.

    Frequency i is P^(−i/(half − shift)). It mostly lies between two of the other's frequencies, and its weights
    are divided between these.
    """
    channels = weight.shape[1]
    if (channels, shift) == (like_channels, like_shift):
        return weight
    half, other = channels // 2, like_channels // 2
    if not half or not other:
        return weight.new_zeros(len(weight), like_channels)
    place = torch.arange(half) * (other - like_shift) / (half - shift)
    share = (1 - (place.clamp(max=other - 1)[:, None] - torch.arange(other)).abs()).clamp(min=0).to(weight)
    with torch.no_grad():
        cosines, sines = (part @ share for part in weight[:, : 2 * half].chunk(2, dim=1))
    return torch.cat([cosines, sines, weight.new_zeros(len(weight), like_channels % 2)], dim=1)


# The meaning of the weights of a UNet of diffusers


def _weights_of_diffusers(model: Any, like: Any) -> dict[str, _Weight]:
    """As `_weights`, for a `UNet2DConditionModel`: names are those in `like`."""
    parts, found = _parts_of_diffusers(model), {}
    for name, module in _named_like(model, like):
        for key, tensor in module.named_parameters(recurse=False):
            rows, columns = parts.get(module, (None, None))
            sizes = [given or (size,) for given, size in zip((rows, columns), tensor.shape[:2], strict=False)]
            found[f"{name}.{key}"] = _Weight(tensor, tuple(sizes))
        if getattr(module, "conv_shortcut", 0) is None:
            out, inputs = parts.get(module.conv1, (None, None))
            weight = module.conv1.weight
            sizes = [out or (weight.shape[0],), inputs or (weight.shape[1],)]
            eye = torch.eye(*weight.shape[:2]).to(weight)[:, :, None, None]
            found[f"{name}.conv_shortcut.weight"] = _Weight(eye, tuple(sizes))
            found[f"{name}.conv_shortcut.bias"] = _Weight(weight.new_zeros(len(weight)), (sizes[0],))
    first, own, other = ".time_embedding.linear_1.weight", model.config, like.config
    columns = other.block_out_channels[0]
    weight = _at_frequencies(found[first].tensor, own.freq_shift, columns, other.freq_shift)
    found[first] = _Weight(weight, (found[first].axes[0], _pieces(columns)))
    guidance, theirs = ".time_embedding.cond_proj.weight", like.time_embedding.cond_proj
    if theirs is not None and guidance not in found:
        found[guidance] = _Weight(torch.zeros_like(theirs.weight), tuple((size,) for size in theirs.weight.shape))
    return found


def _named_like(module: nn.Module, like: nn.Module | None, name: str = "") -> Iterator[tuple[str, Any]]:
    """Name in `like`, module; modules that correspond to none of `like`'s are omitted or have a name that it lacks."""
    yield name, module
    for child, part in module.named_children():
        other = getattr(like, child, None)
        if not isinstance(part, nn.ModuleList) or not isinstance(other, nn.ModuleList):
            yield from _named_like(part, other, f"{name}.{child}")
            continue
        number = _numbers(len(part), len(other))
        if child in ("down_blocks", "up_blocks"):  # levels are numbered from the image
            shift = len(other) - len(part) if child == "up_blocks" else 0
            number = {k: k + shift for k in range(len(part)) if 0 <= k + shift < len(other)}
        for k, at in number.items():
            yield from _named_like(part[k], other[at], f"{name}.{child}.{at}")


def _parts_of_diffusers(model: Any) -> dict[nn.Module, tuple[Parts | None, Parts | None]]:
    """The layers whose rows or columns have several pieces, and these."""
    found: dict[nn.Module, tuple[Parts | None, Parts | None]] = {}
    width = model.config.block_out_channels[-1]
    for block in model.up_blocks:
        for resnet in block.resnets:
            inputs = (width, resnet.in_channels - width)
            found |= {resnet.norm1: (inputs, None), resnet.conv1: (None, inputs), resnet.conv_shortcut: (None, inputs)}
            width = resnet.out_channels
    for module in model.modules():
        if (heads := getattr(module, "heads", None)) is not None:
            by_head = (module.to_q.out_features // heads,) * heads
            found |= dict.fromkeys((module.to_q, module.to_k, module.to_v), (by_head, None))
            found[module.to_out[0]] = (None, by_head)
        elif type(module).__name__ == "GEGLU":  # values and gates
            half = module.proj.out_features // 2
            found[module.proj] = ((half, half), None)
    return found
