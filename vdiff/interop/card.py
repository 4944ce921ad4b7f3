"""The model card (README.md): a picture, the model's facts, lineage, distances to its teachers, licence, and how to use
the files beside it; and the public form of a checkpoint's description.

A card names its weights. Exporting another file of the same weights adds a section to it, and keeps other people's
changes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from PIL.Image import Image

from vdiff.data import images as image_files
from vdiff.data.images import cell_scale, make_grid, save_png, to_pil
from vdiff.diffusion.samplers import Ddim
from vdiff.errors import OptionError, VdiffError, printable
from vdiff.files import parse, read_text, write_text
from vdiff.models.backbone import parameter_count
from vdiff.models.checkpoint import IMPORTED, CheckpointConfig, load_checkpoint, read_config, weights_fingerprint
from vdiff.models.codec import LATENTS, WAVEFORM
from vdiff.models.condition import IMAGE
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw
from vdiff.models.kinds import TEXT
from vdiff.records import LADDER
from vdiff.replacing import check_free
from vdiff.text import plural

CARD, PICTURE = "README.md", "samples.png"
FILES_OF_CARD = r"README\.md|samples\.png"
UNKNOWN = "unknown"
USE = "\n## Use\n"
MARK = "<!-- vdiff: the card of weights {} -->"
MARKED = re.compile("<!-- vdiff: the card of weights ([0-9a-f]{64}) -->")
IDENTIFIER = re.compile("[A-Za-z][A-Za-z0-9.+_-]{0,63}")  # a licence's identifier
TASK, TEXT_TASK = "unconditional-image-generation", "text-to-image"
PICTURE_IMAGES, PICTURE_STEPS, FEWEST_STEPS = 16, 64, 4
PIXELS_AT_ONCE = 16 * 64**2
SAME_NOISE = "From the same noise; RMSE is of pixels in [−1, 1]."
MAX_NAMES = 20
NO_DISTANCES = {"checkpoint", "seed", "num_steps", "num_iters", "train_seconds", "ms_per_image"}
"""Columns of a ladder that are not distances."""
PATHS = ("dataset", "path")
"""Keys with a path or an address, in the description of a checkpoint or of another folder that it names."""
NAMED = ("teacher", "components", "base")
"""Keys with the descriptions of those folders."""


# Descriptions without paths of this machine


def last_name(path: str) -> str:
    """`/home/me/data/photos_64`, `https://me:word@host/photos_64?key=…` → `photos_64`; the prefix `imported:` stays."""
    if path.startswith(IMPORTED):
        return IMPORTED + last_name(path.removeprefix(IMPORTED))
    if "://" in path:
        path = urlsplit(path).path
    return path.replace("\\", "/").rstrip("/").rpartition("/")[2]


def public(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json with only the last part of every path and address, also of the folders it names."""
    shown = {key: last_name(str(value)) if key in PATHS else value for key, value in values.items()}
    return shown | {key: public(values[key]) for key in NAMED if isinstance(values.get(key), Mapping)}


# Cards


@dataclass(frozen=True)
class Card:
    """A card to write; without a `picture`, an existing one stays."""

    text: str
    picture: Image | None

    def write(self, folder: Path) -> None:
        """Write picture and README.md into `folder`, each whole or not at all."""
        if self.picture is not None:
            save_png(self.picture, folder / PICTURE)
        write_text(folder / CARD, self.text)


def card_beside(
    folder: Path,
    checkpoint: Path,
    *,
    usage: Mapping[str, str],
    license_name: str | None,
    anew: bool,
    tags: Sequence[str],
) -> Card:
    """The card for a file to be exported to `folder`: a new one, or the existing one with another section.

    Args:
        license_name: None: the licence of an existing card, else unknown.
        anew: replace a card of the same weights; the sections of files that still exist are kept.

    Raises:
        VdiffError: the existing README.md is not a card of these weights.
    """
    path = folder / CARD
    if not path.exists():
        check_free(folder / PICTURE, image_files.PICTURE, overwrite=True, flag="another folder, or give --card False")
        return new_card(checkpoint, usage=usage, license_name=license_name or UNKNOWN, tags=tags)
    text = _text(path)
    if MARK.format(weights_fingerprint(checkpoint)) not in text:
        raise VdiffError(
            f"{path} is not the model card of {checkpoint}, which an export writes",
            "give a file in a separate folder, or --card False",
        )
    sections = {name: body for name, body in _sections(text) if (folder / name).exists()} | dict(usage)
    if anew or license_name is not None or not (folder / PICTURE).exists():
        return new_card(checkpoint, usage=sections, license_name=license_name or _license_of(text), tags=tags)
    return Card(text.partition(USE)[0] + USE + _written(sections), None)


