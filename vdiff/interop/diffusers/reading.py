"""A pipeline folder of diffusers, or a model of the hub, as a checkpoint.

model_index.json                            the pipeline's class and parts
unet/config.json                            `UNet2DModel`; in old folders these two are beside model_index.json
unet/diffusion_pytorch_model.safetensors   or with a variant (….fp16.safetensors), or in parts with an index
scheduler/scheduler_config.json             in old folders beside model_index.json
vdiff/config.json                           the checkpoint's description by vdiff, which diffusers ignores
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

from torch import Tensor

from vdiff.diffusion.schedules import build_schedule
from vdiff.errors import OptionError, VdiffError
from vdiff.interop.diffusers.scheduler import agree, read_prediction, read_schedule, read_table, remarks
from vdiff.interop.diffusers.unet import (
    ONLY,
    READ,
    current_name,
    read_unet_config,
    read_unet_weights,
    unet_shapes,
    write_unet_config,
)
from vdiff.interop.foreign import IMPORTED_MODEL, JsonFile, write_model
from vdiff.models.checkpoint import IMPORTED, CheckpointConfig, read_config, read_tensors
from vdiff.models.reading import read_shapes
from vdiff.models.unet_config import UNetConfig
from vdiff.network import hub_answers
from vdiff.replacing import check_free
from vdiff.text import cause_of

INDEX = "model_index.json"
CONFIG = "config.json"
SCHEDULER = "scheduler_config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
WEIGHTS_PATTERN = "diffusion_pytorch_model*.safetensors"
"""File names of weights, with variants and parts."""
PARTS_PATTERN = "diffusion_pytorch_model.safetensors.index*.json"
"""File names of the indices that assign tensors to parts."""
NOTE = f"vdiff/{CONFIG}"
FILES = [INDEX, SCHEDULER, f"scheduler/{SCHEDULER}", NOTE]
FILES += [f"{place}{name}" for place in ("", "unet/") for name in (CONFIG, WEIGHTS_PATTERN, PARTS_PATTERN)]
"""All files that are read or downloaded: JSON and safetensors, no pickles."""
PIPELINES = ["DDIMPipeline", "DDPMPipeline", "PNDMPipeline"]
NOT_THEIRS = "give a folder that diffusers' save_pretrained wrote, or OWNER/NAME of the hub"
DAMAGED = "copy or download it again"


@dataclass(frozen=True)
class Imported:
    """The checkpoint's description, and a sentence for each reason why the pipeline draws other images than vdiff."""

    config: CheckpointConfig
    remarks: list[str]


def import_pipeline(
    source: str, folder: Path, *, num_timesteps: int | None = None, overwrite: bool = False
) -> Imported:
    """Write a pipeline of a `UNet2DModel` and a scheduler as a checkpoint, whole or not at all.

    A folder that vdiff exported keeps its description (steps, classes, lineage); others become a base model.

    Args:
        source: a folder, or OWNER/NAME of the hub.
        num_timesteps: default number of sampling steps; None: as many as in training.

    Raises:
        VdiffError: `source` is not such a pipeline, or vdiff does not support it; the folder exists or cannot be
            written.
        OptionError: the model has too few levels for this number of steps.
    """
    check_free(folder, IMPORTED_MODEL, overwrite=overwrite)
    root, name = _find(source)
    scheduler, unet = _open(root)
    notes, config = remarks(scheduler) + unet.unknown(ONLY.keys() | READ), None
    if (root / NOTE).exists():
        try:
            config = _own_description(root, scheduler, unet, name)
        except (VdiffError, ValueError) as error:
            notes.append(f"{root / NOTE} is ignored: {error}")
    config = config or _base_model(scheduler, unet, name)
    if num_timesteps is not None:
        try:
            config.check_num_steps(num_timesteps)
        except ValueError as error:
            raise OptionError(f"--num_timesteps {num_timesteps}: {error}", "give fewer") from None
        config = replace(config, num_timesteps=num_timesteps)
    shape = UNetConfig.from_dict(config.unet)
    files = _weights_files(Path(unet.where).parent)
    if "." in files[0].name.removesuffix(".safetensors"):
        notes.append(f"its weights are the variant {files[0].name}, which may be rounded")
    tensors = _read_tensors(files, unet_shapes(shape))
    weights = read_unet_weights(shape, tensors, sines_first=not unet.flag("flip_sin_to_cos", True))
    write_model(folder, weights, config, overwrite=overwrite)
    return Imported(config, notes)


def fetch(name: str) -> Path:
    """The local folder of a hub's model, `OWNER/NAME`; its JSON and safetensors are downloaded if they are missing.

    Raises:
        VdiffError: the hub cannot be reached or refuses the model.
    """
    is_there = hub_answers()
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=FILES))
    except Exception as error:  # the type depends on the versions of huggingface_hub and of its HTTP library
        raise VdiffError(
            f"{name}: no such folder, and the hub does not "
            + (f"provide it ({cause_of(error)})" if is_there else "answer"),
            "check the name and the network (private models need HF_TOKEN), or give a folder",
        ) from None


