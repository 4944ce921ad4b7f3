"""What a file or folder of another program is, by its header alone: no weights are read, and torch is not needed.

A program knows what a model predicts by keys, by metadata, by a file beside it, or by a guess. `readings` says how each
program interprets a model.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from vdiff.errors import VdiffError
from vdiff.files import read_json, read_text
from vdiff.interop.modelspec import FAMILIES, GUIDANCE, SD1, SD2, SDXL, SPEC, STEPS, ZERO_SNR, Family
from vdiff.models.reading import read_header, read_shapes, reading

INDEX, SCHEDULER = "model_index.json", "scheduler/scheduler_config.json"
ORIGINAL = "model.diffusion_model."
V_KEY, ZERO_SNR_KEY = "v_pred", "ztsnr"
NUMBER_OF_STEPS = re.compile(r"(?<![0-9])(\d{1,3})[ _-]?steps?(?![a-z])", re.IGNORECASE)
YAML_PREDICTION = re.compile(r"parameterization\"?\s*:\s*[\"']?(v|eps)\b|denoiser_scaling\.(V|Eps)Scaling")
PREDICTIONS = {"v": "v", "v_prediction": "v", "epsilon": "eps", "eps": "eps", "sample": "x"}
WORDS_OF_DIFFUSERS = {"v": '"v_prediction"', "eps": '"epsilon"', "x": '"sample"'}
QUOTE = '"'
SPREAD_KEY = f"{ORIGINAL}output_blocks.11.1.transformer_blocks.0.norm1.bias"
SPREAD = 0.09
"""ComfyUI takes Stable Diffusion 2 for v if the standard deviation of this tensor is larger."""
OTHERS = {
    "double_blocks": "FLUX", "joint_blocks": "Stable Diffusion 3", "control_model.": "a ControlNet",
    "transformer_blocks.0.attn.add_": "a transformer by the names of diffusers",
}  # fmt: skip
DTYPES = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I64": "<i8", "I32": "<i4"}


@dataclass(frozen=True)
class Layout:
    """The names of tensors in a LoRA.

    Attributes:
        mark: a regular expression of the name of the tensor A of a pair.
        programs: those that load it.
        partly: those that load it, but not its layers of attention.
        is_convertible: whether `vdiff.interop.repair` gives it kohya's names.
    """

    name: str
    mark: str
    programs: tuple[str, ...]
    partly: tuple[str, ...] = ()
    is_convertible: bool = False


DIFFUSERS, COMFYUI, A1111 = "diffusers", "ComfyUI", "A1111"
PROGRAMS = (DIFFUSERS, COMFYUI, A1111)
LAYOUTS = (
    Layout("kohya's scripts", r"lora_(unet|te\d?)_.*\.lora_down\.weight", PROGRAMS),
    Layout("LyCORIS (LoHa or LoKr)", r"lora_(unet|te\d?)_.*\.(hada_w1_a|lokr_w1|lokr_w1_a)", (COMFYUI, A1111)),
    Layout("diffusers", r"(unet|text_encoder(_2)?)\..*\.lora_A\.weight", (DIFFUSERS,), (COMFYUI,), is_convertible=True),
    Layout("diffusers of 2023", r"(unet|text_encoder(_2)?)\..*(processor.*_lora|\.lora|_layer)\.down\.weight",
           (DIFFUSERS, COMFYUI)),
    Layout("peft", r"base_model\.model\..*\.lora_A\.weight", (), is_convertible=True),
    Layout("an unknown program", r".*(lora_A|lora_down|lora\.down)(\.default)?\.weight", ()),
)  # fmt: skip
"""How LoRAs are named, and who loads them: `load_lora` and `model_lora_keys_unet` of ComfyUI, the built-in LoRA of
A1111, `load_lora_weights` of diffusers."""


@dataclass(frozen=True)
class Said:
    """What a source says about a model; None: it says nothing.

    Attributes:
        prediction: "v", "eps" or "x".
    """

    source: str
    prediction: str | None = None
    zero_snr: bool | None = None


@dataclass(frozen=True)
class Foreign:
    """A file or folder of another program.

    Attributes:
        what: in words.
        family: None: none of Stable Diffusion 1.5, 2 and XL.
        kind: "model" (with or without its other parts), "LoRA", "pipeline" or "other".
        usual_sizes: whether the UNet has the sizes that programs expect of the family.
        parts: names of the parts that a single file has.
        layout: of a LoRA.
        rank, alpha: of a LoRA; several ranks or alphas: the most frequent one.
        steps: the number of steps that it was made for, and the source of that; 0: not said.
        guidance: the guidance scale that it was made for; empty: not said.
        said: what each source says.
        spread: the number by which ComfyUI guesses what Stable Diffusion 2 predicts.
    """

    path: Path
    what: str
    family: Family | None
    kind: str
    usual_sizes: bool = True
    parts: tuple[str, ...] = ()
    layout: Layout | None = None
    rank: int = 0
    alpha: float | None = None
    steps: tuple[int, str] = (0, "")
    guidance: str = ""
    said: tuple[Said, ...] = ()
    spread: float | None = None
    notes: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    def with_more(self, *said: Said) -> Foreign:
        """The same with what further sources say."""
        return replace(self, said=(*self.said, *said))

    @property
    def prediction(self) -> str | None:
        """What all sources say that it predicts; None: nothing, or two things."""
        found = {each.prediction for each in self.said if each.prediction}
        return found.pop() if len(found) == 1 else None

    @property
    def zero_snr(self) -> bool | None:
        """Whether it has zero terminal SNR; None: no source says it, or they contradict each other."""
        found = {each.zero_snr for each in self.said if each.zero_snr is not None}
        return found.pop() if len(found) == 1 else None

    @property
    def contradiction(self) -> str:
        """Two sources that contradict each other, in words; empty if there are none."""
        for attribute, words in (("prediction", {}), ("zero_snr", {True: "zero terminal SNR", False: "none"})):
            told = [(each.source, getattr(each, attribute)) for each in self.said]
            told = [(source, value) for source, value in told if value is not None]
            for source, value in told[1:]:
                if value != told[0][1]:
                    return f"{told[0][0]} says {words.get(told[0][1], told[0][1])}, {source} {words.get(value, value)}"
        return ""


def recognise(path: Path) -> Foreign:
    """What a safetensors file, or a pipeline folder of diffusers, is.

    Raises:
        VdiffError: it cannot be read, or is neither.
    """
    if path.is_dir():
        return _pipeline(path)
    if path.suffix != ".safetensors":
        raise VdiffError(f"{path} is not a .safetensors file", "pickles (.ckpt, .pt, .bin) are never read")
    shapes = read_shapes(path)
    with reading(path):
        metadata = {str(key): str(value) for key, value in read_header(path).get("__metadata__", {}).items()}
    common: dict[str, Any] = {"steps": _steps(path, metadata), "metadata": metadata}
    common |= {"guidance": metadata.get(GUIDANCE, ""), "said": tuple(_said(path, shapes, metadata))}
    if shapes and all(name.startswith("network.") for name in shapes):
        return Foreign(path, "the weights of a vdiff checkpoint: inspect its folder", None, "other", **common)
    for layout in LAYOUTS:
        if first := [name for name in shapes if re.fullmatch(layout.mark, name)]:
            return _lora(path, shapes, layout, first, common)
    for prefix in (ORIGINAL, ""):
        if f"{prefix}input_blocks.0.0.weight" in shapes:
            return _original(path, shapes, prefix, common)
    if "conv_in.weight" in shapes and any(name.startswith("down_blocks.") for name in shapes):
        family, usual = _family_of_unet(shapes, "conv_in", "add_embedding")
        name = family.name if family else "an unknown family"
        return Foreign(
            path, f"a UNet of {name}, by the names of diffusers", family, "model", usual, ("UNet",), **common
        )
    known = _other(shapes)
    if any("decoder.conv_in" in each or "decoder.conv_out" in each for each in shapes):
        known = "an autoencoder"
    elif any("text_model.encoder.layers.0." in each or "resblocks.0." in each for each in shapes):
        known = "a text encoder"
    return Foreign(
        path, known or f"unknown: {len(shapes)} tensors, {min(shapes, default='none')[:60]}, …", None, "other"
    )


def _other(names: Iterable[str]) -> str | None:
    """Another network than Stable Diffusion's, by a name of one of its tensors."""
    return next((name for mark, name in OTHERS.items() if any(mark in each for each in names)), None)