def new_card(
    checkpoint: Path,
    *,
    usage: Mapping[str, str],
    license_name: str = UNKNOWN,
    library: str = "vdiff",
    tags: Sequence[str] = (),
) -> Card:
    """The card of `checkpoint`; its picture is drawn from the noise of seed 0.

    Args:
        usage: for each exported file (or the folder), its heading and how to use it, as Markdown.
        library: the library that loads the files: the hub's `library_name`.

    Raises:
        OptionError: the licence is not an identifier.
        VdiffError: the checkpoint cannot be used.
    """
    from huggingface_hub import ModelCardData

    if not IDENTIFIER.fullmatch(license_name):
        raise OptionError(f"--license {license_name!r} is not an identifier", "give one such as mit or cc-by-4.0")
    config = read_config(checkpoint)
    if _has_pictures(config):
        denoiser, config = load_checkpoint(checkpoint)
    else:
        with torch.device("meta"):  # its weights are only counted
            denoiser = config.build()
    fingerprint, name = weights_fingerprint(checkpoint), checkpoint.resolve().name
    ladder = _read_ladder(checkpoint, config)
    picture, steps = _picture(denoiser, config)
    shown = f"![{PICTURE_IMAGES} images]({PICTURE})\n\n*DDIM, {plural(steps, 'step')}, noise of seed 0.*\n\n"
    licence = license_name
    if license_name.lower() == UNKNOWN:
        licence = "Unknown. Ask the author of these weights how you may use them."
    is_sound = config.space.is_sound
    distilled = [] if config.method == "base" else ["distillation", f"{_plain(config.method)}-distillation"]
    data = ModelCardData(
        license=license_name.lower(),
        library_name=library,
        pipeline_tag=None if is_sound else TEXT_TASK if config.kind == TEXT else TASK,  # no task has sounds alone
        tags=["diffusion", "v-diffusion", *distilled, *["audio"] * is_sound, *tags],
        **_eval_results(name, config, ladder),
    )
    front = data.to_yaml(original_order=["license", "library_name", "pipeline_tag", "tags"])
    parts = [
        f"---\n{front}\n---\n{MARK.format(fingerprint)}\n",
        f"# {_cell(name)}\n",
        f"{_summary(config)}\n",
        f"{shown if picture else ''}{_facts(denoiser, config, fingerprint)}",
        f"## Lineage\n\n{_lineage(name, config, fingerprint)}",
        *([f"## Distances\n\n{SAME_NOISE}\n", _distances(ladder)] if ladder else []),
        f"## Licence\n\n{licence}\n",
    ]
    return Card("\n".join(parts) + USE + _written(usage), picture)


def is_card(path: Path) -> bool:
    """Whether `path` is a model card that vdiff wrote."""
    return MARKED.search(_text(path)) is not None


def _text(path: Path) -> str:
    """The text of the file at `path`; empty if there is none."""
    try:
        return read_text(path)
    except (OSError, ValueError):
        return ""


def _license_of(text: str) -> str:
    """The licence in a card's metadata, which people may have changed."""
    from huggingface_hub import ModelCard

    try:
        name = str(ModelCard(text, ignore_metadata_errors=True).data.get("license", UNKNOWN))
    except Exception:  # lines that are not a YAML mapping raise errors of several libraries
        return UNKNOWN
    return name if IDENTIFIER.fullmatch(name) else UNKNOWN


