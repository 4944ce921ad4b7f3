"""A LoRA as other tools load it: a file in the layout of diffusers or of kohya's scripts, or a folder of peft."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.errors import OptionError, VdiffError, shell
from vdiff.files import write_text
from vdiff.interop.card import FILES_OF_CARD, card_beside, license_of_base
from vdiff.interop.modelspec import MADE_BY, differs_from_usual, family_of, is_student, metadata_of
from vdiff.interop.usage import encoder_names, lora_usage
from vdiff.models.adapters import AdapterSettings
from vdiff.models.checkpoint import (
    ADAPTER,
    TEXT_ENCODERS,
    CheckpointConfig,
    is_checkpoint,
    read_config,
    read_metadata,
    read_tensors,
    write_tensors,
)
from vdiff.models.diffusers_names import DIT, PIXART, diffusers_class, diffusers_part
from vdiff.models.kinds import DIFFUSERS, TEXT
from vdiff.replacing import Kind, check_free, locked, new_folder

if TYPE_CHECKING:
    from torch import Tensor

PEFT, KOHYA, BOTH = "peft", "kohya", "both"
PREFIXES = {TEXT: "network.unet.model.", DIFFUSERS: "network.model."}
"""Our prefix to diffusers' names of layers, by the kind of the network."""
ENCODERS = f"{TEXT_ENCODERS}."
TEXT_MODEL = "text_model."
CARD_OPTIONS: dict[str, Any] = {"anew": False, "tags": ["lora"]}
PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FILE = Kind("LoRA", lambda path: path.name if MADE_BY.items() <= read_metadata(path).items() else "")
FOLDER = Kind(
    "LoRA of peft",
    lambda path: (
        f"(unet|transformer|text_encoder(_one|_two)?)/({PEFT_CONFIG}|{PEFT_WEIGHTS})|{FILES_OF_CARD}"
        if any((file := path / part / PEFT_WEIGHTS).is_file() and FILE.files(file) for part in ("unet", "transformer"))
        else ""
    ),
)


@dataclass(frozen=True)
class ExportedLora:
    """An exported LoRA.

    Attributes:
        config: the checkpoint's description.
        files: the files, or the folder of peft.
        notes: a sentence for each reason why a program needs a setting to generate the right images.
    """

    config: CheckpointConfig
    files: list[Path]
    notes: list[str]


@dataclass(frozen=True)
class LoraPart:
    """The LoRA of the UNet or transformer, or of a text encoder.

    Attributes:
        name: that of the part in a pipeline of diffusers.
        folder: its folder in the layout of peft.
        kohya: the beginning of its names in kohya's layout.
        model: what diffusers and kohya's scripts put before the name of a layer.
        peft: what the module of transformers has there.
        tensors: the weights, `LAYER.lora_A.weight`.
    """

    name: str
    folder: str
    kohya: str
    tensors: dict[str, Tensor]
    model: str = ""
    peft: str = ""


def parts_of(config: CheckpointConfig, tensors: dict[str, Tensor]) -> Iterator[LoraPart]:
    """The parts of a LoRA by the names that other tools give to them."""
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODERS)}
    network = diffusers_part(config.network_config)
    yield LoraPart(network, network, f"lora_{network}", own)
    encoders = config.network_config.get("text_encoders", [])
    for number, (described, (name, folder)) in enumerate(zip(encoders, encoder_names(config), strict=True)):
        prefix = f"{ENCODERS}{number}."
        own = {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}
        kohya = f"lora_te{number + 1 if len(encoders) > 1 else ''}"
        is_flat = described["class"] == "CLIPTextModel"  # in transformers from 5 on
        if own:
            yield LoraPart(name, folder, kohya, own, TEXT_MODEL, "" if is_flat else TEXT_MODEL)


def read_lora(checkpoint: Path) -> tuple[CheckpointConfig, AdapterSettings, list[LoraPart]]:
    """A checkpoint, its LoRA, and the weights by the names that diffusers gives to the layers.

    Raises:
        VdiffError: the checkpoint is no LoRA, or not of a network of diffusers.
    """
    config = read_config(checkpoint)
    if config.adapter is None:
        raise VdiffError(f"{checkpoint} is not a LoRA: {why_whole(config)}", _how_to_export_whole(checkpoint, config))
    if (prefix := PREFIXES.get(config.kind)) is None:
        raise VdiffError(
            f"{checkpoint} is a LoRA of a network that other tools do not have",
            "vdiff export weights merges it with its base",
        )
    tensors = read_tensors(checkpoint / ADAPTER)
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return config, config.adapter, list(parts_of(config, named))


