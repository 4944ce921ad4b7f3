"""`vdiff inspect`: describe a checkpoint and its teachers, or a file of another program."""

from __future__ import annotations

import json as jsonlib
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console, aligned
from vdiff.cli.options import Checkpoint, Command, OneOf, option, project_option, switch
from vdiff.cli.vdiffusion import imported
from vdiff.errors import OptionError
from vdiff.models.kinds import EDM2, IMAGE_V1, LUCIDRAINS, SONG, TEXT, UNET
from vdiff.projects import Project
from vdiff.records import STATE
from vdiff.text import duration, megabytes, plural

if TYPE_CHECKING:
    from vdiff.interop.recognition import Foreign
    from vdiff.interop.recognition import Reading as ProgramReading
    from vdiff.models.checkpoint import CheckpointConfig

SHOWN_CLASSES = 8
INFINITE = 1e12
"""σ/α at φ = π/2, as tan gives it, is above this."""


class Inspected(Checkpoint):
    """A checkpoint, or a file or pipeline folder of another program."""

    def find(self, value: Path | str, project: Project) -> Path | str:
        """As for checkpoints; what another program wrote is returned as it is."""
        return value if is_foreign(Path(value)) else super().find(value, project)


def is_foreign(path: Path) -> bool:
    """Whether it is a safetensors file, or a pipeline folder of diffusers."""
    return (path.is_file() and path.suffix == ".safetensors") or (path / "model_index.json").is_file()


@click.command(
    cls=Command,
    examples=[
        "vdiff inspect checkpoints/base_5",
        "vdiff inspect checkpoints/base_5 --json",
        "vdiff inspect model.safetensors --test",
        "vdiff inspect model.safetensors --repair out.safetensors --prediction v",
    ],
)
@click.argument("checkpoint", required=False, type=Inspected())
@project_option()
@switch(
    "--test",
    group="Files of other programs",
    help="Evaluate the UNet at its noisiest level, which distinguishes eps from v.",
)
@option(
    "--pipeline", group="Files of other programs", type=click.Path(path_type=Path), metavar="FOLDER",
    show_default="the usual sizes of the family", help="For --test: a pipeline with the configuration of the UNet.",
)  # fmt: skip
@option(
    "--repair", group="Files of other programs", type=click.Path(path_type=Path), metavar="OUT.safetensors",
    help="Write a copy with the keys, metadata and names that programs need, and OUT.yaml for A1111.",
)  # fmt: skip
@option(
    "--prediction", group="Files of other programs", type=OneOf(["v", "eps"]), show_default="what the file says",
    help="For --repair: what the model predicts.",
)  # fmt: skip
@switch("--zero_snr", group="Files of other programs", help="For --repair: the model has zero terminal SNR.")
@switch("--overwrite", group="Output", help="Replace a file that --repair wrote.")
@switch("--json", group="Output", help="Print one JSON object.")
def command(checkpoint: Path | None, project: Project, json: bool, **options: Any) -> None:
    """Describe CHECKPOINT (default: the newest) and its teachers, back to the first.

    It reads only config.json and the weights, for their checksum. Unfinished runs and imported models work too.

    CHECKPOINT may also be a .safetensors file or a pipeline folder of another program: a model of Stable Diffusion, or
    a LoRA. The command reads only its header, and prints what it is, what it predicts, and how ComfyUI, A1111 and
    diffusers interpret it.
    """
    console = Console()
    if checkpoint is not None and is_foreign(checkpoint):
        _foreign(console, checkpoint, json=json, **options)
        return
    for name, value in options.items():
        if value:
            raise OptionError(f"--{name} is for files and folders of other programs", "leave it out for a checkpoint")
    values = facts(imported(checkpoint or project.newest(console.line), console.line))
    if json:
        console.result(jsonlib.dumps(values, ensure_ascii=False), is_json=True)
        return
    console.result(*aligned(described(values)))
    if values["lineage"]:
        heads = ["model", "method", "steps", "updates", f"{_noun(values)}s", "training", "dataset", "weights"]
        console.table("Lineage", heads, [_ancestor(entry) for entry in [values, *values["lineage"]]])


