"""Export of a checkpoint as a `DDIMPipeline` folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.diffusion.parameterisation import Edm, Flow
from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.files import make_folder, write_json, write_text
from vdiff.interop.card import CARD, FILES_OF_CARD, is_card, new_card, public
from vdiff.interop.diffusers.flow import FLOW_SCHEDULER, write_flow
from vdiff.interop.diffusers.folders import CONFIG, INDEX, NOTE, SCHEDULER, WEIGHTS
from vdiff.interop.diffusers.scheduler import write_scheduler_config
from vdiff.interop.diffusers.unet import write_unet_config, write_unet_weights
from vdiff.interop.usage import diffusers_usage
from vdiff.models.checkpoint import CheckpointConfig, is_checkpoint, load_checkpoint, write_tensors
from vdiff.models.unet import GUIDANCE_SCALE, UNet, timestep_embedding
from vdiff.replacing import Kind, check_free, new_folder

DIFFUSERS_VERSION = "0.32.0"
"""The oldest supported version of diffusers for exported folders."""
NO_CLASS = "none"


def _files_of_pipeline(folder: Path) -> str:
    written = "|".join(map(re.escape, (INDEX, f"scheduler/{SCHEDULER}", f"unet/{CONFIG}", f"unet/{WEIGHTS}", NOTE)))
    card = f"|{FILES_OF_CARD}" if is_card(folder / CARD) else ""
    return written + card if is_checkpoint((folder / NOTE).parent) else ""


PIPELINE = Kind("pipeline", _files_of_pipeline)


@dataclass(frozen=True)
class Exported:
    """The exported folder, and how diffusers samples with it.

    Attributes:
        config: the checkpoint's description, as far as it applies to the export.
        call: the arguments with which the pipeline draws vdiff's images; empty if the network needs a class, which the
            pipeline does not support.
    """

    config: CheckpointConfig
    call: dict[str, Any]


def export_pipeline(
    checkpoint: Path,
    folder: Path,
    *,
    clip: bool = True,
    class_name: str | None = None,
    guidance: float | None = None,
    license_name: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a checkpoint as a pipeline folder, whole or not at all.

    Args:
        clip: clip x̂ to ±1 in every step, as `ddim` does; the pipeline then must be called with
            `use_clipped_model_output=True`. Without it, a plain call of the pipeline equals `ddim` without a clip.
        class_name: fixes the class of a class-conditional network ("none": no class); None: the network receives a
            class at each call.
        guidance: fixes the guidance weight of a network that takes one.
        license_name: the licence in the model card; None: no card is written.

    Raises:
        VdiffError: diffusers does not support the checkpoint, the checkpoint cannot be read, or the folder exists or
            cannot be written.
        OptionError: the network does not have the class or the weight.
    """
    check_free(folder, PIPELINE, overwrite=overwrite, flag="another folder")
    denoiser, config = load_checkpoint(checkpoint)
    if not isinstance(denoiser.network, UNet):
        raise VdiffError(
            f"{checkpoint} holds a network of kind {config.kind}; only vdiff's UNet can be exported to diffusers",
            "use its weights directly, in model.safetensors",
        )
    levels, family = denoiser.schedule.label_scale, denoiser.parameterisation
    if isinstance(family, Edm):
        raise VdiffError(
            "diffusers has no pipeline of a UNet2DModel that scales its input, as edm does",
            "export to ONNX or torch.export",
        )
    pipeline, kind = ("DDPMPipeline", FLOW_SCHEDULER) if isinstance(family, Flow) else ("DDIMPipeline", "DDIMScheduler")
    if kind == "DDIMScheduler" and not config.takes_any_num_steps and levels % config.num_timesteps:
        raise VdiffError(
            f"diffusers cannot place {config.num_timesteps} equal steps on {levels} timesteps",
            "distil to a number of steps that divides them",
        )
    if kind == FLOW_SCHEDULER:
        scheduler = write_flow(denoiser, config, clip=clip)
    else:
        scheduler = write_scheduler_config(denoiser.schedule, config.prediction, clip=clip)
    network, config = _fixed(denoiser.network, config, class_name, guidance)
    unet = write_unet_config(network.config, config.image_size)
    steps = {"num_inference_steps": config.num_timesteps}
    call = {} if unet["num_class_embeds"] else steps | ({"use_clipped_model_output": True} if clip else {})
    with new_folder(folder, PIPELINE, overwrite=overwrite, flag="another folder") as temporary:
        for file in (f"unet/{CONFIG}", f"scheduler/{SCHEDULER}", NOTE):
            make_folder((temporary / file).parent)
        _write_json(temporary / INDEX, pipeline, _parts(kind, "UNet2DModel"))
        _write_json(temporary / "scheduler" / SCHEDULER, kind, scheduler)
        _write_json(temporary / "unet" / CONFIG, "UNet2DModel", unet)
        weights = write_unet_weights(network.config, network.state_dict())
        write_tensors(temporary / "unet" / WEIGHTS, weights, {"format": "pt"})
        write_json(temporary / NOTE, public(asdict(config)))
        if license_name is not None:
            usage = {INDEX: diffusers_usage(folder.resolve().name, config, call, pipeline=pipeline, clip=clip)}
            card = new_card(checkpoint, usage=usage, license_name=license_name, library="diffusers")
            card.write(temporary)
    return Exported(config, call)


