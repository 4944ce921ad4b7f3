"""Pipelines of latents as checkpoints: Stable Diffusion 1.5, 2, XL and DiT, folders of diffusers and single files.

unet/ or transformer/                 the network that the checkpoint holds
scheduler/scheduler_config.json       its noise levels, and what it predicts
vae/ text_encoder/ tokenizer/ …       the checkpoint's components, see `vdiff.models.components`
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vdiff.diffusion.schedules import Schedule
from vdiff.errors import VdiffError, explained
from vdiff.files import remove, writing
from vdiff.interop.diffusers.folders import (
    CONFIG,
    DAMAGED,
    DESCRIPTIONS,
    INDEX,
    fetch,
    find,
    read_weights,
    weights_files,
)
from vdiff.interop.diffusers.scheduler import PREDICTIONS
from vdiff.interop.foreign import IMPORTED_MODEL, JsonFile, imported_fields
from vdiff.interop.modelspec import FAMILIES, LEARNED
from vdiff.interop.modelspec import STEPS as STUDENT_STEPS
from vdiff.interop.recognition import V_KEY, ZERO_SNR_KEY, recognise, statements
from vdiff.models.autoencoder import Autoencoder, picture_shape
from vdiff.models.checkpoint import COPIED, CheckpointConfig, save_checkpoint
from vdiff.models.codec import LATENTS
from vdiff.models.components import (
    ENCODERS,
    TOKENIZERS,
    VAE,
    components_fingerprint,
    copy_parts,
    read_encoder,
    text_libraries,
)
from vdiff.models.condition import POOLED
from vdiff.models.kinds import DIFFUSERS, TEXT
from vdiff.models.reading import read_shapes, reading
from vdiff.models.text import TextBackbone
from vdiff.models.tokenizing import Tokenizers
from vdiff.models.wrapped import DIT, TEXT_UNET, DiffusersBackbone, build_diffusers
from vdiff.replacing import locked, new_folder

PIPELINES = {"StableDiffusionPipeline": ENCODERS[:1], "StableDiffusionXLPipeline": ENCODERS, "DiTPipeline": ()}
"""Classes of pipelines that can be read, and their text encoders."""
TRANSFORMERS = {"DiTPipeline": DIT}
"""Classes of pipelines whose network is a transformer, and the class of that."""
FIRST_NAME = "Transformer2DModel"
"""The class of all transformers in the files of 2023."""
STEPS = 50
"""Sampling steps of an imported checkpoint, as of diffusers' pipelines."""
HUB_NAMES = {family.width: family.hub for family in FAMILIES}
"""Channels of the text that a UNet in a single file takes, and whose configurations and tokenizers the file needs."""
TEXT_KEY = "model.diffusion_model.input_blocks.{}.1.transformer_blocks.0.attn2.to_k.weight"
"""A tensor of single files whose second size are these channels: of XL with the number 4, else 1."""
KEYS = (V_KEY, ZERO_SNR_KEY)
"""Empty tensors in weights, which say what the network predicts, and that its betas were rescaled."""
GIVE_PIPELINE = (
    "give --pipeline FOLDER: a pipeline of the same architecture, of which configurations and tokenizers are taken"
)


@dataclass(frozen=True)
class WeightsNote:
    """What a safetensors file says about its model; None or False: nothing.

    `v_pred` and `ztsnr` are empty tensors that some programs write; others write the metadata of `modelspec`.

    Attributes:
        student: of a student that vdiff exported, the fields of its checkpoint; empty for other models.
    """

    where: str
    prediction: str | None = None
    zero_snr: bool = False
    student: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> WeightsNote:
        """The note in a file.

        Raises:
            VdiffError: the file cannot be read, or says two things.
        """
        names = read_shapes(path)
        with reading(path), safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        said = {f"{path}, {source}": each for source, each in statements(names, metadata).items()}
        return cls(str(path), agreed(said), KEYS[1] in names, _student_of(metadata))


