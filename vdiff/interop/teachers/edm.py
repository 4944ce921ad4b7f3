"""Networks of NVlabs/edm: DDPM++ and NCSN++ as `SongUNet`, ADM as vdiff's UNet, with their preconditioning; EDM2's.

A file holds the state dict of the whole network, and a JSON file its class and the arguments of its constructor:

    {"class_name": "EDMPrecond", "img_resolution": 32, "model_type": "SongUNet", …}
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.diffusion.parameterisation import Edm, Parameterisation, Vp
from vdiff.diffusion.schedules import EdmSchedule, Schedule, VpSdeSchedule
from vdiff.errors import VdiffError, explained, shell
from vdiff.files import sha256_of
from vdiff.interop.foreign import (
    IMPORTED_MODEL,
    NO_AUGMENTATION,
    NO_DROPOUT,
    JsonFile,
    imported_fields,
    write_model,
)
from vdiff.interop.teachers import edm2
from vdiff.interop.teachers.weights import (
    Place,
    read_state_dict,
    same_weights,
    translated,
)
from vdiff.models.checkpoint import MAX_IMAGE_SIZE, CheckpointConfig
from vdiff.models.codec import PIXEL_CODEC, UNBOUNDED
from vdiff.models.kinds import EDM2, SONG
from vdiff.models.song_config import SongConfig
from vdiff.models.song_unet import SongUNet
from vdiff.models.unet_config import UNetConfig
from vdiff.replacing import check_free

PRECONDITIONINGS = ("EDMPrecond", "VPPrecond", "VEPrecond", "Precond")
"""The last one is EDM2's."""
SONG_UNET, DHARIWAL_UNET = "SongUNet", "DhariwalUNet"
WITHOUT_EFFECT = {"class_name", "use_fp16", "augment_dim", "dropout", "sigma_min", "sigma_max", "epsilon_t", "M"}
"""Options of training, or of the range of noise levels, which the schedules give."""
READ = {
    *("img_resolution", "img_channels", "label_dim", "label_dropout", "model_type", "model_channels", "channel_mult"),
    *("channel_mult_emb", "channel_mult_noise", "num_blocks", "attn_resolutions", "embedding_type", "encoder_type"),
    *("decoder_type", "resample_filter", "sigma_data", "beta_d", "beta_min"),
}
DROPPED = re.compile(r"map_augment\..*|.*\.resample_filter")
"""Tensors that an image without augmentation does not need, and filters, which the configuration has."""
ADVICE = "write it from the network's init_kwargs, see docs/teachers.md, EDM"
OF_BLOCK = {"norm1": "norm0", "conv1": "conv0", "time": "affine", "norm2": "norm1", "conv2": "conv1", "skip": "skip"}
OF_ATTENTION = {"norm": "norm2", "qkv": "qkv", "out": "proj"}


@dataclass(frozen=True)
class Teacher:
    """How a network is used: its parameterisation, its schedule, and the affine map from our timestep to its own."""

    family: Parameterisation
    schedule: Schedule
    time_scale: float = 1.0
    time_offset: float = 0.0


def import_edm(path: Path, out: Path, *, config: Path | None = None, overwrite: bool = False) -> CheckpointConfig:
    """Convert a network of EDM to the checkpoint folder `out`; returns its description.

    Args:
        config: the JSON file with its class and arguments; None: of the name of `path`, with `.json`.

    Raises:
        VdiffError: the files are not of this kind or do not fit each other, or `out` exists.
    """
    check_free(out, IMPORTED_MODEL, overwrite=overwrite)
    if path.suffix == ".pkl":
        raise _pickle_refusal(path)
    file = JsonFile.read(config or path.with_suffix(".json"), ADVICE)
    kind = _class_of(file)
    known = edm2.READ | edm2.WITHOUT_EFFECT if kind == "Precond" else READ | WITHOUT_EFFECT
    if unknown := sorted(file.values.keys() - known):
        raise VdiffError(f"{file.where}: {unknown[0][:60]!r} is not an argument of such a network", ADVICE)
    tensors = {name: each for name, each in read_state_dict(path).items() if not DROPPED.fullmatch(name)}
    teacher = _teacher(file, kind)
    network: dict[str, Any]
    with explained(file.where, ADVICE, ValueError, TypeError):
        if kind == "Precond":
            own = edm2.edm2_config(file)
            weights = edm2.edm2_weights(path, own, tensors)
            network = {"backbone": {"kind": EDM2, "config": own.to_dict()}}
        elif file.word("model_type", DHARIWAL_UNET, (SONG_UNET, DHARIWAL_UNET)) == SONG_UNET:
            song = _song_config(file, teacher)
            weights = same_weights(path, lambda: SongUNet(song), tensors)
            network = {"backbone": {"kind": SONG, "config": song.to_dict()}}
        else:
            unet = _unet_config(file, teacher)
            weights = _unet_weights(path, unet, tensors, file.whole("img_resolution", 0, low=1, high=MAX_IMAGE_SIZE))
            network = {"unet": unet.to_dict()}
    size, channels = file.values["img_resolution"], file.values["img_channels"]
    classes = file.whole("label_dim", 0, low=0, high=10**7)
    description = CheckpointConfig(
        **network,
        **({"sample_shape": [channels, size, size]} if "backbone" in network else {"image_size": size}),
        codec=PIXEL_CODEC.name if channels in (1, 3) else UNBOUNDED.name,
        schedule=teacher.schedule.to_dict(),
        **teacher.family.config_fields(),
        num_timesteps=teacher.schedule.label_scale,
        class_names=[str(k) for k in range(classes)],
        **imported_fields(
            f"edm/{path.name} sha256:{sha256_of(path)}", weights="ema", approximated=_approximated(file, kind)
        ),
    )
    write_model(out, weights, description, overwrite=overwrite)
    return description