def why_whole(config: CheckpointConfig) -> str:
    """Why a model has all weights: a LoRA could not be such a student, or no LoRA was requested."""
    if config.guidance_range:
        return "it takes the guidance as an input, which no LoRA can add to its base"
    first: dict[str, Any] = config.to_dict()
    while teacher := first.get("teacher"):
        first = teacher
    if first["prediction"] == "eps" and config.prediction != "eps":
        few = " so as to draw in 1 step" * (config.num_timesteps == 1)
        return f"it predicts {config.prediction}{few}, its first teacher eps, and programs would read a LoRA's as eps"
    return "it has all weights, as it was trained without --lora_rank"


def _how_to_export_whole(checkpoint: Path, config: CheckpointConfig) -> str:
    """The commands that write a model whole, a LoRA merged with its base."""
    merge = ["--merge"] if config.adapter else []
    folder = shell("vdiff", "export", "diffusers", checkpoint, "FOLDER", *merge)
    if family_of(config) is None or config.guidance_range:
        return f"export it whole: {folder}"
    file = shell("vdiff", "export", "single_file", checkpoint, "FILE.safetensors", *merge)
    return f"export it whole: {file}, or {folder}"


def base_of(config: CheckpointConfig) -> CheckpointConfig | None:
    """The description of a LoRA's base; None if its folder is not there."""
    folder = Path(str((config.base or {}).get("path")))
    return read_config(folder) if is_checkpoint(folder) else None


def check_student(checkpoint: Path, config: CheckpointConfig, base: CheckpointConfig | None) -> None:
    """Refuse a student that works only whole, because programs read a LoRA with the settings of its base.

    Raises:
        VdiffError: it is such a student.
    """
    if not is_student(config):
        return
    if base is None:
        path = (config.base or {}).get("path")
        raise VdiffError(f"{path}, the base of {checkpoint}: no such checkpoint", "put the base back there")
    whole = _how_to_export_whole(checkpoint, config)
    if config.guidance_range and not base.guidance_range:
        raise VdiffError(f"{checkpoint} takes the guidance as an input, which no LoRA can add to its base", whole)
    if base.prediction == "eps" and config.prediction != "eps":
        raise VdiffError(
            f"{checkpoint} predicts {config.prediction}, its base eps: programs would read the LoRA's output as eps",
            whole,
        )
    if base.prediction == "eps" and config.num_timesteps == 1:
        raise VdiffError(
            f"{checkpoint} draws in one step and predicts eps, which says nothing about the image at pure noise", whole
        )


def notes_of(config: CheckpointConfig, base: CheckpointConfig | None) -> Iterator[str]:
    """A sentence for each reason why a program needs a setting to generate the right images."""
    if base is not None and base.adapter is not None:
        yield f"its base {(config.base or {}).get('path')} is a LoRA itself: load both, or export both merged"
    mine = (config.prediction, bool(config.schedule.get("zero_snr")))
    if base is not None and mine != (base.prediction, bool(base.schedule.get("zero_snr"))):
        yield (
            f"it predicts {mine[0]}{' with zero terminal SNR' * mine[1]}, other than its base: programs take a LoRA's "
            "prediction from the base, so set it as README.md says"
        )
    levels = config.schedule.get("num_levels")
    if is_student(config) and isinstance(levels, int) and levels % config.num_timesteps:
        yield f"{config.num_timesteps} steps do not divide {levels} levels: other programs round its timesteps"
    if family_of(config) is not None and differs_from_usual(config.schedule):
        yield "ComfyUI and A1111 assume other noise levels than this model's"