def _student_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a student's checkpoint, from the metadata that an export wrote."""
    steps, scale = metadata.get(STUDENT_STEPS, ""), metadata.get(LEARNED, "")
    if not re.fullmatch("[1-9][0-9]{0,3}", steps):
        return {}
    guidance = float(scale) if re.fullmatch(r"\d{1,6}(\.\d{1,6})?", scale) else None
    return {"method": "progressive", "num_timesteps": int(steps), "guidance_scale": guidance}


def agreed(said: Mapping[str, str]) -> str | None:
    """The one prediction type that all sources give; None if there is no source.

    Args:
        said: the prediction type by its source.

    Raises:
        VdiffError: two sources contradict each other.
    """
    for (first, one), (second, other) in combinations(said.items(), 2):
        if one != other:
            raise VdiffError(
                f"{first} says prediction {one}, and {second} says {other}",
                "find out at the source of the model which is right, and correct or leave out the other",
            )
    return next(iter(said.values()), None)


def scheduler_of(
    file: JsonFile, note: WeightsNote, *, prediction: str | None, zero_snr: bool, is_own: bool = True
) -> JsonFile:
    """A scheduler's configuration in which prediction and zero terminal SNR are what all sources agree on.

    Args:
        note: what the weights say.
        prediction, zero_snr: what the user says; None and False: nothing.
        is_own: whether the configuration is the model's own, and not that of another model of the same architecture,
            which counts only where nothing else is said.

    Raises:
        VdiffError: they contradict each other, or an ε-prediction is to have zero terminal SNR.
    """
    word, flag = file.values.get("prediction_type"), file.flag("rescale_betas_zero_snr", False)
    of_file = next((ours for ours, theirs in PREDICTIONS.items() if theirs == word), None)
    said = {note.where: note.prediction, f"--prediction {prediction}": prediction, file.where: is_own and of_file}
    values = dict(file.values)
    if (kind := agreed({source: each for source, each in said.items() if each})) is not None:
        values["prediction_type"] = PREDICTIONS[kind]
    # diffusers writes false into every scheduler that has the field: that says nothing
    rescaled = note.zero_snr or zero_snr or (is_own and flag)
    if rescaled or "rescale_betas_zero_snr" in values:
        values["rescale_betas_zero_snr"] = rescaled
    if rescaled and values.get("prediction_type", "epsilon") == "epsilon":
        raise VdiffError(
            f"{file.where}: zero terminal SNR with an eps-prediction, which says nothing at the last level",
            "find out what the model predicts, and give --prediction v if it is v",
        )
    return JsonFile(file.where, values)


@dataclass(frozen=True)
class LatentPipeline:
    """A pipeline that was read, and its description as a checkpoint.

    Attributes:
        root: the pipeline's folder.
        weights: of its network by the names of a checkpoint, in the precision of the file.
    """

    root: Path
    weights: Mapping[str, Tensor]
    config: CheckpointConfig

    def write(self, folder: Path, config: CheckpointConfig, *, copy: bool, overwrite: bool) -> None:
        """Write the network as a checkpoint that names the folder of the other parts, or a folder with copies of them.

        Raises:
            VdiffError: something is in the way, or the file system refuses.
        """
        with new_folder(folder, IMPORTED_MODEL, overwrite=overwrite) as temporary:
            parts = self.root
            if copy:
                parts = temporary / COPIED
                copy_parts(self.root, parts)
            components = {"path": str(parts), "fingerprint": components_fingerprint(parts)}
            save_checkpoint(temporary, self.weights, replace(config, components=components))