def _family_of_unet(shapes: Mapping[str, tuple[int, ...]], first: str, added: str) -> tuple[Family | None, bool]:
    """The family of a UNet, and whether it has the family's sizes.

    Args:
        first: the name of the first convolution.
        added: how the tensors of the vector condition of XL begin.
    """
    widths = [shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight") and len(shape) == 2]
    if not widths:
        return None, False
    linear = any(len(shape) == 2 for name, shape in shapes.items() if name.endswith("proj_in.weight"))
    is_xl = any(f"{added}." in name for name in shapes)
    family = SDXL if is_xl else SD2 if linear else SD1
    return family, widths[0] == family.width and shapes[f"{first}.weight"][0] == family.channels


def _original(path: Path, shapes: Mapping[str, tuple[int, ...]], prefix: str, common: Mapping[str, Any]) -> Foreign:
    """A file by the original names: all parts, or a UNet."""
    unet = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    family, usual = _family_of_unet(unet, "input_blocks.0.0", "label_emb")
    channels = unet["input_blocks.0.0.weight"][1]
    marks = {
        "UNet": f"{prefix}input_blocks", "autoencoder": "first_stage_model.",
        "text encoder": "cond_stage_model.", "text encoders": "conditioner.",
    }  # fmt: skip
    parts = tuple(part for part, mark in marks.items() if any(name.startswith(mark) for name in shapes))
    refiner = family is SDXL and "conditioner.embedders.0.model.ln_final.weight" in shapes
    what = family.name if family else "a UNet of an unknown family"
    if channels != 4 or refiner:
        what += {9: ", inpainting", 8: ", InstructPix2Pix"}.get(channels, "" if refiner else f", {channels} channels")
        what += ", refiner" * refiner
        return Foreign(path, what, None, "other", False, parts, **common)
    spread = None
    if family is SD2 and SPREAD_KEY in shapes:
        spread = float(np.std(read_numbers(path, SPREAD_KEY)))
    missing = [part for part in ("autoencoder", "text encoder") if not any(part in each for each in parts)]
    if missing:
        what += f", without {' and '.join(missing)}"
    return Foreign(path, what, family, "model", usual, parts, spread=spread, **common)


def _lora(
    path: Path, shapes: Mapping[str, tuple[int, ...]], layout: Layout, first: list[str], common: Mapping[str, Any]
) -> Foreign:
    """A LoRA: its rank, its alpha, and the family of its base."""
    metadata: Mapping[str, str] = common["metadata"]
    ranks = [min(shapes[name]) if "hada" in name or "lokr" in name else shapes[name][0] for name in first]
    rank = max(set(ranks), key=ranks.count) if ranks else 0
    widths = {
        shapes[name][1] for name in first if re.search(r"attn2[._](processor\.)?to_k", name) and len(shapes[name]) > 1
    }
    family = next((each for each in FAMILIES if each.width in widths), None)
    usual = family is not None
    if family is None:
        told = f"{metadata.get(f'{SPEC}architecture', '')} {metadata.get('ss_base_model_version', '')}"
        marks = {
            SDXL: ("stable-diffusion-xl", "sdxl"),
            SD2: ("stable-diffusion-v2", "sd_v2"),
            SD1: ("stable-diffusion-v1", "sd_v1"),
        }
        family = next((each for each, words in marks.items() if any(word in told for word in words)), None)
    alphas = [name for name in shapes if name.endswith(".alpha")][:1]
    alpha = float(read_numbers(path, alphas[0]).reshape(-1)[0]) if alphas else None
    if alpha is None and (note := metadata.get("lora_adapter_metadata")):
        found = [value for key, value in _object(note).items() if key.endswith("lora_alpha")]
        alpha = float(found[0]) if found and isinstance(found[0], int | float) else None
    notes = []
    if len(set(ranks)) > 1:
        notes.append(f"its layers have ranks from {min(ranks)} to {max(ranks)}")
    if layout.name == "diffusers" and alpha is None:
        notes.append("it says no alpha: programs take the rank")
    other = None if family else _other(shapes)
    of = f"of {family.name}" if family else f"of {other or 'an unknown family'}"
    what = f"a LoRA {of}, named as by {layout.name}"
    return Foreign(
        path,
        what,
        family,
        "other" if other else "LoRA",
        usual,
        layout=layout,
        rank=rank,
        alpha=alpha,
        notes=tuple(notes),
        **common,
    )


def _pipeline(folder: Path) -> Foreign:
    """A pipeline folder of diffusers, by its JSON files."""
    if not (folder / INDEX).is_file():
        raise VdiffError(
            f"{folder} holds no {INDEX}", "give a .safetensors file, a pipeline of diffusers or a checkpoint"
        )
    advice = "copy or download it again"
    kind = read_json(folder / INDEX, advice).get("_class_name")
    family = next((each for each in (SDXL, SD1) if each.pipeline == kind), None)
    usual, said, notes = False, list[Said](), list[str]()
    flow = ""
    if family is not None and (folder / "unet/config.json").is_file():
        unet = read_json(folder / "unet/config.json", advice)
        family = SD2 if family is SD1 and unet.get("use_linear_projection") else family
        usual = unet.get("cross_attention_dim") == family.width
        if unet.get("time_cond_proj_dim"):
            notes.append("its UNet takes the guidance scale as an input, as LCM does")
    if (folder / SCHEDULER).is_file():
        values = read_json(folder / SCHEDULER, advice)
        zero_snr = bool(values.get("rescale_betas_zero_snr", False))
        if str(values.get("_class_name")).startswith("FlowMatch"):
            is_dynamic = values.get("use_dynamic_shifting")
            shift = "depends on the size of the picture" if is_dynamic else f"is {values.get('shift', 1)}"
            flow = f", a rectified flow whose time shift {shift}"
        else:
            said.append(Said("the scheduler", PREDICTIONS.get(values.get("prediction_type", "epsilon")), zero_snr))
        spacing = values.get("timestep_spacing", "leading")
        if zero_snr and spacing != "trailing":
            notes.append(f"zero terminal SNR with {spacing} timesteps: sampling never begins at the last level")
    for weights in sorted((folder / "unet").glob("*.safetensors")):
        said += _said(weights, read_shapes(weights), {})
    what = f"a pipeline folder of {family.name if family else kind}{flow}"
    kind = "pipeline" if family else "other"
    return Foreign(folder, what, family, kind, usual, steps=_steps(folder, {}), said=tuple(said), notes=tuple(notes))


def _steps(path: Path, metadata: Mapping[str, str]) -> tuple[int, str]:
    """The number of steps that a model was made for, and the source of that."""
    if (said := metadata.get(STEPS, "")).isdecimal():
        return int(said), "metadata"
    for source, text in (("the file's name", path.name), ("its title", metadata.get(f"{SPEC}title", ""))):
        if found := NUMBER_OF_STEPS.search(text):
            return int(found[1]), source
    return 0, ""


def statements(names: Mapping[str, Any], metadata: Mapping[str, str]) -> dict[str, str]:
    """What keys and metadata of a file say that its model predicts, by source."""
    said = {"key v_pred": "v"} if V_KEY in names else {}
    word = PREDICTIONS.get(metadata.get(f"{SPEC}prediction_type", "").lower())
    if word is None and "v2-768-v" in metadata.get(f"{SPEC}architecture", ""):
        word = "v"
    return {**said, "metadata modelspec": word} if word else said


def _said(path: Path, names: Mapping[str, Any], metadata: Mapping[str, str]) -> Iterator[Said]:
    """What each source says: keys, metadata of modelspec and of kohya's scripts, and the YAML file beside it."""
    for source, prediction in statements(names, metadata).items():
        yield Said(source, prediction)
    if ZERO_SNR_KEY in names:
        yield Said(f"key {ZERO_SNR_KEY}", zero_snr=True)
    for key in (ZERO_SNR, "ss_zero_terminal_snr"):
        if (flag := metadata.get(key, "").lower()) in ("true", "false"):
            yield Said(f"metadata {key}", zero_snr=flag == "true")
    if metadata.get("ss_v_parameterization", "").lower() == "true":
        yield Said("metadata ss_v_parameterization", "v")
    beside = path.with_suffix(".yaml")
    if beside.is_file() and (found := YAML_PREDICTION.search(_text(beside))):
        yield Said(beside.name, (found[1] or found[2]).lower())


def _text(path: Path) -> str:
    """A text file's contents; empty if it cannot be read."""
    try:
        return read_text(path)
    except (OSError, ValueError, VdiffError):
        return ""


def _object(text: str) -> dict[str, Any]:
    """A JSON object in metadata; empty if it is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_numbers(path: Path, name: str) -> np.ndarray:
    """The numbers of one small tensor of a safetensors file, as float64."""
    with reading(path):
        header = read_header(path)
        entry, start = header[name], header["__start__"]
        first, last = entry["data_offsets"]
        with open(path, "rb") as file:
            file.seek(start + first)
            data = file.read(min(last - first, 2**20))
        if entry["dtype"] == "BF16":
            return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32).astype(np.float64)
        if (kind := DTYPES.get(entry["dtype"])) is None:
            return np.full(1, math.nan)
        return np.frombuffer(data, kind).astype(np.float64)


# What programs take it for


@dataclass(frozen=True)
class Reading:
    """How a program interprets a model.

    Attributes:
        says: in words.
        is_wrong: whether that is not what the model is; None: nobody knows.
        remedy: what to do in the program.
    """

    program: str
    says: str
    is_wrong: bool | None = None
    remedy: str = ""


def readings(model: Foreign) -> Iterator[Reading]:
    """How ComfyUI, A1111 and diffusers interpret a model."""
    if model.kind == "LoRA" and model.layout is not None:
        for program in PROGRAMS:
            yield _lora_reading(program, model, model.layout)
        return
    if model.kind not in ("model", "pipeline") or model.family is None:
        return
    if model.kind == "pipeline":
        told = model.said[0] if model.said else Said("", "eps", False)
        yield _compared(DIFFUSERS, model, told.prediction or "eps", bool(told.zero_snr), "its scheduler says so")
        for program in (COMFYUI, A1111):
            yield Reading(
                program, "does not load folders of diffusers", None, "import it, and vdiff export single_file"
            )
        return
    family = model.family
    yield _compared(DIFFUSERS, model, family.hub_prediction, False, f"the scheduler of {family.hub}; keys are not read")
    if not model.usual_sizes:
        yield Reading(COMFYUI, "does not load it: it does not know a UNet of these sizes")
    else:
        yield _compared(COMFYUI, model, *_comfyui(model))
    yield _compared(A1111, model, *_a1111(model))


def _keys(model: Foreign) -> tuple[bool, bool]:
    """Whether the file has the keys v_pred and ztsnr."""
    sources = {each.source for each in model.said}
    return "key v_pred" in sources, f"key {ZERO_SNR_KEY}" in sources


def _comfyui(model: Foreign) -> tuple[str, bool, str]:
    """`model_type` in comfy/supported_models.py."""
    has_v, has_zero = _keys(model)
    if model.family is SDXL:
        return ("v", has_zero, "key v_pred") if has_v else ("eps", False, "no key v_pred")
    if model.family is SD2 and model.spread is not None:
        how = f"the spread of a bias is {model.spread:.3f}, v if above {SPREAD}"
        return "v" if model.spread > SPREAD else "eps", False, how
    return "eps", False, "always for this family"


def _a1111(model: Foreign) -> tuple[str | None, bool, str]:
    """`guess_model_config_from_state_dict` in modules/sd_models_config.py, and `ztsnr` in modules/sd_models.py."""
    has_v, has_zero = _keys(model)
    yaml = next((each for each in model.said if each.source.endswith(".yaml")), None)
    if yaml is not None:
        return yaml.prediction, has_zero, yaml.source
    if model.family is SD2:
        return None, has_zero, "it evaluates the UNet once and decides by that"
    if model.family is SDXL and has_v:
        return "v", has_zero, "key v_pred, from version 1.10 and in Forge; before, eps"
    return "eps", has_zero, "no YAML file beside it"


def _compared(program: str, model: Foreign, prediction: str | None, zero_snr: bool, how: str) -> Reading:
    """What a program takes a model for, beside what it is."""
    zero = ", zero terminal SNR" * zero_snr
    says = f"takes it for {prediction or 'v or eps'}{zero} ({how})"
    zsnr, in_theirs = bool(model.zero_snr), WORDS_OF_DIFFUSERS.get(model.prediction or "", "?")
    remedies = {
        COMFYUI: f"add the node ModelSamplingDiscrete with {in_theirs.strip(QUOTE)}, zsnr {'on' if zsnr else 'off'}",
        A1111: f"put {model.path.stem}.yaml{' and the key ztsnr' * zsnr} there: --repair writes them",
        DIFFUSERS: f"give its scheduler prediction_type={in_theirs}, rescale_betas_zero_snr={zsnr}, "
        'timestep_spacing="trailing"',
    }
    if model.prediction is None:
        return Reading(program, says)
    wrong = (prediction is not None and prediction != model.prediction) or (
        model.zero_snr is not None and zero_snr != model.zero_snr
    )
    return Reading(program, says, wrong, remedies[program] if wrong else "")


def _lora_reading(program: str, model: Foreign, layout: Layout) -> Reading:
    """Whether a program loads a LoRA."""
    remedy = "--repair writes kohya's names" if layout.is_convertible else "it needs kohya's names"
    if program in layout.partly:
        return Reading(program, "skips its layers of attention (lora key not loaded)", True, remedy)
    if program not in layout.programs:
        return Reading(program, "does not load these names", True, remedy)
    version = model.metadata.get("ss_base_model_version", "")
    if program == A1111 and model.metadata and model.family is SDXL and not version.startswith("sdxl_"):
        return Reading(program, "loads it, but hides it: it takes it for a LoRA of 1.5", True, "ss_base_model_version")
    return Reading(program, "loads it; what it predicts is taken from the base", False)
