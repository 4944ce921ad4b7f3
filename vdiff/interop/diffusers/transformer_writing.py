"""Export of a transformer on latents (SD3, FLUX, PixArt, DiT) as its own pipeline folder of diffusers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from vdiff.diffusion.parameterisation import Flow
from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder, read_json, write_json, write_text, writing
from vdiff.interop.card import license_of_base, new_card, public
from vdiff.interop.diffusers.flow import FLOW_SCHEDULER
from vdiff.interop.diffusers.folders import DAMAGED, INDEX, NOTE
from vdiff.interop.diffusers.latent_pipelines import PIPELINES, T5_LENGTHS, TRANSFORMERS
from vdiff.interop.diffusers.text_writing import PIPELINE, scheduler_settings
from vdiff.interop.usage import transformer_usage
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config
from vdiff.models.codec import LATENTS
from vdiff.models.components import ENCODERS, T5, TOKENIZERS, copy_parts, text_libraries
from vdiff.models.diffusers_names import diffusers_class
from vdiff.models.text import TextBackbone
from vdiff.replacing import check_free, new_folder


def pipeline_of(config: CheckpointConfig) -> str:
    """The class of the pipeline of a transformer on latents; empty for other models."""
    network = config.network_config
    length = network.get("t5_length", 0)
    classes = [
        name
        for name, kind in TRANSFORMERS.items()
        if kind == diffusers_class(network) and T5_LENGTHS.get(name, 0) == length
    ]
    return classes[0] if classes and config.codec == LATENTS.name and config.components is not None else ""


def text_parts(config: CheckpointConfig) -> dict[str, list[str | None]]:
    """Library and class of each text encoder and tokenizer of a pipeline; None for the T5 that an SD3 lacks."""
    found: dict[str, list[str | None]] = {}
    encoders = config.network_config.get("text_encoders", ())
    for k, (part, tokenizer) in enumerate(zip(PIPELINES[pipeline_of(config)], TOKENIZERS, strict=False)):
        kind = encoders[k]["class"] if k < len(encoders) else None
        found[part] = ["transformers" if kind else None, kind]
        found[tokenizer] = [found[part][0], kind and ("T5Tokenizer" if kind == T5 else "CLIPTokenizer")]
    return found


def export_transformer_pipeline(
    checkpoint: Path,
    folder: Path,
    *,
    merge: bool = False,
    components: Path | None = None,
    license_name: str | None = None,
    overwrite: bool = False,
) -> CheckpointConfig:
    """Write a model as a pipeline folder of diffusers, whole or not at all; returns its description.

    The other parts are copies. The scheduler is a `DDIMScheduler` with vdiff's timesteps and prediction, or of a flow a
    `FlowMatchEulerDiscreteScheduler` with its time shift at the size of the pictures.

    Args:
        merge: it is a LoRA, which is merged with its base.
        components: the folder of its components, if it has moved.
        license_name: None: that of the base's pipeline, if its README.md has one.

    Raises:
        VdiffError: the checkpoint cannot be read, is a LoRA without `merge`, or something is in the way.
        OptionError: `merge` for a model that is no LoRA.
    """
    check_free(folder, PIPELINE, overwrite=overwrite, flag="another folder")
    is_lora = read_config(checkpoint).adapter is not None
    if is_lora and not merge:
        raise VdiffError(f"{checkpoint} is a LoRA", "add --merge to merge it into its base")
    if merge and not is_lora:
        raise OptionError(f"--merge: {checkpoint} is not a LoRA: it has all weights", "leave it out")
    denoiser, config = load_checkpoint(checkpoint, components=components)
    root = components or Path(str((config.components or {})["path"]))
    network: Any = denoiser.network
    model: Any = network.unet.model if isinstance(network, TextBackbone) else network.model
    source = read_json(root / INDEX, DAMAGED) if (root / INDEX).is_file() else {}
    with new_folder(folder, PIPELINE, overwrite=overwrite, flag="another folder") as temporary:
        with text_libraries():
            import diffusers

            is_flow = isinstance(config.family, Flow)
            kind = FLOW_SCHEDULER if is_flow else "DDIMScheduler"
            levels = {"num_train_timesteps": denoiser.schedule.label_scale, "shift": config.schedule.get("shift")}
            scheduler: Any = getattr(diffusers, kind)(**(levels if is_flow else scheduler_settings(config)))
            with writing(folder):
                scheduler.save_pretrained(temporary / "scheduler")
                model.save_pretrained(temporary / "transformer")
        copy_parts(root, temporary)
        index = {
            "_class_name": source.get("_class_name", pipeline_of(config)),
            "_diffusers_version": diffusers.__version__,
            **text_parts(config),
            **{key: value for key, value in source.items() if key in ("id2label", *ENCODERS, *TOKENIZERS)},
            "scheduler": ["diffusers", kind],
            "transformer": ["diffusers", type(model).__name__],
            "vae": ["diffusers", "AutoencoderKL"],
        }
        write_text(temporary / INDEX, json.dumps(index, indent=2) + "\n")
        make_folder((temporary / NOTE).parent)
        published = replace(config, components={**(config.components or {}), "path": ".."}, base=None)
        write_json(temporary / NOTE, public(published.to_dict()))
        usage = {INDEX: transformer_usage(folder.resolve().name, config)}
        licence = license_name or license_of_base(config) or "unknown"
        new_card(checkpoint, usage=usage, license_name=licence, library="diffusers").write(temporary)
    return config
