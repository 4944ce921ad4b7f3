"""Export of a text-to-image model with all its parts: a single safetensors file, or a pipeline folder of diffusers."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.diffusion.schedules import build_schedule
from vdiff.errors import OptionError, VdiffError, shell
from vdiff.files import make_folder, read_text, write_json, write_text, writing
from vdiff.interop.card import CARD, FILES_OF_CARD, card_beside, is_card, license_of_base, new_card, public
from vdiff.interop.diffusers.folders import INDEX, NOTE
from vdiff.interop.diffusers.latent_pipelines import KEYS
from vdiff.interop.diffusers.original import configuration, original_names
from vdiff.interop.diffusers.scheduler import write_scheduler_config
from vdiff.interop.modelspec import (
    MADE_BY,
    SDXL,
    Family,
    differs_from_usual,
    family_of,
    metadata_of,
)
from vdiff.interop.usage import folder_usage, single_file_usage
from vdiff.models.autoencoder import Autoencoder
from vdiff.models.checkpoint import (
    CheckpointConfig,
    is_checkpoint,
    load_checkpoint,
    read_config,
    read_metadata,
    write_tensors,
)
from vdiff.models.components import ENCODERS, PARTS, TOKENIZERS, text_libraries
from vdiff.models.text import TextBackbone
from vdiff.replacing import Kind, check_free, locked, new_folder

WRITTEN_BY = "# Written by vdiff. JSON, which is YAML too."
SINGLE_FILE = Kind("single file", lambda path: path.name if MADE_BY.items() <= read_metadata(path).items() else "")
CONFIGURATION = Kind("configuration", lambda path: path.name if read_text(path).startswith(WRITTEN_BY) else "")
PIPELINE = Kind(
    "pipeline",
    lambda folder: (
        rf"{INDEX}|{NOTE}|({'|'.join((*PARTS, 'unet', 'transformer', 'scheduler'))})/[^/]+"
        + f"|{FILES_OF_CARD}" * is_card(folder / CARD)
        if is_checkpoint((folder / NOTE).parent)
        else ""
    ),
)
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class TextModel:
    """A text-to-image model to be exported, with all its parts.

    Attributes:
        config: its description, without a LoRA, which is merged.
        components: the folder with its tokenizers and its autoencoder.
        notes: a sentence for each reason why a program needs a setting to generate the right images.
    """

    network: TextBackbone
    config: CheckpointConfig
    family: Family
    components: Path
    autoencoder: Any
    notes: list[str]


def load_text_model(checkpoint: Path, *, merge: bool, components: Path | None) -> TextModel:
    """Load a checkpoint of Stable Diffusion.

    Args:
        merge: it is a LoRA, which is merged with its base.
        components: the folder of its components, if it has moved.

    Raises:
        VdiffError: it is another model, a LoRA without `merge`, or it cannot be loaded.
        OptionError: `merge` for a model that is no LoRA.
    """
    said = read_config(checkpoint)
    if (family := family_of(said)) is None:
        raise VdiffError(
            f"{checkpoint} is not a text-to-image model of latents, as Stable Diffusion is",
            "vdiff export diffusers, onnx and torch write other models",
        )
    if said.adapter is not None and not merge:
        raise VdiffError(
            f"{checkpoint} is a LoRA", "add --merge to merge it into its base, or write it alone by vdiff export lora"
        )
    if said.adapter is None and merge:
        raise OptionError(f"--merge: {checkpoint} is not a LoRA: it has all weights", "leave it out")
    denoiser, config = load_checkpoint(checkpoint, components=components)
    network = denoiser.network
    assert isinstance(network, TextBackbone)
    notes = []
    if differs_from_usual(config.schedule):
        notes.append("ComfyUI and A1111 assume other noise levels than this model's: use it with diffusers")
    if config.prediction not in ("v", "eps"):
        notes.append(f"ComfyUI and A1111 know no prediction of {config.prediction}: use it with diffusers")
    folder = Path(str((config.components or {})["path"]))
    return TextModel(network, config, family, folder, Autoencoder.read(folder).model, notes)


def export_single_file(
    checkpoint: Path,
    file: Path,
    *,
    merge: bool = False,
    precision: str = "fp32",
    components: Path | None = None,
    license_name: str | None = None,
    card: bool = True,
    overwrite: bool = False,
) -> TextModel:
    """Write a model as one file by the original names, and NAME.yaml beside it, which A1111 reads.

    Args:
        merge, components: as in `load_text_model`.
        precision: of the weights, "fp32" or "fp16".
        license_name: None: that of the base's pipeline, if its README.md has one.
        card: write README.md beside the file.

    Raises:
        VdiffError, OptionError: as in `load_text_model`, or something is in the way.
    """
    if file.suffix != ".safetensors":
        raise OptionError(f"{file} is not a name for a single file", "give FILE.safetensors")
    beside = file.with_suffix(".yaml")
    with locked(file), locked(beside):
        check_free(file, SINGLE_FILE, overwrite=overwrite, flag="another file")
        check_free(beside, CONFIGURATION, overwrite=overwrite, flag="another file")
        if reason := why_no_single_file(read_config(checkpoint)):
            command = shell("vdiff", "export", "diffusers", checkpoint, "FOLDER", *["--merge"] * merge)
            raise VdiffError(f"{checkpoint} {reason}, which single files do not have", f"write a folder: {command}")
        model = load_text_model(checkpoint, merge=merge, components=components)
        config, vae, unet = model.config, model.autoencoder, model.network.unet
        encoders = [encoder.state_dict() for encoder in model.network.text_encoders]
        settings = unet.describe()["config"]
        tensors = original_names(model.family, unet.model.state_dict(), settings, encoders, vae.state_dict())
        named = {name: tensor.to(PRECISIONS[precision]) for name, tensor in tensors.items()} | keys_of(config)
        licence = license_name or license_of_base(config)
        page = single_file_usage(file.name, config, model.family)
        about: dict[str, Any] = {"usage": {file.name: page}, "license_name": licence, "tags": ["stable-diffusion"]}
        made = card_beside(file.parent, checkpoint, **about, anew=overwrite) if card else None
        make_folder(file.parent)
        write_tensors(file, named, metadata_of(config, file.stem, license_name=licence))
        values = configuration(model.family, settings, dict(vae.config), is_v=config.prediction == "v")
        write_text(beside, f"{WRITTEN_BY}\n{json.dumps(values, indent=1)}\n")
        if made is not None:
            made.write(file.parent)
    return model


def why_no_single_file(config: CheckpointConfig) -> str:
    """What the original names cannot express; empty: nothing, or it is no text-to-image model of latents."""
    if config.guidance_range:
        return "takes the guidance as an input"
    unet = config.network_config["unet"]["config"] if family_of(config) else {}
    if "mid_block_type" in unet and unet["mid_block_type"] is None:
        return "has a UNet without a middle"
    depths = unet.get("transformer_layers_per_block")
    counts = [unet.get("layers_per_block"), *(depths if isinstance(depths, list) else [])]
    return "has a UNet whose levels differ in blocks" if any(isinstance(count, list) for count in counts) else ""


def keys_of(config: CheckpointConfig) -> dict[str, Tensor]:
    """The empty tensors by which ComfyUI and A1111 know v and zero terminal SNR."""
    said = (config.prediction == "v", bool(config.schedule.get("zero_snr")))
    return {key: torch.empty(0) for key, holds in zip(KEYS, said, strict=True) if holds}


def export_text_pipeline(
    checkpoint: Path,
    folder: Path,
    *,
    merge: bool = False,
    components: Path | None = None,
    license_name: str | None = None,
    overwrite: bool = False,
) -> TextModel:
    """Write a model as a pipeline folder of diffusers, whole or not at all.

    Its scheduler is a `DDIMScheduler` with vdiff's timesteps, prediction and zero terminal SNR.

    Raises:
        VdiffError, OptionError: as in `load_text_model`, or something is in the way.
    """
    check_free(folder, PIPELINE, overwrite=overwrite, flag="another folder")
    model = load_text_model(checkpoint, merge=merge, components=components)
    config = model.config
    with new_folder(folder, PIPELINE, overwrite=overwrite, flag="another folder") as temporary:
        with text_libraries():
            import diffusers
            import transformers

            parts: dict[str, Any] = {
                "unet": model.network.unet.model,
                "vae": model.autoencoder,
                "scheduler": diffusers.DDIMScheduler(**scheduler_settings(config)),
                **dict(zip(ENCODERS, model.network.text_encoders, strict=False)),
            }
            for name in TOKENIZERS[: len(model.network.text_encoders)]:
                parts[name] = transformers.CLIPTokenizer.from_pretrained(model.components / name, local_files_only=True)
            if model.family is SDXL:
                parts |= {"force_zeros_for_empty_prompt": model.network.zero_empty, "add_watermarker": False}
            else:
                parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            with writing(folder):
                getattr(diffusers, model.family.pipeline)(**parts).save_pretrained(temporary)
        make_folder((temporary / NOTE).parent)
        published = replace(config, components={**(config.components or {}), "path": ".."}, base=None, adapter=None)
        write_json(temporary / NOTE, public(published.to_dict()))
        usage = {INDEX: folder_usage(folder.resolve().name, config)}
        licence = license_name or license_of_base(config) or "unknown"
        new_card(checkpoint, usage=usage, license_name=licence, library="diffusers").write(temporary)
    return model


def scheduler_settings(config: CheckpointConfig) -> dict[str, Any]:
    """The arguments of a `DDIMScheduler` with the steps of `sample.py`."""
    schedule = config.schedule
    found = {
        **write_scheduler_config(build_schedule(schedule), config.prediction, clip=False),
        "rescale_betas_zero_snr": bool(schedule.get("zero_snr")),
        "steps_offset": 1,  # without effect on trailing timesteps; pipelines of Stable Diffusion warn of others
    }
    if schedule["name"] in ("linear", "scaled_linear") and "first_beta" in schedule:
        found |= {
            "trained_betas": None, "beta_schedule": schedule["name"], "beta_start": schedule["first_beta"],
            "beta_end": schedule["last_beta"],
        }  # fmt: skip
    else:
        found["rescale_betas_zero_snr"] = False  # the table is rescaled already
    return found