def license_of_base(config: CheckpointConfig) -> str | None:
    """The licence in the README.md of the pipeline that a model was made from; None: it states none."""
    folder = (config.components or {}).get("path")
    text = _text(Path(folder) / CARD) if folder else ""
    name = _license_of(text) if text.startswith("---") else UNKNOWN
    return None if name == UNKNOWN else name


# The contents of a card


def sizes_of(config: CheckpointConfig) -> str:
    """`32 × 32`: the sizes of a sample without its channels."""
    return " × ".join(map(str, config.shape[1:]))


def _summary(config: CheckpointConfig) -> str:
    """The model in one sentence."""
    of = f" of {len(config.class_names)} classes" if config.class_names else ""
    how = "a base model" if config.method == "base" else f"distilled ({_cell(config.method)})"
    steps = plural(config.num_timesteps, "step")
    if config.kind == TEXT:
        lora = f" It was trained as a LoRA of rank {config.adapter.rank}." if config.adapter else ""
        return f"A diffusion model that generates images of a text, in {steps}: {how}.{lora}"
    what, unit = ("sounds", "samples") if config.space.is_sound else ("images", "pixels")
    return f"A diffusion model that generates {what}{of}, {sizes_of(config)} {unit}, in {steps}: {how}."


def _facts(denoiser: Denoiser, config: CheckpointConfig, fingerprint: str) -> str:
    """The table of the model's facts."""
    schedule = ", ".join(f"{key} {value}" for key, value in config.schedule.items() if key != "name")
    names = [_cell(name) for name in config.class_names]
    listed = ", ".join(names[:MAX_NAMES]) + (", …" if len(names) > MAX_NAMES else "")
    updates = f"{config.num_iters:,}" + ("" if config.is_finished else f" of {config.target_iters:,}") + " updates"
    rows = {
        "steps": f"{config.num_timesteps}" + (", or any other number" if config.takes_any_num_steps else ""),
        "method": _cell(config.method),
        "parameters": f"{parameter_count(denoiser):,}",
        "predicts": config.family.summary() if config.parameterisation else config.prediction,
        "noise schedule": _cell(f"{config.schedule['name']}" + (f" ({schedule})" if schedule else "")),
        {LATENTS.name: "latents", WAVEFORM.name: "sounds"}.get(config.codec, "images"): (
            f"{sizes_of(config)}, {plural(config.shape[0], 'channel')}"
        ),
        "classes": f"{len(names)}: {listed}" if names else "",
        "guidance": "takes a weight from {} to {}".format(*config.guidance_range) if config.guidance_range else "",
        "weights": f"{_cell(config.weights)}, {updates}, {config.num_images:,} images",
        "dataset": _cell(last_name(config.dataset)),
        "dataset's fingerprint": _code(config.dataset_fingerprint),
        "weights' SHA-256": _code(fingerprint),
        "vdiff": _cell(config.vdiff_version),
    }
    return _table(["", ""], [[key, value] for key, value in rows.items() if value])


def _lineage(name: str, config: CheckpointConfig, fingerprint: str) -> str:
    """The model and its teachers, back to the original."""
    rows = []
    model: Any = {**asdict(config), "path": name, "fingerprint": fingerprint}
    while isinstance(model, Mapping):
        numbers = [model.get(key) for key in ("num_timesteps", "num_iters")]
        steps, updates = (f"{number:,}" if isinstance(number, int) else "" for number in numbers)
        short = str(model.get("fingerprint", ""))[:12]
        weights = f"`{short}`" if re.fullmatch("[0-9a-f]{12}", short) else ""
        path, method = last_name(str(model.get("path", ""))), str(model.get("method", ""))
        rows.append([_cell(path), steps, _cell(method), updates, weights])
        model = model.get("teacher")
    return _table(["model", "steps", "method", "updates", "weights"], rows)


def _read_ladder(checkpoint: Path, config: CheckpointConfig) -> list[dict[str, Any]]:
    """The rows of the ladder that ends with the checkpoint, from its folder; empty without distances."""
    try:
        rows: list[dict[str, Any]] = parse(read_text(checkpoint / LADDER))
        if rows[-1]["num_steps"] == config.num_timesteps and _distance_keys(rows):
            return [{**row, "model": last_name(str(row["checkpoint"])), "steps": int(row["num_steps"])} for row in rows]
    except (OSError, ValueError, TypeError, LookupError, AttributeError):
        pass
    return []