def import_folder(
    root: Path, name: str, index: JsonFile, schedule: Schedule, prediction: str, *, takes_guidance: bool = False
) -> LatentPipeline:
    """Read a pipeline of latents.

    Args:
        name: of the source, for the description of the checkpoint.
        index: of a class of `PIPELINES`.
        takes_guidance: whether the network may take the weight of guidance: it is known which ones it has learned.

    Raises:
        VdiffError: a part is missing, damaged, or not supported.
    """
    backbone, weights = read_backbone(root, index, takes_guidance=takes_guidance)
    settings: Any = backbone.model.config
    size, takes = settings.sample_size, backbone.signature
    shape = [takes.channels, *((size, size) if isinstance(size, int) else size or ())]
    if len(shape) != 3:
        raise VdiffError(f"the network of {root} has no sample_size", "add it: pixels of a side, divided by 8")
    is_text = bool(PIPELINES[str(index.values["_class_name"])])
    network = read_network(root, index, backbone) if is_text else backbone
    picture_shape((shape[0], shape[1], shape[2]), root)
    Autoencoder.read(root)
    config = CheckpointConfig(
        backbone={"kind": TEXT if is_text else DIFFUSERS, "config": network.describe()},
        sample_shape=shape,
        codec=LATENTS.name,
        schedule=schedule.to_dict(),
        prediction=prediction,
        num_timesteps=min(STEPS, schedule.label_scale),
        class_names=[str(k) for k in range(takes.num_classes)],
        **imported_fields(f"diffusers/{name}"),
    )
    prefix = "network.unet.model" if is_text else "network.model"
    return LatentPipeline(root, {f"{prefix}.{name}": tensor for name, tensor in weights.items()}, config)


def read_backbone(root: Path, index: JsonFile, *, takes_guidance: bool) -> tuple[DiffusersBackbone, dict[str, Tensor]]:
    """The network of a pipeline, without memory for its weights, and its weights in the precision of their file."""
    kind = TRANSFORMERS.get(str(index.values["_class_name"]), TEXT_UNET)
    part = "unet" if kind == TEXT_UNET else "transformer"
    if index.get(part) not in (["diffusers", kind], *([["diffusers", FIRST_NAME]] if kind != TEXT_UNET else [])):
        raise index.refusal(part, f"only {kind} of diffusers can be read")
    folder = root / part
    file = JsonFile.read(folder / CONFIG, DAMAGED)
    for key in ("time_cond_proj_dim", "num_class_embeds", "class_embed_type", "encoder_hid_dim"):
        if file.get(key) is not None and not (takes_guidance and key == "time_cond_proj_dim"):
            raise file.refusal(key, "a UNet with other inputs than noise, time and text cannot be read")
    if kind == TEXT_UNET and file.get("in_channels") != file.get("out_channels"):
        raise file.refusal("in_channels", "only a UNet that takes latents alone can be read, and none for inpainting")
    values = {key: value for key, value in file.values.items() if not key.startswith("_")}
    doubled = values.get("out_channels") == 2 * values.get("in_channels", 0)
    with text_libraries(), explained(f"{file.where} describes no {kind}", DAMAGED, Exception), torch.device("meta"):
        backbone = build_diffusers({"class": kind, "config": values, "drops_variance": doubled})
        shapes = {name: tuple(tensor.shape) for name, tensor in backbone.model.state_dict().items()}
    weights = read_weights(weights_files(folder), shapes, ignored=KEYS)
    return backbone, weights


def read_network(root: Path, index: JsonFile, unet: DiffusersBackbone) -> TextBackbone:
    """The network of a pipeline, of its UNet and the text encoders and tokenizers in its folder."""
    kind = str(index.values["_class_name"])
    if index.get("requires_aesthetics_score", False):
        raise index.refusal("requires_aesthetics_score", "a refiner cannot be read: import the base model")
    for part in (*PIPELINES[kind], VAE, *TOKENIZERS[: len(PIPELINES[kind])]):
        if not (root / part).is_dir():
            raise VdiffError(f"{root / part} is missing", f"a {kind} needs it: copy or download the pipeline again")
    encoders = [read_encoder(root, part) for part in PIPELINES[kind]]
    tokenizers = Tokenizers.read(root)
    known: Any = [encoder.config for encoder in encoders]
    for tokenizer, config in zip(tokenizers.parts, known, strict=True):
        if len(tokenizer) > config.vocab_size:
            raise VdiffError(
                f"a tokenizer of {root} knows {len(tokenizer)} tokens, its text encoder {config.vocab_size}", DAMAGED
            )
    settings: Any = unet.model.config
    width, takes = sum(config.hidden_size for config in known), settings.cross_attention_dim
    if width != takes:
        raise VdiffError(f"the UNet of {root} takes text of {takes} channels, its text encoders give {width}", DAMAGED)
    zero_empty = index.flag("force_zeros_for_empty_prompt", POOLED in unet.signature.names)
    empty = tokenizers.tokens([""])[0].tolist()
    return TextBackbone(unet, encoders, empty_tokens=empty, zero_empty=zero_empty)


