"""Pipelines of latents as checkpoints: Stable Diffusion, FLUX, PixArt and DiT, folders of diffusers and single files.

unet/ or transformer/                 the network that the checkpoint holds
scheduler/scheduler_config.json       its noise levels, and what it predicts
vae/ text_encoder/ tokenizer/ …       the checkpoint's components, see `vdiff.models.components`
"""

from __future__ import annotations

import math
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

from vdiff.diffusion.parameterisation import Flow
from vdiff.errors import OptionError, VdiffError, explained
from vdiff.files import remove, writing
from vdiff.interop.diffusers.flow import FLOW_SCHEDULER, is_flow, read_family
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
from vdiff.interop.diffusers.scheduler import PREDICTIONS, spacing_of
from vdiff.interop.foreign import IMPORTED_MODEL, JsonFile, imported_fields
from vdiff.interop.modelspec import FAMILIES, LEARNED, SIDE
from vdiff.interop.modelspec import STEPS as STUDENT_STEPS
from vdiff.interop.recognition import V_KEY, ZERO_SNR_KEY, recognise, statements
from vdiff.models.autoencoder import Autoencoder, picture_shape
from vdiff.models.checkpoint import COPIED, CheckpointConfig, save_checkpoint
from vdiff.models.codec import LATENTS
from vdiff.models.components import (
    ENCODERS,
    T5,
    TOKENIZERS,
    VAE,
    components_fingerprint,
    copy_parts,
    read_encoder,
    text_libraries,
)
from vdiff.models.condition import POOLED
from vdiff.models.diffusers_names import DIT, FLUX, PIXART, SD3, TEXT_UNET
from vdiff.models.kinds import DIFFUSERS, TEXT
from vdiff.models.reading import read_shapes, reading
from vdiff.models.text import TextBackbone
from vdiff.models.tokenizing import Tokenizers
from vdiff.models.wrapped import DiffusersBackbone, build_diffusers
from vdiff.replacing import locked, new_folder