def _pickle_refusal(path: Path) -> VdiffError:
    """The error that a file is a pickle; its note has the lines by which its owner writes the two files of it."""
    error = VdiffError(
        f"{path} is a pickle: loading it runs code, which vdiff never does",
        "if you trust it, run these lines of Python in the repository of EDM or EDM2 that it is from, then "
        f"{shell('vdiff', 'import', 'edm', path.with_suffix('.pt'))}",
    )
    file, weights, config = (str(path.resolve().with_suffix(suffix)) for suffix in (".pkl", ".pt", ".json"))
    error.add_note(
        f"import json, pickle, torch; net = pickle.load(open({file!r}, 'rb'))['ema']\n"
        f"torch.save(net.state_dict(), {weights!r})\n"
        f"json.dump({{'class_name': type(net).__name__, **net.init_kwargs}}, open({config!r}, 'w'))"
    )
    return error


def _class_of(file: JsonFile) -> str:
    """The class of the preconditioning.

    Raises:
        VdiffError: one that cannot be read.
    """
    kind = str(file.get("class_name", "EDMPrecond")).rpartition(".")[2]
    if kind not in PRECONDITIONINGS:
        advice = "`vdiff import openai` reads the original weights" if kind == "iDDPMPrecond" else ""
        raise file.refusal("class_name", f"only {', '.join(PRECONDITIONINGS)} can be read{advice and f'; {advice}'}")
    return kind


def _approximated(file: JsonFile, kind: str) -> list[str]:
    """A sentence for each thing that is left out."""
    is_edm2 = kind == "Precond"
    said = {
        NO_DROPOUT: file.number("dropout", 0.0 if is_edm2 else 0.1, low=-1, high=1) > 0,
        NO_AUGMENTATION: file.whole("augment_dim", 0, low=0, high=10**7) > 0,
        "its estimate of the uncertainty is left out": is_edm2,
    }
    return [sentence for sentence, is_true in said.items() if is_true]


def _teacher(file: JsonFile, kind: str) -> Teacher:
    """What the class `kind` stands for. Source: Karras et al. 2022, table 1."""
    if kind == "VEPrecond":
        low, high = file.number("sigma_min", 0.02, low=0, high=1e6), file.number("sigma_max", 100, low=0, high=1e6)
        family = Edm(scaled_input=False, noise_output=True, noise_scale=1.0, noise_offset=-math.log(2))
        return Teacher(family, EdmSchedule(low, high))
    if kind == "VPPrecond":
        schedule = VpSdeSchedule(
            file.number("beta_d", 19.9, low=0, high=1e3), file.number("beta_min", 0.1, low=0, high=1e3)
        )
        scale = (file.whole("M", 1000, low=2, high=10**5) - 1) / schedule.label_scale
        return Teacher(Vp("eps"), schedule, scale, scale)
    return Teacher(Edm(file.number("sigma_data", 0.5, low=0, high=1e6)), EdmSchedule())


def _common(file: JsonFile, mult: list[int], blocks: int, resolutions: list[int]) -> tuple[list[int], int, list[int]]:
    """channel_mult, num_blocks and attn_resolutions, with these defaults."""
    found = file.items("channel_mult", int, high=16) if file.get("channel_mult") else mult
    where = file.items("attn_resolutions", int, high=16) if file.get("attn_resolutions") else None
    if where is None:
        where = resolutions if "attn_resolutions" not in file.values else []
    return found, file.whole("num_blocks", blocks, low=1, high=64), where