def _find(source: str) -> tuple[Path, str]:
    """The folder of `source`, and its name for the checkpoint's description."""
    root = Path(source)
    if root.is_dir():
        return root, root.resolve().name
    if root.exists():
        raise VdiffError(f"{source} is a file", NOT_THEIRS)
    owner, _, name = source.partition("/")
    if not owner or not name or "/" in name or owner.startswith((".", "~")):
        raise VdiffError(f"{source}: no such folder", NOT_THEIRS)
    return fetch(source), source


def _open(root: Path) -> tuple[JsonFile, JsonFile]:
    """The configurations of scheduler and network."""
    if not (root / INDEX).exists():
        raise VdiffError(f"{root} holds no {INDEX}", NOT_THEIRS)
    index = JsonFile.read(root / INDEX, DAMAGED)
    index.word("_class_name", "", PIPELINES)
    if index.get("unet") != ["diffusers", "UNet2DModel"]:
        raise index.refusal("unet", "only UNet2DModel of diffusers can be read")
    parts = []
    for part, file in (("scheduler", SCHEDULER), ("unet", CONFIG)):
        place = root / part if (root / part).is_dir() else root
        parts.append(JsonFile.read(place / file, DAMAGED))
    return parts[0], parts[1]


def _base_model(scheduler: JsonFile, unet: JsonFile, name: str) -> CheckpointConfig:
    """The description of a model that another program trained."""
    schedule, prediction = read_schedule(scheduler), read_prediction(scheduler)
    shape, image_size = read_unet_config(unet)
    return CheckpointConfig(
        unet=shape.to_dict(),
        schedule=schedule.to_dict(),
        prediction=prediction,
        num_timesteps=schedule.label_scale,
        image_size=image_size,
        method="base",
        weights="raw",
        num_iters=0,
        target_iters=0,
        num_images=0,
        dataset=f"{IMPORTED}diffusers/{name}",
        dataset_fingerprint="",
        class_names=[str(k) for k in range(shape.num_classes)],
    )


def _own_description(root: Path, scheduler: JsonFile, unet: JsonFile, name: str) -> CheckpointConfig:
    """The original description of a checkpoint that vdiff exported."""
    own = read_config((root / NOTE).parent)
    shape = UNetConfig.from_dict(own.unet)
    said = write_unet_config(shape, own.image_size)
    if any(unet.values.get(key) != value for key, value in said.items()):
        raise ValueError(f"it describes another network than {unet.where}")
    read_unet_config(unet)
    betas = read_table(scheduler) or []
    if own.prediction != read_prediction(scheduler) or not agree(build_schedule(own.schedule), betas):
        raise ValueError(f"it describes another schedule or prediction than {scheduler.where}")
    own.check_num_steps(own.num_timesteps)
    if len(own.class_names) != shape.num_classes:
        raise ValueError(f"it names only {len(own.class_names)} of {shape.num_classes} classes")
    imported = f"{IMPORTED}diffusers/{name}, trained by vdiff on {own.dataset}"
    return replace(own, dataset=own.dataset if own.is_imported else imported)


def _weights_files(folder: Path) -> list[Path]:
    """The safetensors files of the network: one, or its parts; of several variants, the plain one."""
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    indices = sorted(folder.glob(PARTS_PATTERN))
    found = [path for path in sorted(folder.glob(WEIGHTS_PATTERN)) if "-of-" not in path.name]
    if indices and (len(indices) == 1 or indices[0].name == f"{WEIGHTS}.index.json"):
        index = JsonFile.read(indices[0], DAMAGED)
        parts = index.get("weight_map")
        names = sorted(set(map(str, parts.values()))) if isinstance(parts, dict) else []
        if not names or not all(fnmatch(name, WEIGHTS_PATTERN) and Path(name).name == name for name in names):
            raise index.refusal("weight_map", f"need names of the form {WEIGHTS_PATTERN}")
        found = [folder / name for name in names]
    elif not found:
        raise VdiffError(
            f"{folder / WEIGHTS} is missing",
            "vdiff never reads weights in pickles (.bin): save the pipeline again as safetensors, with diffusers",
        )
    elif len(found) > 1:
        raise VdiffError(f"{folder} has {' and '.join(path.name for path in found)}", f"rename one to {WEIGHTS}")
    return found


def _read_tensors(files: Sequence[Path], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of safetensors files, after checking that their names and shapes are `shapes`."""
    found = {current_name(name): shape for path in files for name, shape in read_shapes(path).items()}
    if difference := _difference(shapes, found):
        raise VdiffError(f"{files[0]} does not fit {CONFIG}: {difference}", DAMAGED)
    return {current_name(name): tensor for path in files for name, tensor in read_tensors(path).items()}


def _difference(expected: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]) -> str:
    """Why `found` does not fit, in a few words; empty if it fits."""
    for count, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            return f"{len(names)} tensors {count} ({min(names)[:80]}, …)"
    for name, shape in expected.items():
        if found[name] != shape:
            return f"{name} is {found[name]}, not {shape}"
    return ""