def _foreign(
    console: Console,
    path: Path,
    *,
    json: bool,
    test: bool,
    pipeline: Path | None,
    repair: Path | None,
    prediction: str | None,
    zero_snr: bool,
    overwrite: bool,
) -> None:
    """Describe a file or a folder of another program, and write a repaired copy."""
    from vdiff.interop.recognition import readings, recognise

    useless = {
        "--pipeline": (pipeline is not None and not test, "--test"),
        "--prediction": (prediction is not None and repair is None, "--repair"),
        "--zero_snr": (zero_snr and repair is None, "--repair"),
        "--overwrite": (overwrite and repair is None, "--repair"),
    }
    for flag, (is_useless, other) in useless.items():
        if is_useless:
            raise OptionError(f"{flag} has no effect without {other}", f"add {other}, or leave it out")
    model, verdict = recognise(path), ""
    if test:
        from vdiff.interop.predicts import evaluated

        found = evaluated(model, pipeline)
        model, verdict = model.with_more(found.said), str(found)
    if repair is not None:
        from vdiff.interop.repair import repair as repaired

        changes = repaired(model, repair, prediction=prediction, zero_snr=zero_snr, overwrite=overwrite)
    programs = list(readings(model))
    if json:
        values = {
            "path": path.as_posix(), "what": model.what, "family": model.family and model.family.name,
            "kind": model.kind, "parts": list(model.parts), "layout": model.layout and model.layout.name,
            "rank": model.rank or None, "alpha": model.alpha, "steps": model.steps[0] or None,
            "prediction": model.prediction, "zero_snr": model.zero_snr, "said": [asdict(each) for each in model.said],
            "contradiction": model.contradiction or None, "test": verdict or None,
            "programs": [asdict(each) for each in programs], "notes": list(model.notes),
        }  # fmt: skip
        console.result(jsonlib.dumps(values, ensure_ascii=False), is_json=True)
    else:
        rows = foreign_rows(model, verdict) | {each.program: _reading(each) for each in programs}
        console.result(*aligned(rows))
    if repair is not None:
        console.line(f"{repair}: {', '.join(changes) or 'nothing was missing'}")


def _reading(each: ProgramReading) -> str:
    """What a program takes a model for; a wrong reading begins with a word that says so."""
    remedy = f"; {each.remedy}" if each.remedy else ""
    return f"{'WRONG: ' if each.is_wrong else ''}{each.says}{remedy}"


def foreign_rows(model: Foreign, verdict: str) -> dict[str, str]:
    """The facts about a file or a folder of another program, as rows."""
    rows = {"file": model.path.as_posix(), "what": model.what}
    if model.family is not None and not model.usual_sizes:
        rows["sizes"] = f"not those of {model.family.name}"
    if model.parts:
        rows["parts"] = ", ".join(model.parts)
    if model.layout is not None:
        alpha = f", alpha {model.alpha:g}" if model.alpha is not None else ""
        rows["LoRA"] = f"rank {model.rank}{alpha}"
    if model.steps[0]:
        guidance = f", guidance scale {model.guidance}" if model.guidance else ""
        rows["steps"] = f"{model.steps[0]}, according to {model.steps[1]}{guidance}"
    if model.kind == "other":
        return rows
    zero_snr = {True: ", zero terminal SNR", False: ", no zero terminal SNR", None: ""}[model.zero_snr]
    sources = ", ".join(
        dict.fromkeys(each.source for each in model.said if each.prediction or each.zero_snr is not None)
    )
    unknown = "nothing says what its base predicts" if model.kind == "LoRA" else "not stated: --test determines it"
    rows["predicts"] = f"{model.prediction}{zero_snr} ({sources})" if model.prediction else f"{unknown}{zero_snr}"
    if model.contradiction:
        rows["predicts"] = f"CONTRADICTION: {model.contradiction}"
    if verdict:
        rows["test"] = f"{verdict} (the UNet on noise, with zero text embeddings)"
    return rows | {f"note {k}": note for k, note in enumerate(model.notes, 1)}


