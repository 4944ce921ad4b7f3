"""Weights of other repositories: read from their files, and given to vdiff's UNet, whose mathematics is the same."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from vdiff.errors import VdiffError
from vdiff.interop.pickles import check_backed, read_pt
from vdiff.models.checkpoint import read_tensors
from vdiff.models.unet import Attention, Resample, UNet
from vdiff.models.unet_config import UNetConfig

WRAPPERS = re.compile(r"^(module\.|_orig_mod\.|model\.|inner_model\.)+")


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The weights in a safetensors file or in a `.pt` of `torch.save`, without the prefixes of wrappers.

    Raises:
        VdiffError: the file is missing or damaged, or holds something else.
    """
    return tensors_of(path, read_tensors(path) if path.suffix == ".safetensors" else read_pt(path))


def tensors_of(path: Path, values: Mapping[str, object]) -> dict[str, Tensor]:
    """The weights among the `values` of a file, without the prefixes of wrappers.

    Raises:
        VdiffError: a value is no tensor, or claims more numbers than the file holds.
    """
    tensors = {WRAPPERS.sub("", str(name)): value for name, value in values.items() if isinstance(value, Tensor)}
    if len(tensors) < len(values):
        other = next(name for name, value in values.items() if not isinstance(value, Tensor))
        raise VdiffError(f"{path}: {str(other)[:60]!r} is not a tensor", "give a file of a state dict alone")
    check_backed(path, tensors)
    return tensors


@dataclass(frozen=True)
class Place:
    """A stage or a resampling of vdiff's UNet.

    Attributes:
        prefix: its name in the UNet, `down.3`.
        part: "down", "middle" or "up".
        index: its number in the part.
        level, number: the level, from 0 at the full size, and the number of the block in it; None for a resampling.
        attends: whether it has attention.
    """

    prefix: str
    part: str
    index: int
    level: int
    number: int | None
    attends: bool


def places(network: UNet) -> Iterator[Place]:
    """All stages and resamplings, in the order in which they are evaluated."""
    last = len(network.config.multipliers) - 1
    for part, modules, level in (("down", network.down, 0), ("middle", network.middle, last), ("up", network.up, last)):
        number = 0
        for index, module in enumerate(modules):
            if isinstance(module, Resample):
                yield Place(f"{part}.{index}", part, index, level, None, False)
                level, number = level + (1 if part == "down" else -1), 0
            else:
                yield Place(f"{part}.{index}", part, index, level, number, isinstance(module.attention, Attention))
                number += 1


def translated(
    path: Path,
    config: UNetConfig,
    tensors: Mapping[str, Tensor],
    outer: Mapping[str, str],
    inner: Callable[[Place], Mapping[str, str]],
    by_head: Callable[[Tensor, int], Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weights of `UNet(config)`, float32.

    Args:
        path: for messages.
        tensors: their weights, which all must be used.
        outer: our modules outside of stages → theirs.
        inner: for a place, our modules in it → theirs.
        by_head: sorts the rows of q, k and v of a number of heads as ours are: q of all heads, k, v.

    Raises:
        VdiffError: a tensor is missing, superfluous, of another shape or not finite.
    """
    with torch.device("meta"):
        network = UNet(config)
    names = dict(outer)
    for place in places(network):
        names |= {f"{place.prefix}.{ours}": theirs for ours, theirs in inner(place).items()}
    expected, modules, found = network.state_dict(), dict(network.named_modules()), dict[str, Tensor]()
    sources = {f"{names[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": name for name in expected}
    check_names(path, sources.keys(), tensors.keys())
    for source, name in sources.items():
        due, theirs = expected[name].shape, tensors[source]
        if _without_ones(theirs.shape) != _without_ones(due):
            raise shape_refusal(path, source, theirs, due)
        weight = checked(path, source, theirs).reshape(due)
        owner = modules[name.rpartition(".qkv.")[0]] if ".qkv." in name else None
        if by_head is not None and isinstance(owner, Attention):
            weight = by_head(weight, owner.num_heads)
        found[name] = weight.contiguous()
    return found


def _without_ones(shape: torch.Size) -> tuple[int, ...]:
    """The shape without the ones at its end, as a matrix may be written as a convolution of 1 × 1."""
    last = next((i for i in range(len(shape), 0, -1) if shape[i - 1] != 1), 0)
    return tuple(shape[:last])


def check_names(path: Path, expected: Set[str], found: Set[str]) -> None:
    """Refuse a file whose tensors have other names than the configuration implies.

    Raises:
        VdiffError: the first name that is missing or unknown.
    """
    missing, extra = sorted(expected - found), sorted(found - expected)
    if missing or extra:
        what = f"lacks {missing[0]}" if missing else f"has {extra[0]}, which is unknown"
        raise VdiffError(f"{path} does not fit its configuration: it {what}", "give the configuration of this network")


def shape_refusal(path: Path, name: str, tensor: Tensor, due: torch.Size) -> VdiffError:
    """The error that a tensor has another shape than the configuration implies."""
    shapes = (" × ".join(map(str, shape)) for shape in (tensor.shape, due))
    return VdiffError(
        f"{path} does not fit its configuration: {name} is {', not '.join(shapes)}",
        "give the configuration of this network",
    )


def checked(path: Path, name: str, tensor: Tensor) -> Tensor:
    """The tensor in float32.

    Raises:
        VdiffError: it is not finite.
    """
    if not tensor.isfinite().all():
        raise VdiffError(f"{path}: {name} holds values that are not finite", "take an earlier checkpoint")
    return tensor.float()


def same_weights(path: Path, build: Callable[[], nn.Module], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a network whose names are theirs, float32.

    Raises:
        VdiffError: a tensor is missing, superfluous, of another shape or not finite.
    """
    with torch.device("meta"):
        expected = build().state_dict()
    check_names(path, expected.keys(), tensors.keys())
    for name, due in expected.items():
        if tensors[name].shape != due.shape:
            raise shape_refusal(path, name, tensors[name], due.shape)
    return {name: checked(path, name, tensor) for name, tensor in tensors.items()}


def without_variance(tensors: Mapping[str, Tensor], output: str, channels: int) -> dict[str, Tensor]:
    """The weights without the second half of the outputs, a learned variance, of the last layer `output`."""
    return {name: x[:channels] if name.rpartition(".")[0] == output else x for name, x in tensors.items()}