def _parts(scheduler: str, unet: str) -> dict[str, list[str]]:
    return {"scheduler": ["diffusers", scheduler], "unet": ["diffusers", unet]}


def _write_json(path: Path, class_name: str, values: Mapping[str, Any]) -> None:
    written = {"_class_name": class_name, "_diffusers_version": DIFFUSERS_VERSION, **values}
    write_text(path, json.dumps(written, indent=2) + "\n")


def _fixed(
    network: UNet, config: CheckpointConfig, class_name: str | None, guidance: float | None
) -> tuple[UNet, CheckpointConfig]:
    """The network for a fixed class and guidance weight, if given, and its description.

    The network adds their embeddings to the time embedding, so a fixed class and a fixed weight become part of that
    embedding's last bias.
    """
    shape, added = network.config, list[Tensor]()
    if class_name is not None:
        row = _class_row(shape.num_classes, config.class_names, class_name, null_class=shape.null_class)
        assert network.embed_class is not None
        added.append(network.embed_class.weight[row])
        shape = replace(shape, num_classes=0, null_class=False)
        config = replace(config, class_names=[])
    if guidance is not None:
        if network.embed_guidance is None:
            raise OptionError("--guidance: this network does not take a guidance weight", "leave it out")
        low, high = config.guidance_range or [guidance, guidance]
        if not low <= guidance <= high:
            raise OptionError(f"--guidance {guidance}: the network supports {low} to {high}", "give one of these")
        weight = timestep_embedding(torch.tensor([GUIDANCE_SCALE * guidance]), shape.channels)
        added.append(network.embed_guidance(weight)[0])
        shape = replace(shape, guidance_input=False)
        config = replace(config, guidance_range=[])
    if not added:
        return network, config
    fixed = UNet(shape)
    names = fixed.state_dict().keys()
    weights = {name: tensor for name, tensor in network.state_dict().items() if name in names}
    weights["embed.2.bias"] = weights["embed.2.bias"] + torch.stack(added).sum(0).detach()
    fixed.load_state_dict(weights)
    return fixed, replace(config, unet=shape.to_dict())


def _class_row(count: int, names: list[str], name: str, *, null_class: bool) -> int:
    """The row of a class in the table of classes: by name, by number, or the last one for "no class"."""
    if not count:
        raise OptionError("--class: this network has no classes", "leave it out")
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < count:
        return int(name)
    if name == NO_CLASS and null_class:
        return count
    raise OptionError(f"--class: unknown class {name!r}", suggestion(name, [*names, *[NO_CLASS] * null_class]))