PIPELINES = {
    "StableDiffusionPipeline": ENCODERS[:1], "StableDiffusionXLPipeline": ENCODERS[:2], "DiTPipeline": (),
    "PixArtAlphaPipeline": ENCODERS[:1], "PixArtSigmaPipeline": ENCODERS[:1],
    "StableDiffusion3Pipeline": ENCODERS, "FluxPipeline": ENCODERS[:2],
}  # fmt: skip
"""Classes of pipelines that can be read, and their text encoders; the third one of SD3 may be absent."""
TRANSFORMERS = {
    "DiTPipeline": DIT, "PixArtAlphaPipeline": PIXART, "PixArtSigmaPipeline": PIXART, "StableDiffusion3Pipeline": SD3,
    "FluxPipeline": FLUX,
}  # fmt: skip
"""Classes of pipelines whose network is a transformer, and the class of that."""
T5_LENGTHS = {
    "PixArtAlphaPipeline": 120,
    "PixArtSigmaPipeline": 300,
    "StableDiffusion3Pipeline": 256,
    "FluxPipeline": 512,
}
"""Tokens of a prompt for T5, as pipelines of these classes give them by default."""
FIRST_NAME = "Transformer2DModel"
"""The class of all transformers in the files of 2023."""
FLOWS = (SD3, FLUX)
STEPS = {TEXT_UNET: 50, DIT: 50, PIXART: 20, SD3: 28, FLUX: 28}
"""Sampling steps of an imported checkpoint, as of diffusers' pipelines."""
FLUX_WEIGHTS = [0.0, 9.0]
"""The weights w of guidance that a FLUX may be given: its publishers name none; pipelines of diffusers use 2.5."""
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
        notes: a sentence for each reason why the pipeline draws other pictures.
        preflight: what it is, in one line.
    """

    root: Path
    weights: Mapping[str, Tensor]
    config: CheckpointConfig
    notes: list[str]
    preflight: str

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
    root: Path, name: str, index: JsonFile, scheduler: JsonFile, own: CheckpointConfig | None, image_size: int | None
) -> LatentPipeline:
    """Read a pipeline of latents.

    Args:
        name: of the source, for the description of the checkpoint.
        index: of a class of `PIPELINES`.
        own: the description of a folder that vdiff exported; its network may take the weight of guidance, as it is
            known which ones it has learned, and it draws pictures of the same size.
        image_size: pixels per side; None: as in training.

    Raises:
        VdiffError: a part is missing, damaged, or not supported.
        OptionError: the network takes no pictures of this size.
    """
    kind = TRANSFORMERS.get(str(index.values["_class_name"]), TEXT_UNET)
    backbone, weights = read_backbone(root, index, takes_guidance=bool(own and own.guidance_range))
    takes, settings = backbone.signature, backbone.settings
    size = settings.get("sample_size") or (SIDE if kind == FLUX else None)
    size = own.shape[1:] if own else (size, size) if isinstance(size, int) else size
    if not size or len(size) != 2:
        raise VdiffError(f"the network of {root} has no sample_size", "add it: pixels of a side, divided by 8")
    if image_size:
        factor = picture_shape((takes.channels, 1, 1), root)[1]
        step, most = factor * takes.size_multiple, settings.get("pos_embed_max_size")
        if image_size % step or (most and image_size > most * step):
            limit = f" up to {most * step}" if most else ""
            raise OptionError(f"--image_size {image_size}: this model draws multiples of {step}{limit}", "give another")
        size = (image_size // factor,) * 2
    if is_flow(scheduler) != (kind in FLOWS):
        due = FLOW_SCHEDULER if kind in FLOWS else "a scheduler with betas, such as DDIMScheduler"
        raise scheduler.refusal("_class_name", f"{kind} needs {due}: put the scheduler of its training there")
    tokens = math.prod(size) // takes.size_multiple**2
    schedule, family, notes = read_family(scheduler, latents=True, tokens=tokens, is_even=kind == FLUX)
    if kind == FLUX:
        family = Flow(1.0)
    if backbone.options["drops_variance"]:
        notes.append("its learned variance is left out: vdiff's samplers have their own")
    is_text = bool(PIPELINES[str(index.values["_class_name"])])
    network = read_network(root, index, backbone) if is_text else backbone
    shape = [takes.channels, *size]
    picture_shape((shape[0], shape[1], shape[2]), root)
    Autoencoder.read(root)
    config = CheckpointConfig(
        backbone={"kind": TEXT if is_text else DIFFUSERS, "config": network.describe()},
        sample_shape=shape,
        codec=LATENTS.name,
        schedule=schedule.to_dict(),
        **family.config_fields(),
        num_timesteps=min(STEPS[kind], schedule.label_scale),
        guidance_range=FLUX_WEIGHTS if kind == FLUX and takes.takes_guidance else [],
        class_names=[str(k) for k in range(takes.num_classes)],
        **imported_fields(f"diffusers/{name}"),
    )
    prefix = "network.unet.model" if is_text else "network.model"
    said = f"time shift {schedule.to_dict()['shift']:.4g}" if isinstance(family, Flow) else spacing_of(scheduler)
    named = {f"{prefix}.{name}": tensor for name, tensor in weights.items()}
    return LatentPipeline(root, named, config, notes, preflight(config, said))


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
    """The network of a pipeline: the one without text, and the text encoders and tokenizers in its folder."""
    kind = str(index.values["_class_name"])
    if index.get("requires_aesthetics_score", False):
        raise index.refusal("requires_aesthetics_score", "a refiner cannot be read: import the base model")
    places = [part for part in PIPELINES[kind] if part != ENCODERS[2] or index.get(part) not in (None, [None, None])]
    for part in (*places, VAE, *TOKENIZERS[: len(places)]):
        if not (root / part).is_dir():
            raise VdiffError(f"{root / part} is missing", f"a {kind} needs it: copy or download the pipeline again")
    encoders = [read_encoder(root, part) for part in places]
    length = T5_LENGTHS.get(kind, 0)
    described = {"unet": unet.describe(), "text_encoders": [{"class": type(each).__name__} for each in encoders]}
    tokenizers = Tokenizers.read(root, {**described, "t5_length": length})
    known: Any = [encoder.config for encoder in encoders]
    for tokenizer, config in zip(tokenizers.parts, known, strict=True):
        if len(tokenizer) > config.vocab_size:
            raise VdiffError(
                f"a tokenizer of {root} knows {len(tokenizer)} tokens, its text encoder {config.vocab_size}", DAMAGED
            )
    empty = tokenizers.tokens([""])[0].tolist()
    is_xl = unet.class_name == TEXT_UNET and POOLED in unet.signature.names
    zero_empty = index.flag("force_zeros_for_empty_prompt", is_xl)
    with explained(f"the text encoders of {root} do not fit its network", DAMAGED, ValueError):
        network = TextBackbone(unet, encoders, empty_tokens=empty, zero_empty=zero_empty, t5_length=length)
    check_widths(root, network)
    return network


def check_widths(root: Path, network: TextBackbone) -> None:
    """Refuse text encoders whose embeddings have other channels than the network takes.

    Raises:
        VdiffError: as said.
    """
    settings, name = network.unet.settings, network.unet.class_name
    known: Any = [encoder.config for encoder in network.text_encoders]
    of_t5 = [config.d_model for config, kind in zip(known, network.classes, strict=True) if kind == T5]
    of_clip = [config for config, kind in zip(known, network.classes, strict=True) if kind != T5]
    due = settings[{TEXT_UNET: "cross_attention_dim", PIXART: "caption_channels"}.get(name, "joint_attention_dim")]
    found, width = [(due, size) for size in of_t5], sum(config.hidden_size for config in of_clip)
    if name == SD3:
        found.append((due, max(due, width)))  # filled up with zeros
    elif not of_t5:
        found.append((due, width))
    if (pooled := settings.get("pooled_projection_dim")) is not None:
        sizes = [config.hidden_size if name == FLUX else config.projection_dim for config in of_clip]
        found.append((pooled, sum(sizes)))
    for takes, width in found:
        if width != takes:
            raise VdiffError(
                f"the network of {root} takes text of {takes} channels, its text encoders give {width}", DAMAGED
            )


def preflight(config: CheckpointConfig, said: str) -> str:
    """`v-prediction, zero terminal SNR, trailing, 1000 levels, latents 4×128×128, two text encoders`.

    Args:
        said: the spacing of the timesteps in the pipeline's own scheduler, or the time shift of a flow.
    """
    encoders = len(config.network_config.get("text_encoders", ()))
    words = (f"{config.signature.num_classes} classes", "one text encoder", "two text encoders", "three text encoders")
    prediction = f"{'ε' if config.prediction == 'eps' else config.prediction}-prediction"
    return ", ".join([
        "rectified flow" if isinstance(config.family, Flow) else prediction,
        *(["zero terminal SNR"] if config.schedule.get("zero_snr") else []),
        said,
        *([f"{config.levels} levels"] if config.levels else []),
        f"latents {'×'.join(map(str, config.shape))}",
        words[encoders],
        *(["guidance as an input"] if config.guidance_range else []),
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