def _song_config(file: JsonFile, teacher: Teacher) -> SongConfig:
    """The configuration of a DDPM++ or NCSN++."""
    file.word("decoder_type", "standard", ["standard"])
    mult, blocks, resolutions = _common(file, [1, 2, 2, 2], 4, [16])
    return SongConfig(
        img_resolution=file.whole("img_resolution", 0, low=1, high=MAX_IMAGE_SIZE),
        img_channels=file.whole("img_channels", 0, low=1, high=4096),
        label_dim=file.whole("label_dim", 0, low=0, high=10**7),
        label_dropout=file.number("label_dropout", 0, low=-1, high=1) > 0,
        model_channels=file.whole("model_channels", 128, low=4, high=2**14),
        channel_mult=tuple(mult),
        channel_mult_emb=file.whole("channel_mult_emb", 4, low=1, high=64),
        channel_mult_noise=file.whole("channel_mult_noise", 1, low=1, high=64),
        num_blocks=blocks,
        attn_resolutions=tuple(resolutions),
        fourier=file.word("embedding_type", "positional", ["positional", "fourier"]) == "fourier",
        residual=file.word("encoder_type", "standard", ["standard", "residual"]) == "residual",
        resample_filter=tuple(file.items("resample_filter", int, high=16) if file.get("resample_filter") else (1, 1)),
        time_scale=teacher.time_scale,
        time_offset=teacher.time_offset,
    )


def _unet_config(file: JsonFile, teacher: Teacher) -> UNetConfig:
    """The configuration of an ADM network.

    Raises:
        ValueError: vdiff's UNet has no such network.
    """
    mult, blocks, resolutions = _common(file, [1, 2, 3, 4], 3, [32, 16, 8])
    channels = file.whole("model_channels", 192, low=4, high=2**14)
    size = file.whole("img_resolution", 0, low=1, high=MAX_IMAGE_SIZE)
    if mult[0] != 1:
        raise ValueError(f"a first channel_mult of {mult[0]} cannot be read, only 1")
    groups = {min(32, channels * m // 4) for m in mult}
    if len(groups) > 1 or any(channels * m % 64 for m in mult):
        raise ValueError(
            f"{channels} channels × {mult} cannot be read: each level needs a multiple of 64 channels, and at least 128"
        )
    images = file.whole("img_channels", 0, low=1, high=4096)
    classes = file.whole("label_dim", 0, low=0, high=10**7)
    return UNetConfig(
        in_channels=images,
        out_channels=images,
        channels=channels,
        embedding_channels=channels * file.whole("channel_mult_emb", 4, low=1, high=64),
        multipliers=tuple(mult),
        num_blocks=blocks,
        attention_strides=tuple(size // each for each in resolutions if size // each < 2 ** len(mult)),
        head_channels=64,
        resample="block",
        num_classes=classes,
        null_class=bool(classes) and file.number("label_dropout", 0, low=-1, high=1) > 0,
        num_groups=groups.pop(),
        time_scale=teacher.time_scale,
        time_offset=teacher.time_offset,
    )


def _unet_weights(path: Path, config: UNetConfig, tensors: dict[str, Tensor], size: int) -> dict[str, Tensor]:
    """The weights of `UNet(config)`: the map of a class is a table, with a row of zeros for "no class"."""
    table = tensors.pop("map_label.weight", None)
    if table is not None and table.ndim == 2:
        rows = [table.T, table.new_zeros(1, len(table))] if config.null_class else [table.T]
        tensors["map_label.weight"] = torch.cat(rows)

    def inner(place: Place) -> dict[str, str]:
        name = f"{size >> place.level}x{size >> place.level}"
        if place.part == "middle":
            theirs = f"dec.{name}_in{place.index}"
        elif place.number is None:  # of the level that it leads to
            into = size >> (place.level + (1 if place.part == "down" else -1))
            theirs = f"{'enc' if place.part == 'down' else 'dec'}.{into}x{into}_{place.part}"
        else:
            theirs = f"{'enc' if place.part == 'down' else 'dec'}.{name}_block{place.number}"
        return {f"block.{ours}": f"{theirs}.{each}" for ours, each in OF_BLOCK.items()} | {
            f"attention.{ours}": f"{theirs}.{each}" for ours, each in OF_ATTENTION.items()
        }

    outer = {"embed.0": "map_layer0", "embed.2": "map_layer1", "embed_class": "map_label"}
    outer |= {"conv_in": f"enc.{size}x{size}_conv", "norm_out": "out_norm", "conv_out": "out_conv"}
    return translated(path, config, tensors, outer, inner, _sorted_qkv)


def _sorted_qkv(weight: Tensor, heads: int) -> Tensor:
    """(heads · width · 3, …) → (3 · heads · width, …)."""
    return weight.unflatten(0, (heads, -1, 3)).movedim(2, 0).flatten(0, 2)