def _distance_keys(ladder: Sequence[Mapping[str, Any]]) -> list[str]:
    """The columns of a ladder with distances of its last model."""
    return [key for key, value in ladder[-1].items() if key not in NO_DISTANCES and isinstance(value, float)]


def _distances(ladder: Sequence[Mapping[str, Any]]) -> str:
    """The table of all distances in a ladder."""
    keys, table = _distance_keys(ladder), []
    for row in ladder:
        distances = [f"{value:.4f}" if isinstance(value := row.get(key), float) else "" for key in keys]
        table.append([_cell(row["model"]), str(row["steps"]), *distances])
    return _table(["model", "steps", *(_cell(_metric_name(key)) for key in keys)], table)


def _eval_results(name: str, config: CheckpointConfig, ladder: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The distances of a ladder's last model, in the hub's format."""
    from huggingface_hub import EvalResult

    if not ladder:
        return {}
    dataset = printable(last_name(config.dataset)) or UNKNOWN
    results = [
        EvalResult(
            task_type=TASK,
            dataset_type=_plain(dataset),
            dataset_name=dataset,
            metric_type=_plain(key, "_"),
            metric_name=printable(_metric_name(key)),
            metric_value=round(ladder[-1][key], 4),
        )
        for key in _distance_keys(ladder)
    ]
    return {"model_name": printable(name), "eval_results": results}


def _metric_name(key: str) -> str:
    return key.replace("_", " ").replace("rmse", "RMSE")


def _has_pictures(config: CheckpointConfig) -> bool:
    """Whether samples are grey or RGB images, and not drawn from condition images, which a card does not have."""
    return len(config.shape) == 3 and config.shape[0] in (1, 3) and IMAGE not in config.signature.names


def _picture(denoiser: Denoiser, config: CheckpointConfig) -> tuple[Image | None, int]:
    """A grid of images, and the number of steps: the model's own, or the largest possible one up to 64.

    None if so few steps cannot give a useful picture, or if the images are neither grey nor RGB.
    """
    own = config.num_timesteps
    steps = own
    if own > PICTURE_STEPS:
        any_will_do = config.takes_any_num_steps
        steps = PICTURE_STEPS if any_will_do else max(k for k in range(1, PICTURE_STEPS + 1) if own % k == 0)
    if not _has_pictures(config) or (steps < own and steps < FEWEST_STEPS):
        return None, steps
    at_once = max(1, PIXELS_AT_ONCE // math.prod(config.shape[1:]))
    parts = [range(first, min(first + at_once, PICTURE_IMAGES)) for first in range(0, PICTURE_IMAGES, at_once)]
    size = config.shape[1:]
    images = torch.cat([draw(denoiser, Ddim(), indices=part, image_size=size, num_steps=steps) for part in parts])
    return to_pil(make_grid(images, columns=round(PICTURE_IMAGES**0.5), scale=cell_scale(images))), steps


# Markdown


def _sections(text: str) -> Iterator[tuple[str, str]]:
    """Name and text of each file's section under the heading Use."""
    for part in ("\n" + text.partition(USE)[2]).split("\n### ")[1:]:
        name, _, body = part.partition("\n")
        yield name.strip("` "), body.strip("\n")


def _written(sections: Mapping[str, str]) -> str:
    return "".join(f"\n### `{name}`\n\n{body.strip()}\n" for name, body in sections.items())


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _cell(text: str) -> str:
    """Text of an untrusted configuration, escaped for a table."""
    plain = printable(" ".join(text.split())).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|~])", r"\\\1", plain)


def _code(text: str) -> str:
    """A checksum, reduced to letters and digits, as code."""
    return f"`{plain}`" if (plain := re.sub(r"[^0-9A-Za-z:._-]", "", text)) else ""


def _plain(text: str, joint: str = "-") -> str:
    """Lower-case letters and digits, with `joint` for everything else."""
    return re.sub("[^a-z0-9]", joint, text.lower())