def facts(folder: Path) -> dict[str, Any]:
    """The description of the checkpoint in `folder`, facts about its files, and `lineage`: its teachers in order.

    Raises:
        VdiffError: the checkpoint is missing, or one of its two files cannot be read.
    """
    from vdiff.evaluation.results import read_quality
    from vdiff.models.checkpoint import read_config, weights_fingerprint, weights_path
    from vdiff.models.reading import read_shapes

    config = read_config(folder)
    shapes = read_shapes(weights_path(folder))
    said, fingerprint = config.to_dict(), weights_fingerprint(folder)
    quality = read_quality(folder, fingerprint)
    own = {name: said[name] for name in (*OWN, *NETWORK) if name in said}
    return {
        "path": folder.as_posix(),
        "fingerprint": fingerprint,
        **own,
        "noise": noise_of(config),
        "approximated": approximated(config),
        "is_imported": config.is_imported,
        "is_finished": config.is_finished,
        "takes_any_num_steps": config.takes_any_num_steps,
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "weights_bytes": weights_path(folder).stat().st_size,
        "bytes": _bytes_below(folder),
        "verdict": {"word": quality.word, "text": str(quality), **asdict(quality)} if quality else None,
        "can_be_resumed": (folder / STATE).is_file(),
        "lineage": list(ancestors(config.teacher)),
    }


def noise_of(config: CheckpointConfig) -> dict[str, Any]:
    """The parameterisation, the range of σ/α from t = 1/L to t = 1 (null: infinite), and what the network receives."""
    from vdiff.diffusion.schedules import build_schedule

    schedule = build_schedule(config.schedule)
    least, most = (math.tan(angle) for angle in schedule.ends)
    values = {"family": config.family.summary(), "least": least, "most": most if most < INFINITE else None}
    return {**values, "told": config.family.describe(schedule)}


def approximated(config: CheckpointConfig) -> list[str]:
    """A sentence for each thing in which the model, or the imported one that it began as, is not exact."""
    from vdiff.diffusion.schedules import build_schedule
    from vdiff.interop.foreign import NO_VARIANCE

    found, teacher = list(config.approximated), config.teacher
    while teacher is not None:
        found += [each for each in teacher.get("approximated") or () if isinstance(each, str)]
        teacher = teacher.get("teacher")
    if config.network_config.get("drops_variance"):
        found.append(NO_VARIANCE)
    schedule = build_schedule(config.schedule)
    if (most := math.tan(schedule.ends[1])) < INFINITE:
        share = 1 / math.hypot(1, most)
        found.append(f"samples start from noise alone, without the part alpha = {share:.2g} of the data at t = 1")
    if schedule.num_levels and config.takes_any_num_steps:
        found.append(f"between its {schedule.num_levels:,} noise levels, angles are interpolated")
    return found


def ancestors(teacher: Mapping[str, Any] | None) -> Iterator[dict[str, Any]]:
    """The descriptions (without networks) of the teacher, then of its teacher, back to the original."""
    while teacher is not None:
        yield {key: teacher.get(key) for key in ("path", "fingerprint", *OWN) if key != "unet"}
        teacher = teacher.get("teacher")


def _bytes_below(folder: Path) -> int:
    """The size of all files below `folder`; files that a running training deletes meanwhile are ignored."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(OSError):
            total += path.stat().st_size if path.is_file() else 0
    return total


OWN = (
    *("method", "prediction", "parameterisation", "num_timesteps", "image_size", "schedule", "unet", "class_names"),
    *("guidance_range", "weights", "num_iters", "target_iters", "num_images", "train_seconds", "dataset"),
    *("dataset_fingerprint", "vdiff_version"),
)
"""The keys that are shown as they are in the checkpoint's config."""
NETWORK = ("backbone", "sample_shape", "codec", "sample_rate", "components", "adapter", "base")
"""The keys that only configs of other networks than a UNet on square images have."""


