"""A copy of a safetensors file that says what it is: keys, metadata, names of a LoRA, and A1111's YAML file.

The header is written again, and the numbers are copied as they are, so a file of any size needs little memory.
"""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vdiff.errors import OptionError, VdiffError
from vdiff.files import CHECKSUM, write_text, write_whole
from vdiff.interop.diffusers.original import configuration
from vdiff.interop.diffusers.text_writing import CONFIGURATION, WRITTEN_BY
from vdiff.interop.modelspec import SDXL, SPEC, WORDS, ZERO_SNR, architecture_of
from vdiff.interop.predicts import CONFIGS
from vdiff.interop.recognition import V_KEY, ZERO_SNR_KEY, Foreign
from vdiff.models.checkpoint import read_metadata
from vdiff.models.reading import read_header, reading
from vdiff.replacing import Kind, check_free, locked

REPAIRED = {"repaired_by": "vdiff"}
FILE = Kind("repaired file", lambda path: path.name if REPAIRED.items() <= read_metadata(path).items() else "")
PEFT_NAME = re.compile(r"(base_model\.model|unet|text_encoder|text_encoder_2)\.(.+)\.lora_([AB])\.weight")
KOHYA = {"base_model.model": "unet", "unet": "unet", "text_encoder": "te1", "text_encoder_2": "te2"}
USUAL_UNET: dict[str, Any] = {
    "in_channels": 4, "out_channels": 4, "layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
}  # fmt: skip
USUAL_VAE: dict[str, Any] = {"latent_channels": 4, "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2}


def repair(model: Foreign, out: Path, *, prediction: str | None, zero_snr: bool, overwrite: bool = False) -> list[str]:
    """Write a copy of a file with all that is missing; return what was changed, in words.

    Args:
        prediction, zero_snr: what the model predicts, "v" or "eps", and that it has zero terminal SNR; None and False:
            what its sources say.

    Raises:
        VdiffError: nothing says what it predicts, sources contradict each other, it is no file of Stable Diffusion, or
            something is in the way.
        OptionError: an ε-prediction with zero terminal SNR, or `out` is the file itself.
    """
    if model.kind == "pipeline":
        raise VdiffError(
            f"--repair: {model.path} is a folder",
            "vdiff import diffusers reads it with --prediction and --zero_snr; vdiff export diffusers writes it",
        )
    if model.kind not in ("model", "LoRA") or model.family is None:
        raise VdiffError(f"--repair: {model.path} is {model.what}", "only files of Stable Diffusion can be repaired")
    if out.suffix != ".safetensors" or out.resolve() == model.path.resolve():
        raise OptionError(
            f"--repair {out}: need the name of another .safetensors file", "a file is not changed in place"
        )
    found = prediction or model.prediction
    if found is None and (model.kind == "model" or model.contradiction):
        cause = model.contradiction or f"nothing in {model.path} says what it predicts"
        raise VdiffError(f"--repair: {cause}", "give --prediction, or --test to find out")
    is_zero = bool(zero_snr or (model.zero_snr and found == "v"))
    if is_zero and found == "eps":
        raise OptionError("--zero_snr: an eps-prediction says nothing at the last level", "give --prediction v")
    with reading(model.path):
        header = read_header(model.path)
    start, metadata = header.pop("__start__"), {**header.pop("__metadata__", {})}
    tensors, added, changes = _named(model, header)
    if model.kind == "model":
        changes += _with_keys(tensors, {V_KEY: found == "v", ZERO_SNR_KEY: is_zero})
    more = _metadata(model, found, is_zero)
    changes += [f"metadata {key}" for key, value in more.items() if metadata.get(key) != value and key != ZERO_SNR]
    metadata = {key: value for key, value in {**metadata, **more, **REPAIRED}.items() if key != CHECKSUM}
    beside = out.with_suffix(".yaml")
    with locked(out), locked(beside):
        check_free(out, FILE, overwrite=overwrite, flag="another name")
        if is_yaml := model.kind == "model" and found == "v" and model.usual_sizes:
            check_free(beside, CONFIGURATION, overwrite=overwrite, flag="another name")
        _write(out, model.path, start, {"__metadata__": metadata, **tensors}, added)
        if is_yaml:
            write_text(beside, f"{WRITTEN_BY}\n{json.dumps(_yaml(model), indent=1)}\n")
            changes.append(f"{beside.name} for A1111")
    return changes


def _named(model: Foreign, header: Mapping[str, Any]) -> tuple[dict[str, Any], bytes, list[str]]:
    """The entries of the header by the names that programs load, the numbers to add at the end, and what was changed.

    Names of peft and diffusers become those of kohya's scripts, with alpha beside each pair.
    """
    if not any(PEFT_NAME.fullmatch(name) for name in header):
        return dict(header), b"", []
    end = max(entry["data_offsets"][1] for entry in header.values())
    named: dict[str, Any] = {}
    added = b""
    for name, entry in header.items():
        if (match := PEFT_NAME.fullmatch(name)) is None:
            named[name] = entry
            continue
        layer = f"lora_{KOHYA[match[1]]}_{match[2].replace('.', '_')}"
        named[f"{layer}.lora_{'down' if match[3] == 'A' else 'up'}.weight"] = entry
        if match[3] == "A":
            first = end + len(added)
            named[f"{layer}.alpha"] = {"dtype": "F32", "shape": [], "data_offsets": [first, first + 4]}
            added += struct.pack("<f", model.alpha if model.alpha is not None else entry["shape"][0])
    return named, added, ["names of kohya's scripts"]


def _with_keys(tensors: dict[str, Any], wanted: Mapping[str, bool]) -> list[str]:
    """Add or remove the empty tensors that say what the model predicts."""
    changes = []
    end = max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    for key, holds in wanted.items():
        if holds and key not in tensors:
            tensors[key] = {"dtype": "F32", "shape": [0], "data_offsets": [end, end]}
            changes.append(f"key {key}")
        elif not holds and key in tensors and not any(tensors[key]["shape"]):
            del tensors[key]
            changes.append(f"no key {key}")
    return changes


def _metadata(model: Foreign, prediction: str | None, zero_snr: bool) -> dict[str, str]:
    """What the metadata must say; what they say already of other things stays."""
    family, told = model.family, model.metadata
    assert family is not None
    is_lora = model.kind == "LoRA"
    more = {f"{SPEC}sai_model_spec": told.get(f"{SPEC}sai_model_spec", "1.0.0")}
    if prediction is not None:
        more |= {f"{SPEC}prediction_type": WORDS[prediction], ZERO_SNR: str(zero_snr)}
    architecture = architecture_of(family, prediction) + "/lora" * is_lora
    more[f"{SPEC}architecture"] = told.get(f"{SPEC}architecture") or architecture
    more[f"{SPEC}implementation"] = told.get(f"{SPEC}implementation") or ("kohya" if is_lora else family.code)
    more[f"{SPEC}title"] = told.get(f"{SPEC}title") or model.path.stem
    if is_lora:
        more["ss_base_model_version"] = told.get("ss_base_model_version") or family.kohya
        more["ss_network_dim"] = told.get("ss_network_dim") or str(model.rank)
        alpha = f"{model.rank if model.alpha is None else model.alpha:g}"
        more["ss_network_alpha"] = told.get("ss_network_alpha") or alpha
    return more


def _yaml(model: Foreign) -> dict[str, Any]:
    """The configuration of a UNet of usual sizes that predicts v."""
    family = model.family
    assert family is not None
    unet = {**USUAL_UNET, **CONFIGS[family.name]}
    vae = {**USUAL_VAE, "scaling_factor": 0.13025 if family is SDXL else 0.18215}
    return configuration(family, unet, vae, is_v=True)


def _write(out: Path, source: Path, start: int, header: Mapping[str, Any], added: bytes) -> None:
    """The new header, the numbers of the source, and the added ones."""
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)

    def write(temporary: Path) -> None:
        with open(source, "rb") as file, open(temporary, "wb") as target:
            target.write(len(text).to_bytes(8, "little") + text)
            file.seek(start)
            shutil.copyfileobj(file, target, 2**24)
            target.write(added)

    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, write)
