"""A LoRA as other tools load it: one file in the layout of diffusers, or a folder of peft for each network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.errors import OptionError, VdiffError
from vdiff.files import write_json
from vdiff.models.adapters import AdapterSettings
from vdiff.models.checkpoint import ADAPTER, CheckpointConfig, read_config, read_metadata, read_tensors, write_tensors
from vdiff.models.kinds import DIFFUSERS, TEXT
from vdiff.replacing import Kind, check_free, locked, new_folder

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = ("diffusers", "peft")
PREFIXES = {TEXT: "network.unet.model.", DIFFUSERS: "network.model."}
"""Our prefix to diffusers' names of layers, by the kind of the network."""
UNET, PEFT_CONFIG, PEFT_WEIGHTS = "unet", "adapter_config.json", "adapter_model.safetensors"
MADE_BY = {"made_by": "vdiff"}
FILE = Kind("LoRA", lambda path: path.name if MADE_BY.items() <= read_metadata(path).items() else "")
FOLDER = Kind(
    "LoRA of peft",
    lambda path: (
        f"{UNET}/({PEFT_CONFIG}|{PEFT_WEIGHTS})"
        if (path / UNET / PEFT_WEIGHTS).is_file() and FILE.files(path / UNET / PEFT_WEIGHTS)
        else ""
    ),
)


def read_lora(checkpoint: Path) -> tuple[CheckpointConfig, AdapterSettings, dict[str, Tensor]]:
    """A checkpoint, its LoRA, and the weights by the names that diffusers gives to the layers: `LAYER.lora_A.weight`.

    Raises:
        VdiffError: the checkpoint is no LoRA, or not of a network of diffusers.
    """
    config = read_config(checkpoint)
    if config.adapter is None:
        raise VdiffError(f"{checkpoint} is not a LoRA: it has all weights", "export it with vdiff export diffusers")
    if (prefix := PREFIXES.get(config.kind)) is None:
        raise VdiffError(
            f"{checkpoint} is a LoRA of a network that other tools do not have",
            "vdiff export weights merges it with its base",
        )
    tensors = read_tensors(checkpoint / ADAPTER)
    return config, config.adapter, {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def peft_config(settings: AdapterSettings, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`adapter_config.json` of peft; layers are named in full."""
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    return {
        "peft_type": "LORA", "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout,
        "target_modules": layers, "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip


def export_lora(checkpoint: Path, target: Path, layout: str, *, overwrite: bool = False) -> CheckpointConfig:
    """Write the LoRA of a checkpoint, whole or not at all; return the checkpoint's description.

    Args:
        target: a `.safetensors` file for the layout "diffusers", which `pipeline.load_lora_weights` loads; a folder for
            "peft", whose `unet/` `PeftModel.from_pretrained` loads.

    Raises:
        VdiffError: the checkpoint is no LoRA of a network of diffusers, or `target` cannot be written.
    """
    config, settings, tensors = read_lora(checkpoint)
    described = peft_config(settings, tensors)
    if layout == "peft":
        with new_folder(target, FOLDER, overwrite=overwrite, flag="another folder") as temporary:
            (temporary / UNET).mkdir()
            named = {f"base_model.model.{name}": tensor for name, tensor in tensors.items()}
            write_tensors(temporary / UNET / PEFT_WEIGHTS, named, {"format": "pt", **MADE_BY})
            write_json(temporary / UNET / PEFT_CONFIG, described)
        return config
    if target.suffix != ".safetensors":
        raise OptionError(f"{target} is not a name for a LoRA of diffusers", "give FILE.safetensors, or --format peft")
    with locked(target):
        check_free(target, FILE, overwrite=overwrite, flag="another file")
        kept = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")
        note = json.dumps({f"{UNET}.{name}": described[name] for name in kept})
        prediction = {"modelspec.prediction_type": {"eps": "epsilon"}.get(config.prediction, config.prediction)}
        metadata = {"format": "pt", **MADE_BY, "lora_adapter_metadata": note, **prediction}
        target.parent.mkdir(parents=True, exist_ok=True)
        write_tensors(target, {f"{UNET}.{name}": tensor for name, tensor in tensors.items()}, metadata)
    return config