def described(values: Mapping[str, Any]) -> dict[str, str]:
    """The facts as rows."""
    names = values["class_names"]
    shape = values.get("sample_shape") or [values["unet"]["in_channels"], *[values["image_size"]] * 2]
    others = "any other number" if values["takes_any_num_steps"] else "a number that divides them"
    rows = {"checkpoint": values["path"], "model": _kind(values), **_network(values)}
    if names:
        more = ", …" if len(names) > SHOWN_CLASSES else ""
        rows["classes"] = f"{len(names)}: {', '.join(names[:SHOWN_CLASSES])}{more}"
    parameters = ", ".join(f"{key} {value}" for key, value in values["schedule"].items() if key != "name")
    pixels = f"{' × '.join(map(str, shape[1:]))} pixels, channels: {shape[0]}"
    is_latent, rate = values.get("codec") == "autoencoder", values.get("sample_rate", 0)
    if rate:
        pixels = f"{shape[1]:,} samples, {shape[1] / rate:.3g} s at {rate:,} Hz, channels: {shape[0]}"
    rows |= {
        **({"latents": " × ".join(map(str, shape))} if is_latent else {"sounds" if rate else "images": pixels}),
        "family": values["noise"]["family"],
        "schedule": f"{values['schedule']['name']} ({parameters})",
        "noise levels": _noise_levels(**values["noise"]),
        "approximated": "; ".join(values["approximated"]) or "nothing",
        "steps": f"{values['num_timesteps']}, or {others}",
    }
    if base := values.get("base"):
        rows["base"] = _folder(base)
    if lora := values.get("adapter"):
        rows["LoRA"] = f"rank {lora['rank']}, alpha {lora['alpha']:g}, layers: {', '.join(lora['targets'])}"
    if values["guidance_range"]:
        low, high = values["guidance_range"][0], values["guidance_range"][-1]
        rows["guidance"] = f"weights from {low:g} to {high:g} as an input"
    state = ", including training state" if values["can_be_resumed"] else ""
    rows |= {
        "weights": f"{values['weights']}, {values['parameters']:,} parameters, {megabytes(values['weights_bytes'])}",
        "fingerprint": values["fingerprint"],
        "on disk": f"{megabytes(values['bytes'])}{state}",
        "training": _training(values),
    }
    if values["verdict"]:
        rows["verdict"] = values["verdict"]["text"]
    if values["is_imported"] and values["lineage"]:  # otherwise the first row shows it
        rows["imported"] = values["dataset"].removeprefix("imported:")
    if not values["is_imported"]:
        fingerprint = values["dataset_fingerprint"]
        rows["dataset"] = f"{values['dataset']} (fingerprint {fingerprint})" if fingerprint else values["dataset"]
    return rows | {"written by": f"vdiff {values['vdiff_version']}"}


def _noise_levels(*, family: str, least: float, most: float | None, told: str) -> str:
    """Their range, and the network's timestep."""
    del family
    end = "infinity" if most is None else f"{most:.4g}"
    return f"sigma/alpha from {least:.4g} to {end}; the network receives {told}"


def _kind(values: Mapping[str, Any]) -> str:
    """Base model or student, with its teacher."""
    if not values["lineage"]:
        kind = "base model" if values["method"] == "base" else f"student, method {values['method']}"
        return f"{kind}, {values['dataset'].replace(':', ': ', 1)}" if values["is_imported"] else kind
    teacher = values["lineage"][0]
    return f"student of {_place(teacher)} ({teacher['num_timesteps']} steps), method {values['method']}"


def _place(model: Mapping[str, Any]) -> str:
    """A model's folder, according to its description."""
    return "a model in memory" if model.get("path") == "" else str(model.get("path") or "?")


def _folder(reference: Mapping[str, Any]) -> str:
    """The path and fingerprint of a folder that a checkpoint names."""
    return f"{reference['path']} (fingerprint {reference['fingerprint'][:12]})"