def preflight(config: CheckpointConfig, spacing: str) -> str:
    """`v-prediction, zero terminal SNR, trailing, 1000 levels, latents 4×128×128, two text encoders`.

    Args:
        spacing: of the timesteps in the pipeline's own scheduler.
    """
    encoders = len(config.network_config.get("text_encoders", ()))
    conditions = {0: f"{config.signature.num_classes} classes", 1: "one text encoder", 2: "two text encoders"}
    return ", ".join([
        f"{'ε' if config.prediction == 'eps' else config.prediction}-prediction",
        *(["zero terminal SNR"] if config.schedule.get("zero_snr") else []),
        spacing,
        f"{config.levels} levels",
        f"latents {'×'.join(map(str, config.shape))}",
        conditions[encoders],
    ])  # fmt: skip


@contextmanager
def converted(file: Path, folder: Path, pipeline: str | None) -> Iterator[Path]:
    """A single file of weights as a pipeline's folder beside `folder`, which exists during the block only.

    Args:
        pipeline: a folder or a name of the hub with the configurations and tokenizers; None: those of the family.

    Raises:
        VdiffError: the file holds something else, no configurations can be had, or the file does not fit them.
    """
    found = recognise(file)
    if found.kind == "LoRA":
        hint = "import that model, and start from the LoRA with train.py --base MODEL --lora FILE"
        raise VdiffError(f"{file} is {found.what}, which needs the model that it belongs to", hint)
    if found.kind == "other" and "UNet" in found.parts:
        raise VdiffError(f"{file} is {found.what}", "import the base model")
    like = _configurations(file, pipeline)
    index = JsonFile.read(like / INDEX, DAMAGED)
    kind = index.word("_class_name", "", [name for name in PIPELINES if name not in TRANSFORMERS])
    place = folder.with_name(f"{folder.name}.converted")
    temporary = place.with_name(f".{place.name}.{uuid.uuid4().hex}.tmp")
    with locked(place):  # removes what a killed import left
        try:
            with (
                text_libraries(),
                explained(f"{file} does not fit the configurations in {like}", GIVE_PIPELINE, Exception),
            ):
                import diffusers

                options = {"config": str(like), "local_files_only": True, "feature_extractor": None}
                whole = getattr(diffusers, kind).from_single_file(str(file), **options)
                with writing(temporary):
                    whole.save_pretrained(temporary)
            yield temporary
        finally:
            remove(temporary)


def _configurations(file: Path, pipeline: str | None) -> Path:
    """The folder with the configurations and tokenizers of a single file of weights."""
    if pipeline is not None:
        return find(pipeline, DESCRIPTIONS)[0]
    shapes = read_shapes(file)
    widths = [shapes[name][1] for k in (1, 4) if (name := TEXT_KEY.format(k)) in shapes]
    if not widths or widths[0] not in HUB_NAMES:
        raise VdiffError(f"{file} holds no Stable Diffusion 1.5, 2 or XL", GIVE_PIPELINE)
    try:
        return fetch(HUB_NAMES[widths[0]], DESCRIPTIONS)
    except VdiffError as error:
        raise VdiffError(f"{file} needs the configurations of {error.cause}", GIVE_PIPELINE) from None
