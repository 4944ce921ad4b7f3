"""The models of Google's diffusion_distillation, whose UNet is vdiff's: teachers and students of Salimans & Ho 2022.

A file is a train state of flax in msgpack: `ema_params`, a tree of arrays, and `num_sample_steps`, 0 for a teacher. The
architecture follows from the shapes. The network embeds 1000 · φ/(π/2) of the cosine schedule.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from vdiff.diffusion.parameterisation import Vp
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.errors import OptionError, VdiffError, explained
from vdiff.files import check_regular, sha256_of
from vdiff.interop.foreign import IMPORTED_MODEL, NO_DROPOUT, imported_fields, write_model
from vdiff.interop.pickles import check_backed
from vdiff.interop.teachers.weights import Place, translated
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.unet_config import UNetConfig
from vdiff.replacing import check_free

MAX_FILE_BYTES = 16 * 2**30
ARRAYS = (1, 3)
"""The types of extensions that flax gives to arrays and to numbers of NumPy."""
TYPES = {
    "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16,
    "int32": torch.int32, "int64": torch.int64,
}  # fmt: skip
IMAGE_SIZES = {(256, (1, 1, 1)): 32, (192, (1, 2, 3, 4)): 64}
"""The image sizes of the published models of CIFAR-10 and ImageNet, by channels and multipliers."""
UNREADABLE = (msgspec.DecodeError, ValueError, TypeError, RecursionError, RuntimeError, OSError, MemoryError)
GIVE = "give a checkpoint_… of diffusion_distillation"
OF_BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "temb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "nin_shortcut",
}
OF_ATTENTION = {"norm": "norm", "qkv": "qkv", "out": "proj_out"}


def import_google(
    path: Path, out: Path, *, image_size: int | None = None, prediction: str = "x", overwrite: bool = False
) -> CheckpointConfig:
    """Convert a checkpoint of diffusion_distillation to the folder `out`; returns its description.

    Args:
        image_size: None: that of the published model of this shape.
        prediction: what a network with as many outputs as inputs predicts, "x", "eps" or "v"; one with twice as many
            predicts both x and ε.

    Raises:
        VdiffError: the file is not of this kind, or `out` exists.
        OptionError: the image size is not known, or does not fit the network.
    """
    check_free(out, IMPORTED_MODEL, overwrite=overwrite)
    tree, num_steps = _read(path)
    with explained(str(path), GIVE, KeyError, ValueError, IndexError, RuntimeError):
        heads = {tuple(array.shape[1:]) for name, array in tree.items() if name.endswith("/q/kernel")}
        tensors = dict(_in_torch_layout(tree))
        unet = _unet_config(tensors, heads)
    size = image_size or IMAGE_SIZES.get((unet.channels, unet.multipliers))
    if size is None or size % unet.size_multiple:
        raise OptionError(
            f"--image_size {size or 'is needed'}: {path} has {unet.channels} channels × {list(unet.multipliers)}, "
            "and does not hold the size",
            f"give a multiple of {unet.size_multiple}",
        )
    is_both = unet.out_channels == 2 * unet.in_channels
    schedule = CosineSchedule()
    description = CheckpointConfig(
        unet=unet.to_dict(),
        schedule=schedule.to_dict(),
        **Vp("both" if is_both else prediction).config_fields(),
        num_timesteps=num_steps or schedule.label_scale,
        image_size=size,
        class_names=[str(k) for k in range(unet.num_classes)],
        **imported_fields(
            f"diffusion_distillation/{path.name} sha256:{sha256_of(path)}",
            method="progressive" if num_steps else "base",
            weights="ema",
            approximated=[NO_DROPOUT],
        ),
    )
    write_model(out, _weights(path, unet, tensors), description, overwrite=overwrite)
    return description


def _read(path: Path) -> tuple[dict[str, Tensor], int]:
    """The averaged weights by their paths in the tree, and the number of sampling steps."""
    check_regular(path)
    if not path.is_file():
        raise VdiffError(f"{path}: no such file", GIVE)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise VdiffError(f"{path} is larger than {MAX_FILE_BYTES // 2**30} GiB", GIVE)
    with explained(f"{path} cannot be read", GIVE, *UNREADABLE):
        state = msgspec.msgpack.decode(path.read_bytes(), ext_hook=_array)
        if not isinstance(state, dict) or not isinstance(state.get("ema_params"), dict):
            raise ValueError("it holds no ema_params")
        tree = dict(_leaves(state["ema_params"], ""))
    check_backed(path, tree)
    steps = state.get("num_sample_steps")
    steps = int(steps) if isinstance(steps, Tensor) and steps.numel() == 1 else steps
    return tree, steps if type(steps) is int and 0 < steps <= 2**20 else 0


def _array(kind: int, data: memoryview) -> Tensor | None:
    """An array of flax: (shape, type, bytes), in msgpack again; None for what weights are not made of."""
    if kind not in ARRAYS:
        return None
    shape, name, raw = msgspec.msgpack.decode(data, type=tuple[list[int], str, bytes])
    if (dtype := TYPES.get(name)) is None or not raw:
        return None
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def _leaves(tree: Mapping[str, Any], path: str) -> Iterator[tuple[str, Tensor]]:
    """The arrays of a tree of dictionaries, with their paths."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{path}{name}/")
        elif isinstance(value, Tensor):
            yield f"{path}{name}", value
        else:
            raise ValueError(f"{path}{name} is not an array")


