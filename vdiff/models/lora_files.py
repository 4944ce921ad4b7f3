"""LoRAs to start from: files of diffusers and of kohya's scripts, folders of peft, and checkpoints of vdiff."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vdiff.errors import VdiffError, explained
from vdiff.files import read_json
from vdiff.models.adapters import ATTENTION, ENCODERS, MAX_RANK, AdapterSettings, adapted_layers
from vdiff.models.checkpoint import ADAPTER, CheckpointConfig, read_config, read_metadata, read_tensors
from vdiff.models.components import text_libraries
from vdiff.models.condition import POOLED
from vdiff.models.diffusers_names import TEXT_UNET, diffusers_class
from vdiff.models.kinds import TEXT

if TYPE_CHECKING:
    from vdiff.models.backbone import Backbone

UNET = "unet.model."
PARTS = {
    "unet": UNET,
    "transformer": UNET,
    "text_encoder": "text_encoders.0.",
    "text_encoder_one": "text_encoders.0.",
    "text_encoder_2": "text_encoders.1.",
    "text_encoder_two": "text_encoders.1.",
}
"""What other tools call a part of a pipeline → the prefix of its layers in our network."""
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
METADATA = "lora_adapter_metadata"
ONE_OF_EACH = "only LoRAs with one of each are read"
ADVICE = "give a LoRA in the layout of diffusers, kohya or peft"


def read_lora(path: Path, base: CheckpointConfig) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """The settings of a LoRA, and its weights by the names of our network: `network.LAYER.lora_A.weight`.

    Args:
        path: a `.safetensors` file of diffusers or (for Stable Diffusion up to XL) of kohya's scripts, a folder of peft
            whose `unet/` or `transformer/` holds its files, or a checkpoint of a LoRA.
        base: of the model that the LoRA changes.

    Raises:
        VdiffError: the file cannot be read, holds something else, or is a LoRA of another base.
    """
    if (path / ADAPTER).is_file():
        return _of_checkpoint(path, base)
    if base.kind != TEXT:
        raise VdiffError(f"{path} is not a checkpoint of a LoRA, and its base takes no prompts", "give a checkpoint")
    with torch.device("meta"):
        network = base.build().network
    with explained(f"{path} holds no LoRA that can be read", ADVICE, KeyError, ValueError, TypeError, AttributeError):
        tensors, alphas = _of_peft(path) if path.is_dir() else _of_file(path, network)
    unused = tuple(f"{name}.".replace("text_model.", "") for name in network.unused_layers)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(unused)}
    return _settings(path, network, tensors, alphas), {f"network.{name}": tensor for name, tensor in tensors.items()}


def _of_checkpoint(path: Path, base: CheckpointConfig) -> tuple[AdapterSettings, dict[str, Tensor]]:
    """The LoRA of a checkpoint."""
    config = read_config(path)
    if config.adapter is None or config.network_id() != base.network_id():
        raise VdiffError(f"{path} is a LoRA of another base", "give the base that it was trained on")
    return config.adapter, read_tensors(path / ADAPTER)


def _of_peft(path: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights in a folder of peft for each part of the pipeline, and the alpha of each layer."""
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    for part, prefix in PARTS.items():
        if not (path / part / WEIGHTS).is_file():
            continue
        alpha = read_json(path / part / SETTINGS, ADVICE).get("lora_alpha")
        for name, tensor in read_tensors(path / part / WEIGHTS).items():
            plain = f"{prefix}{name.removeprefix('base_model.model.').replace('text_model.', '')}"
            tensors[plain] = tensor
            if isinstance(alpha, int | float):
                alphas[_layer(plain)] = float(alpha)
    if not tensors:
        raise ValueError(f"there is no unet/{WEIGHTS} or transformer/{WEIGHTS}")
    return tensors, alphas


