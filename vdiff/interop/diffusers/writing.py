"""A checkpoint as a `DDIMPipeline` folder."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.files import make_folder, write_json, write_text
from vdiff.interop.card import CARD, FILES_OF_CARD, is_card, new_card, public
from vdiff.interop.diffusers.reading import CONFIG, INDEX, NOTE, SCHEDULER, WEIGHTS
from vdiff.interop.diffusers.scheduler import write_scheduler_config
from vdiff.interop.diffusers.unet import write_unet_config, write_unet_weights
from vdiff.interop.usage import diffusers_usage
from vdiff.models.checkpoint import CheckpointConfig, is_checkpoint, load_checkpoint, write_tensors
from vdiff.models.unet import GUIDANCE_SCALE, UNet, timestep_embedding
from vdiff.replacing import Kind, check_free, new_folder

DIFFUSERS_VERSION = "0.32.0"
"""The oldest version that the written folders are meant for."""
NO_CLASS = "none"


def _files_of_pipeline(folder: Path) -> str:
    written = "|".join(map(re.escape, (INDEX, f"scheduler/{SCHEDULER}", f"unet/{CONFIG}", f"unet/{WEIGHTS}", NOTE)))
    card = f"|{FILES_OF_CARD}" if is_card(folder / CARD) else ""
    return written + card if is_checkpoint((folder / NOTE).parent) else ""


PIPELINE = Kind("pipeline", _files_of_pipeline)


@dataclass(frozen=True)
class Exported:
    """What was written, and how diffusers draws with it.

    Attributes:
        config: the checkpoint's description, as far as it holds for what was written.
        call: the arguments with which the pipeline draws our images; empty where it needs a class,
            which it cannot.
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
        clip: clip x̂ to ±1 in every step, as `ddim` does. The pipeline then has to be called with
            `use_clipped_model_output=True`. Without a clip it draws what `ddim` without a clip does, called plainly.
        class_name: of a class-conditional network the one class that is drawn ("none": no class); None: the network
            takes a class at each call.
        guidance: of a network that takes a weight of guidance, the one weight that it takes.
        license_name: what the model card says of the licence; None: no card is written.

    Raises:
        VdiffError: diffusers does not support something in the checkpoint; the checkpoint cannot be read; the folder
            exists or cannot be written.
        OptionError: a class or a weight that the network does not know.
    """
    check_free(folder, PIPELINE, overwrite=overwrite, flag="another folder")
    denoiser, config = load_checkpoint(checkpoint)
    if not isinstance(denoiser.network, UNet):
        raise VdiffError(
            f"{checkpoint} holds a network of kind {config.kind}, and only vdiff's UNet is written in diffusers' form",
            "take its own weights, in model.safetensors",
        )
    levels = denoiser.schedule.label_scale
    if not config.takes_any_num_steps and levels % config.num_timesteps:
        raise VdiffError(
            f"diffusers cannot take {config.num_timesteps} equal steps among {levels} timesteps",
            "distil to a number of steps that divides them",
        )
    scheduler = write_scheduler_config(denoiser.schedule, config.prediction, clip=clip)
    network, config = _fixed(denoiser.network, config, class_name, guidance)
    unet = write_unet_config(network.config, config.image_size)
    steps = {"num_inference_steps": config.num_timesteps}
    call = {} if unet["num_class_embeds"] else steps | ({"use_clipped_model_output": True} if clip else {})
    with new_folder(folder, PIPELINE, overwrite=overwrite, flag="another folder") as temporary:
        for file in (f"unet/{CONFIG}", f"scheduler/{SCHEDULER}", NOTE):
            make_folder((temporary / file).parent)
        _write_json(temporary / INDEX, "DDIMPipeline", _parts("DDIMScheduler", "UNet2DModel"))
        _write_json(temporary / "scheduler" / SCHEDULER, "DDIMScheduler", scheduler)
        _write_json(temporary / "unet" / CONFIG, "UNet2DModel", unet)
        weights = write_unet_weights(network.config, network.state_dict())
        write_tensors(temporary / "unet" / WEIGHTS, weights, {"format": "pt"})
        write_json(temporary / NOTE, public(asdict(config)))
        if license_name is not None:
            usage = {INDEX: diffusers_usage(folder.resolve().name, config, call, clip=clip)}
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
    """The network for one class and one weight of guidance, and its description; as they are where none is given.

    The network adds their embeddings to the embedding of the time, so a class and a weight that stay the same
    go into the last bias of that embedding.
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
            raise OptionError("--guidance: this network takes no weight of guidance", "leave it out")
        low, high = config.guidance_range or [guidance, guidance]
        if not low <= guidance <= high:
            raise OptionError(f"--guidance {guidance}: the network was taught {low} to {high}", "give one of these")
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
        raise OptionError("--class: this network knows no classes", "leave it out")
    if name in names:
        return names.index(name)
    if name.isdecimal() and int(name) < count:
        return int(name)
    if name == NO_CLASS and null_class:
        return count
    raise OptionError(f"--class: no class {name!r}", suggestion(name, [*names, *[NO_CLASS] * null_class]))