def _in_torch_layout(tree: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """`down_0.block_0/conv1/kernel` (H, W, in, out) → `down_0.block_0/conv1.weight` (out, in, H, W), and the like.

    q, k and v become one matrix; the bias of a class is part of its row.
    """
    for path, array in tree.items():
        module, _, kind = path.rpartition("/")
        owner, _, last = module.rpartition("/")
        if last in ("k", "v"):
            continue
        if last == "q":
            parts = [tree.get(f"{owner}/{name}/{kind}", array) for name in "qkv"]
            flat = [part.flatten(1).T if kind == "kernel" else part.flatten() for part in parts]
            yield f"{owner}/qkv.{'weight' if kind == 'kernel' else kind}", torch.cat(flat)
        elif module == "class_emb":
            if kind == "kernel":
                yield "class_emb.weight", array + tree.get("class_emb/bias", 0)
        elif kind == "kernel" and last == "proj_out":
            yield f"{module}.weight", array.flatten(0, 1).T
        elif kind == "kernel":
            yield f"{module}.weight", array.T if array.ndim == 2 else array.permute(3, 2, 0, 1)
        else:
            yield f"{module}.{'weight' if kind == 'scale' else kind}", array.flatten()


def _unet_config(tensors: Mapping[str, Tensor], heads: set[tuple[int, ...]]) -> UNetConfig:
    """The configuration, from names and shapes; `heads` are (heads, channels of a head) of all attention.

    Raises:
        KeyError, ValueError, IndexError: they are not those of such a network.
    """
    channels, image_channels = tensors["conv_in.weight"].shape[:2]
    blocks = re.compile(r"down_(\d+)\.(block|attn)_(\d+)/")
    found = {match.groups() for match in map(blocks.match, tensors) if match}
    count = 1 + max(int(level) for level, _, _ in found)
    if count > 16 or tensors["conv_out.weight"].shape[0] not in (image_channels, 2 * image_channels):
        raise ValueError("it is not a UNet of images")
    widths = [tensors[f"down_{level}.block_0/conv1.weight"].shape[0] for level in range(count)]
    if any(width % channels for width in widths):
        raise ValueError(f"levels of {widths} channels, from {channels}")
    attending = {int(level) for level, kind, _ in found if kind == "attn"}
    counts, head_channels = ({each[i] for each in heads} for i in (0, 1))
    return UNetConfig(
        in_channels=image_channels,
        out_channels=tensors["conv_out.weight"].shape[0],
        channels=channels,
        embedding_channels=tensors["dense0.weight"].shape[0],
        multipliers=tuple(width // channels for width in widths),
        num_blocks=len([each for each in found if each[:2] == ("0", "block")]),
        attention_strides=tuple(2**level for level in sorted(attending)),
        num_heads=min(counts),
        head_channels=0 if len(counts) == 1 else min(head_channels),
        resample="block" if count == 1 or "down_0.downsample/conv1.weight" in tensors else "conv",
        downsample_pad="end",
        num_classes=len(tensors.get("class_emb.weight", ())),
        norm_eps=1e-6,
        num_groups=32,
        freq_shift=1,
        **_time_map(),
    )


def _time_map() -> dict[str, Any]:
    """1000 · φ/(π/2) as a function of our timestep L·t − 1, with φ = a·t + b."""
    schedule = CosineSchedule()
    per_angle = 1000 / (math.pi / 2)
    scale = per_angle * schedule.span / schedule.label_scale
    return {"time_scale": scale, "time_offset": scale + per_angle * schedule.first}


def _weights(path: Path, config: UNetConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `UNet(config)`; their time embedding has the sines first."""
    sines, cosines = tensors["dense0.weight"].chunk(2, dim=1)
    tensors = {**tensors, "dense0.weight": torch.cat([cosines, sines], dim=1)}

    def inner(place: Place) -> dict[str, str]:
        if place.part == "middle":
            block, attention = f"mid.block_{place.index + 1}", "mid.attn_1"
        elif place.number is None:
            block = attention = f"{place.part}_{place.level}.{place.part}sample"
        else:
            block, attention = (f"{place.part}_{place.level}.{kind}_{place.number}" for kind in ("block", "attn"))
        names = {f"block.{ours}": f"{block}/{theirs}" for ours, theirs in OF_BLOCK.items()}
        names |= {f"attention.{ours}": f"{attention}/{theirs}" for ours, theirs in OF_ATTENTION.items()}
        return {**names, "conv": block}

    outer = {"embed.0": "dense0", "embed.2": "dense1", "embed_class": "class_emb"}
    return translated(
        path, config, tensors, outer | {name: name for name in ("conv_in", "norm_out", "conv_out")}, inner
    )