def _of_file(path: Path, network: Backbone) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The weights in one file, renamed by diffusers' converters, and the alpha of each layer."""
    found, metadata = read_tensors(path), read_metadata(path)
    name = diffusers_class(network.describe())
    if name != TEXT_UNET and any(key.endswith(".alpha") or not key.startswith("transformer.") for key in found):
        raise VdiffError(
            f"{path} is not in the layout of diffusers, the only one that is read for a {name}",
            "convert it: pipe.load_lora_weights and pipe.save_lora_weights of diffusers, or give a folder of peft",
        )
    with text_libraries():
        from diffusers.loaders import lora_pipeline as loaders
        from diffusers.utils.state_dict_utils import (
            convert_state_dict_to_diffusers,
            convert_state_dict_to_peft,
            convert_unet_state_dict_to_peft,
        )

        unet: Any = network.unet
        is_xl = POOLED in unet.signature.names
        scales = sorted({float(tensor) for name, tensor in found.items() if name.endswith(".alpha")})
        if len(scales) > 1:
            raise VdiffError(f"{path} has layers of alphas {scales[0]:g} and {scales[1]:g}", ONE_OF_EACH)
        if name == TEXT_UNET:
            kind = loaders.StableDiffusionXLLoraLoaderMixin if is_xl else loaders.StableDiffusionLoraLoaderMixin
            values, _ = kind.lora_state_dict(found, unet_config=unet.model.config)
        else:
            values = found
        tensors: dict[str, Tensor] = {}
        for part, prefix in PARTS.items():
            own = {key.removeprefix(f"{part}."): value for key, value in values.items() if key.startswith(f"{part}.")}
            if not own:
                continue
            if prefix == UNET:
                own = convert_unet_state_dict_to_peft(own) if name == TEXT_UNET else own
            else:
                own = convert_state_dict_to_peft(convert_state_dict_to_diffusers(own))
            tensors |= {f"{prefix}{name.replace('text_model.', '')}": tensor for name, tensor in own.items()}
    said = json.loads(metadata.get(METADATA, "{}"))
    alphas = {_layer(name): scale for scale in scales for name in tensors}
    for part, prefix in PARTS.items():
        if isinstance(alpha := said.get(f"{part}.lora_alpha"), int | float):
            alphas |= {_layer(name): float(alpha) for name in tensors if name.startswith(prefix)}
    return tensors, alphas


def _layer(name: str) -> str:
    """The layer of a weight of a LoRA."""
    return name.rpartition(".lora_")[0] or name


def _settings(
    path: Path, network: Backbone, tensors: Mapping[str, Tensor], alphas: Mapping[str, float]
) -> AdapterSettings:
    """The settings of a LoRA of these weights.

    Raises:
        VdiffError: the network has no such layers, or the LoRA is of another kind than ours.
    """
    layers = {name.replace("text_model.", ""): module for name, module in network.named_modules()}
    if other := [name for name in tensors if not name.endswith((".lora_A.weight", ".lora_B.weight"))]:
        raise VdiffError(f"{path} is not a plain LoRA: it has {other[0]}", ADVICE)
    names = sorted({_layer(name) for name in tensors})
    if not names:
        raise VdiffError(f"{path} holds no LoRA of this model", ADVICE)
    hint = "give --base the model that it was trained on"
    for name in names:
        down, up = (tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
        if name not in layers or down is None or up is None:
            raise VdiffError(f"{path} is a LoRA of another base, which has {name}", hint)
        weight: Any = layers[name].weight
        fits = down.ndim == up.ndim == weight.ndim and len(down) == up.shape[1]
        if not fits or (len(up), *down.shape[1:]) != tuple(weight.shape):
            shape = (len(up), *down.shape[1:])
            raise VdiffError(
                f"{path} is a LoRA of another base: its {name} is {shape}, not {tuple(weight.shape)}", hint
            )
    ranks = sorted({len(tensors[f"{name}.lora_A.weight"]) for name in names})
    scales = sorted({alphas.get(name, float(ranks[0])) for name in names})
    for what, values in (("ranks", ranks), ("alphas", scales)):
        if len(values) > 1:
            raise VdiffError(
                f"{path} has layers of {what} {values[0]:g} and {values[1]:g}",
                ONE_OF_EACH,
            )
    if not 1 <= ranks[0] <= MAX_RANK:
        raise VdiffError(f"{path} has rank {ranks[0]}", ADVICE)
    return _described(network, names, AdapterSettings(ranks[0], scales[0]))


def _described(network: Backbone, names: list[str], settings: AdapterSettings) -> AdapterSettings:
    """The settings with the fewest words that mean these layers: "attention", ends of names, or whole names."""
    own = [name for name in names if not name.startswith(ENCODERS)]
    ends = {".".join(name.split(".")[-2 if name.rpartition(".")[2].isdigit() else -1 :]) for name in own}
    for words in ((ATTENTION,), tuple(sorted(ends))):
        tried = replace(settings, targets=words, text_encoder=len(own) < len(names))
        if words and sorted(name.replace("text_model.", "") for name in adapted_layers(network, tried)) == names:
            return tried
    return replace(settings, targets=tuple(names))
