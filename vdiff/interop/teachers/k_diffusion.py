"""The UNet `image_v1` of k-diffusion: the files of its `train.py` and `convert_for_inference.py`, or a state dict.

    NAME_00100000.pth   {"config": …, "model": state, "model_ema": state, "opt": …, …}
    NAME.safetensors    the averaged state, with the configuration as JSON in its metadata

A configuration holds {"model": {"type": "image_v1", "input_channels": 3, "input_size": [32, 32], "channels": …}, …}.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdiff.diffusion.parameterisation import Edm
from vdiff.diffusion.schedules import EdmSchedule
from vdiff.errors import VdiffError, explained
from vdiff.files import parse, sha256_of
from vdiff.interop.foreign import (
    IMPORTED_MODEL,
    NO_AUGMENTATION,
    NO_DROPOUT,
    NO_VARIANCE,
    JsonFile,
    imported_fields,
    write_model,
)
from vdiff.interop.pickles import read_pt
from vdiff.interop.teachers.weights import same_weights, tensors_of, without_variance
from vdiff.models.checkpoint import MAX_IMAGE_SIZE, CheckpointConfig, read_metadata, read_tensors
from vdiff.models.codec import PIXEL_CODEC, UNBOUNDED
from vdiff.models.image_v1_config import MAX_LEVELS, MAX_WIDTH, ImageV1Config
from vdiff.models.image_v1_unet import ImageV1UNet
from vdiff.models.kinds import IMAGE_V1
from vdiff.replacing import check_free

NETWORK = "image_v1"
ADVICE = "give the JSON file with which k-diffusion trained it: --network_config"
WRAP = f"only {NETWORK} without conditions can be read: docs/teachers.md, k-diffusion, has lines for Python, vdiff.wrap"
CONDITIONS = ("mapping_cond_dim", "unet_cond_dim", "cross_cond_dim", "skip_stages")
DROPPED = re.compile(r"mapping_cond\.weight|u_net\..*\.kernel")
"""Tensors that an image without augmentation does not need, and filters, which are the same in all files."""


def import_k_diffusion(
    path: Path, out: Path, *, config: Path | None = None, overwrite: bool = False
) -> CheckpointConfig:
    """Convert a network of k-diffusion to the checkpoint folder `out`; returns its description.

    Args:
        config: the JSON file with the configuration; None: that in the file, or else that of its name with `.json`.

    Raises:
        VdiffError: the files are not of this kind or do not fit each other, or `out` exists.
    """
    check_free(out, IMPORTED_MODEL, overwrite=overwrite)
    values: Mapping[str, Any] = read_tensors(path) if path.suffix == ".safetensors" else read_pt(path)
    file = _model_config(path, values, config)
    name = next((name for name in ("model_ema", "model") if isinstance(values.get(name), Mapping)), "")
    found = tensors_of(path, values[name] if name else values)
    tensors = {key: tensor for key, tensor in found.items() if not DROPPED.fullmatch(key)}
    with explained(file.where, ADVICE, ValueError, TypeError):
        network = _network_config(file)
    size, multiple = file.items("input_size", int, high=2), network.signature.size_multiple
    if len(size) != 2 or any(not multiple < each <= MAX_IMAGE_SIZE or each % multiple for each in size):
        raise file.refusal("input_size", f"need two multiples of {multiple} above it")
    approximated = [NO_DROPOUT] if file.number("dropout_rate", 0.0, low=-1, high=1) > 0 else []
    if file.flag("augment_wrapper", True):
        approximated.append(NO_AUGMENTATION)
    if file.flag("has_variance", False):
        tensors = without_variance(tensors, "proj_out", network.input_channels * network.patch_size**2)
        approximated.append(NO_VARIANCE)
    schedule = EdmSchedule(
        file.number("sigma_min", 0.01, low=0, high=1e6), file.number("sigma_max", 80, low=0, high=1e6)
    )
    description = CheckpointConfig(
        backbone={"kind": IMAGE_V1, "config": network.to_dict()},
        sample_shape=[network.input_channels, *size],
        codec=PIXEL_CODEC.name if network.input_channels in (1, 3) else UNBOUNDED.name,
        schedule=schedule.to_dict(),
        **Edm(file.number("sigma_data", 1.0, low=0, high=1e6)).config_fields(),
        num_timesteps=schedule.label_scale,
        **imported_fields(
            f"k-diffusion/{path.name} sha256:{sha256_of(path)}",
            weights="raw" if name == "model" else "ema",
            approximated=approximated,
        ),
    )
    write_model(out, same_weights(path, lambda: ImageV1UNet(network), tensors), description, overwrite=overwrite)
    return description


def _model_config(path: Path, values: Mapping[str, Any], config: Path | None) -> JsonFile:
    """The part of the configuration that describes the network.

    Raises:
        VdiffError: there is none, or it is that of another network.
    """
    where, whole = f"{path}, its config", values.get("config")
    if config is None and not whole and path.suffix == ".safetensors":
        with explained(where, ADVICE, ValueError):
            whole = parse(read_metadata(path).get("config", "null"))
    if config is not None or not whole:
        config = config or path.with_suffix(".json")
        where, whole = str(config), JsonFile.read(config, ADVICE).values
    model = whole.get("model") if isinstance(whole, Mapping) else None
    if not isinstance(model, Mapping):
        raise VdiffError(f"{where} describes no model of k-diffusion", ADVICE)
    file = JsonFile(where, model)
    for key in ("type", *CONDITIONS):
        if file.get(key, 0) != (NETWORK if key == "type" else 0):
            raise file.refusal(key, WRAP)
    return file


def _network_config(file: JsonFile) -> ImageV1Config:
    """The configuration of the network.

    Raises:
        ValueError: values of no network.
    """
    return ImageV1Config(
        input_channels=file.whole("input_channels", 0, low=1, high=4096),
        mapping_out=file.whole("mapping_out", 0, low=2, high=MAX_WIDTH),
        depths=tuple(file.items("depths", int, high=MAX_LEVELS)),
        channels=tuple(file.items("channels", int, high=MAX_LEVELS)),
        self_attn_depths=tuple(file.items("self_attn_depths", bool, high=MAX_LEVELS)),
        patch_size=file.whole("patch_size", 1, low=1, high=64),
    )