def peft_config(settings: AdapterSettings, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """`adapter_config.json` of peft; layers are named in full."""
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    return {
        "peft_type": "LORA", "r": settings.rank, "lora_alpha": settings.alpha, "lora_dropout": settings.dropout,
        "target_modules": layers, "bias": "none", "inference_mode": True, "base_model_name_or_path": None,
    }  # fmt: skip


def kohya_layout(part: LoraPart, alpha: float) -> dict[str, Tensor]:
    """The weights by the names of kohya's scripts, which ComfyUI and A1111 load, and alpha beside each pair.

    `mid_block.attentions.0.proj_in.lora_A.weight` becomes `lora_unet_mid_block_attentions_0_proj_in.lora_down.weight`.
    """
    import torch

    found: dict[str, Tensor] = {}
    for name, tensor in part.tensors.items():
        layer, _, matrix = f"{part.model}{name}".rpartition(".lora_")
        plain = f"{part.kohya}_{layer.replace('.', '_')}"
        found[f"{plain}.lora_{'down' if matrix.startswith('A') else 'up'}.weight"] = tensor
        found[f"{plain}.alpha"] = torch.tensor(alpha)
    return found


def files_of_export(target: Path, layout: str, name: str, config: CheckpointConfig) -> dict[Path, str]:
    """The files to write, and the layout of each.

    Args:
        target: a `.safetensors` file, or a folder, in which a file gets the name of the checkpoint.

    Raises:
        OptionError: `target` is neither.
    """
    if target.suffix == ".safetensors":
        file = target
    elif target.is_dir() or not target.suffix:
        steps = f"_{config.num_timesteps}step" if is_student(config) else ""
        file = target / f"{name}{steps}_lora.safetensors"
    else:
        raise OptionError(
            f"{target} is not a name for a LoRA", "give FILE.safetensors or a folder, or --format peft with a folder"
        )
    if layout == BOTH:
        return {file: DIFFUSERS, file.with_stem(f"{file.stem}_kohya"): KOHYA}
    return {file: layout}


def export_lora(
    checkpoint: Path,
    target: Path,
    layout: str,
    *,
    license_name: str | None = None,
    card: bool = True,
    overwrite: bool = False,
) -> ExportedLora:
    """Write the LoRA of a checkpoint, whole or not at all.

    Args:
        target: for the layout "diffusers", which `pipeline.load_lora_weights` loads, for "kohya", which ComfyUI and
            A1111 load, and for "both": a `.safetensors` file, or the folder to write it to. For "peft": a new folder,
            whose `unet/` `PeftModel.from_pretrained` loads.
        license_name: None: that of the base's pipeline, if its README.md has one.
        card: write README.md beside the file, or into the folder of peft.

    Raises:
        VdiffError: the checkpoint is no LoRA of a network of diffusers, it is a student that works only whole, or
            `target` cannot be written.
    """
    config, settings, parts = read_lora(checkpoint)
    base, name = base_of(config), checkpoint.resolve().name
    check_student(checkpoint, config, base)
    if layout in (KOHYA, BOTH) and family_of(config) is None:
        raise VdiffError(
            f"{checkpoint} is not a LoRA of Stable Diffusion, and kohya's layout is only for those",
            "give --format diffusers or peft",
        )
    if layout == DIFFUSERS and (name_of := diffusers_class(config.network_config)) in (DIT, PIXART):
        raise VdiffError(f"diffusers loads no LoRA file into a {name_of}", "give --format peft")
    licence = license_name or license_of_base(config)
    notes = list(notes_of(config, base))
    described = {part.name: peft_config(settings, part.tensors) for part in parts}
    if layout == PEFT:
        with new_folder(target, FOLDER, overwrite=overwrite, flag="another folder") as temporary:
            metadata = metadata_of(config, name, license_name=licence, implementation=DIFFUSERS)
            for part in parts:
                (temporary / part.folder).mkdir()
                named = {f"base_model.model.{part.peft}{key}": tensor for key, tensor in part.tensors.items()}
                write_tensors(temporary / part.folder / PEFT_WEIGHTS, named, metadata)
                # without a checksum: peft warns of keys that it does not know
                write_text(temporary / part.folder / PEFT_CONFIG, json.dumps(described[part.name], indent=2) + "\n")
            if card:
                pages = {parts[0].folder: lora_usage(target.name, PEFT, config)}
                card_beside(temporary, checkpoint, usage=pages, license_name=licence, **CARD_OPTIONS).write(temporary)
        return ExportedLora(config, [target], notes)
    files = files_of_export(target, layout, name, config)
    with ExitStack() as stack:
        for file in files:
            stack.enter_context(locked(file))
            check_free(file, FILE, overwrite=overwrite, flag="another file")
        folder = next(iter(files)).parent
        pages = {file.name: lora_usage(file.name, kind, config) for file, kind in files.items()}
        options = {**CARD_OPTIONS, "anew": overwrite}
        page = card_beside(folder, checkpoint, usage=pages, license_name=licence, **options) if card else None
        folder.mkdir(parents=True, exist_ok=True)
        for file, kind in files.items():
            metadata = metadata_of(config, file.stem, license_name=licence, implementation=kind)
            if kind == DIFFUSERS:
                kept = ("r", "lora_alpha", "lora_dropout", "target_modules", "bias")
                notes_of_parts = {f"{part}.{key}": values[key] for part, values in described.items() for key in kept}
                metadata["lora_adapter_metadata"] = json.dumps(notes_of_parts)
                named = {f"{part.name}.{part.model}{key}": x for part in parts for key, x in part.tensors.items()}
                write_tensors(file, named, metadata)
            else:
                named = {key: x for part in parts for key, x in kohya_layout(part, settings.alpha).items()}
                write_tensors(file, named, metadata)
        if page is not None:
            page.write(folder)
    return ExportedLora(config, list(files), notes)