def _network(values: Mapping[str, Any]) -> dict[str, str]:
    """The network, in one or two rows."""
    from vdiff.models.unet_config import UNetConfig

    unet = values.get("unet") or values["backbone"]["config"]
    if (values.get("backbone") or {}).get("kind", UNET) != UNET:
        kind, config = values["backbone"]["kind"], values["backbone"]["config"]
        if kind == SONG:
            what = "NCSN++" if config["residual"] else "DDPM++"
            levels = f"{config['model_channels']} channels × {config['channel_mult']}"
            sizes = ", ".join(map(str, config["attn_resolutions"]))
            where = f"at {sizes} pixels and in the middle" if sizes else "in the middle alone"
            blocks = plural(config["num_blocks"], "block")
            return {"network": f"{what} ({kind}), {levels}, {blocks} a level, attention {where}"}
        if kind == EDM2:
            levels = f"{config['model_channels']} channels × {config['channel_mult']}"
            return {"network": f"EDM2 ({kind}), {levels}, {plural(config['num_blocks'], 'block')} a level"}
        if kind == IMAGE_V1:
            return {"network": f"{kind} of k-diffusion, widths {', '.join(map(str, config['channels']))}"}
        if kind == LUCIDRAINS:
            return {"network": f"{kind}, widths {', '.join(map(str, [config['init_dim'], *config['widths']]))}"}
        if kind != TEXT:
            return {"network": f"{kind}, {config.get('class')}"}
        rows = {
            "network": f"{kind}, {config['unet']['class']}",
            "text": ", ".join(
                f"{each['class']} of {each['config'].get('hidden_size') or each['config'].get('d_model')}"
                for each in config["text_encoders"]
            ),
        }
        if components := values.get("components"):
            rows["components"] = _folder(components)
        return rows
    config, usual = UNetConfig.from_dict(unet), UNetConfig()
    widths = ", ".join(str(config.channels * multiplier) for multiplier in config.multipliers)
    heads = f"{config.head_channels} channels a head" if config.head_channels else plural(config.num_heads, "head")
    strides = ", ".join(map(str, config.attention_strides))
    where = f"at strides {strides} and in the middle" if strides else "in the middle alone"
    shown = ("channels", "multipliers", "num_blocks", "attention_strides", "num_heads", "head_channels", "num_classes")
    mine, normal = config.to_dict(), usual.to_dict()
    others = [
        f"{k} {v}" for k, v in mine.items() if k not in (*shown, "in_channels", "out_channels") and v != normal.get(k)
    ]
    rows = {
        "network": f"UNet, widths {widths}, {plural(config.num_blocks, 'block')} a level, attention {where} ({heads})"
    }
    return rows | ({"options": ", ".join(others)} if others else {})


def _noun(values: Mapping[str, Any]) -> str:
    """What a model draws."""
    from vdiff.models.codec import CODECS, PIXEL_CODEC

    return CODECS.get(values.get("codec", ""), PIXEL_CODEC).noun


def _training(values: Mapping[str, Any]) -> str:
    """Updates, images and time."""
    if not values["num_iters"] and not values["target_iters"]:
        return "not by vdiff" if values["is_imported"] else "none"
    updates = plural(values["num_iters"], "update")
    if not values["is_finished"]:
        updates = f"unfinished: {values['num_iters']:,} of {plural(values['target_iters'], 'update')}"
    return f"{updates}, {plural(values['num_images'], _noun(values))}, {duration(values['train_seconds'])} spent"


def _ancestor(entry: Mapping[str, Any]) -> list[str]:
    """A model's row in the table of its lineage; values that an old or foreign description lacks stay empty."""

    def count(key: str) -> str:
        value = entry.get(key)
        return f"{value:,}" if isinstance(value, int) and value else ""

    seconds = entry.get("train_seconds")
    spent = duration(seconds) if isinstance(seconds, int | float) and 0 < seconds < math.inf else ""
    texts = [_place(entry), str(entry.get("method") or "?")]
    numbers = [str(entry.get("num_timesteps") or "?"), count("num_iters"), count("num_images"), spent]
    return [*texts, *numbers, str(entry.get("dataset") or ""), str(entry.get("fingerprint") or "")[:12]]
