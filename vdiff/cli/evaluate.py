"""`vdiff evaluate`: measure checkpoints; a table row for each checkpoint and number of steps."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vdiff.cli.console import Console
from vdiff.cli.drawing import guidance_options, guidance_weight, prompts_of, text_options
from vdiff.cli.options import (
    NUM,
    OLD_NUM,
    PATH,
    Checkpoint,
    Command,
    Names,
    OneOf,
    option,
    project_option,
    switch,
    typed_command,
)
from vdiff.cli.sample import DEVICES, PRECISIONS
from vdiff.cli.vdiffusion import home_of, imported
from vdiff.data.labels import SAMPLES_FILE
from vdiff.diffusion.grids import GRIDS
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import OptionError
from vdiff.projects import Project
from vdiff.reporting import DOUBTFUL
from vdiff.text import plural

if TYPE_CHECKING:
    from vdiff.evaluation.results import EvalRow, Evaluation

SHORT = 12
ORDER = (
    *("fd", "fid", "fd_inf", "fid_inf", "kd", "kid", "precision", "recall"),
    *("isc", "clip", "rmse", "psnr", "lsd", "psnr_truth", "nearest", "nearest_features", "closest"),
)
HEADINGS = {
    "clip": "CLIP score",
    "rmse": "RMSE",
    "psnr": "PSNR dB",
    "lsd": "LSD dB",
    "psnr_truth": "PSNR to truth",
    "nearest_features": "nearest feat.",
}
OF_DATA = {
    "clip_data": "CLIP score of images and their captions",
    "nearest_data": "median distance of an image to its nearest other",
    "nearest_data_features": "median distance to the nearest other in features",
}


@click.command(
    cls=Command,
    first="name data features metrics clip teacher teacher_steps num num_timesteps samplers guidance guidance_scale "
    "seed batch_size device prompts negative_prompt out overwrite json",
    examples=[
        "vdiff evaluate checkpoints/base_5 --data data/photos_64",
        "vdiff evaluate checkpoints/original --num_timesteps 4,8 --samplers ddim,heun",
        "vdiff evaluate checkpoints/base_* --teacher checkpoints/original",
        "vdiff evaluate checkpoints/base_5 --features features.pt2 --num 10000",
        "vdiff evaluate checkpoints/base_5 --features inception --num 50000 --json",
        "vdiff evaluate checkpoints/sd_lora checkpoints/sd --prompts prompts.txt",
        "torchrun --standalone --nproc_per_node 8 -m vdiff evaluate -n 50000",
    ],
)
@click.argument("checkpoints", nargs=-1, type=Checkpoint(takes_samples=True))
@project_option()
@option(
    "--data", group="Reference", metavar="DATASET", show_default="the first model's training data",
    help="Real images: a folder that prepare_data.py wrote, or tar shards.",
)  # fmt: skip
@option(
    "--cache", group="Reference", type=click.Path(path_type=Path), metavar="FOLDER",
    show_default="vdiff in the user's cache folder",
    help="Where statistics of datasets are cached.",
)  # fmt: skip
@option(
    "--features", group="Measuring", default="pixels", metavar="pixels|inception|FILE",
    help="Features to compare: pixels (at most 8×8; of sounds, mel spectrograms of 20 bands × 4 times); a network in a "
    "torch.export file (see vdiff features) or a TorchScript file, which is code; or torch-fidelity's Inception.",
)  # fmt: skip
@option(
    "--weights", group="Measuring", type=click.Path(path_type=Path), metavar="FILE", show_default="downloaded",
    help="Inception's weights.",
)  # fmt: skip
@option(
    "--metrics", group="Measuring", type=Names(click.STRING, "METRIC[,METRIC…]"), show_default="all that apply",
    help="fd and kd (fid and kid on Inception's features), precision, recall, isc, clip, rmse, psnr, lsd (sounds: "
    "log-spectral distance), psnr_truth, nearest.",
)  # fmt: skip
@option(
    "--clip", group="Measuring", type=PATH, metavar="FOLDER",
    help="A CLIP model in transformers' format: the CLIP score measures how well images match their prompts.",
)  # fmt: skip
@option(
    "--teacher", group="Measuring", type=Checkpoint(), metavar="CHECKPOINT",
    help="Compare all samples with those of this model from the same noise: rmse, psnr, lsd.",
)  # fmt: skip
@option(
    "--teacher_steps", group="Measuring", type=click.IntRange(1), metavar="STEPS", show_default="its own",
    help="DDIM steps of the teacher.",
)  # fmt: skip
@option(
    *NUM, old=OLD_NUM, group="Samples", type=click.IntRange(1), default=2000, metavar="IMAGES",
    help="Samples per row; under torchrun use -n.",
)  # fmt: skip
@option(
    "--num_timesteps", group="Samples", type=Names(click.IntRange(1), "STEPS[,STEPS…]"),
    show_default="each model's own",
    help="Sampling steps; those that a distilled model does not support are skipped.",
)  # fmt: skip
@option(
    "--samplers", group="Samples", type=Names(OneOf(list(SAMPLERS)), "SAMPLER[,SAMPLER…]"), default="ddim",
    help="Samplers.",
)  # fmt: skip
@option("--grid", group="Samples", type=OneOf(list(GRIDS)), default="uniform", help="Spacing of the steps.")
@guidance_options("Samples")
@option(
    "--prompts", "prompts_file", group="Text", type=PATH, metavar="FILE", show_default="captions of --data, at random",
    help="A text file with one prompt per line, which the samples take in turn.",
)  # fmt: skip
@text_options
@option(
    "--seed", group="Samples", type=click.IntRange(0, 2**64 - 1), default=0, metavar="INTEGER",
    help="Seed of the noise and of the order of captions, the same for all rows.",
)  # fmt: skip
@switch("--raw", group="Samples", help="Use the raw weights instead of the EMA; a training stores them in state/.")
@switch("--ema", group="Samples", hidden=True, help="Use the checkpoint's own weights (the default).")
@option(
    "--batch_size", group="Samples", type=click.IntRange(1), metavar="IMAGES",
    show_default="64; 4 for latent models",
    help="Images in a batch of each process.",
)  # fmt: skip
@option("--device", group="Samples", type=OneOf(DEVICES), default="auto", help="Auto takes a GPU if there is one.")
@option("--precision", group="Samples", type=OneOf(PRECISIONS), default="auto", help="As in sample.py.")
@option(
    "--out", group="Output", type=click.Path(path_type=Path), metavar="FILE.json",
    show_default="evaluation.json beside the first checkpoint",
    help="Results with intervals; beside it NAME-nearest.png shows the samples nearest to the data.",
)  # fmt: skip
@switch("--overwrite", group="Output", help="Replace another evaluation in --out.")
@switch("--json", group="Output", help="Print the contents of --out instead of a table.")
def command(
    checkpoints: tuple[Path, ...],
    project: Project,
    data: str | None,
    num_timesteps: tuple[int, ...] | None,
    samplers: tuple[str, ...],
    guidance: float | None,
    guidance_scale: float | None,
    prompts_file: Path | None,
    ema: bool,
    device: str,
    out: Path | None,
    json: bool,
    **options: Any,
) -> None:
    """Measure CHECKPOINTS (default: the newest) against a dataset.

    Prints a row for each checkpoint, number of steps and sampler, with 95 % intervals; all rows use the same noise. The
    same command continues after an interruption. Under torchrun or accelerate the processes share the work.
    docs/evaluation.md explains the metrics.

    With --clip, CHECKPOINTS may also be folders of images that sample.py --prompt wrote.
    """
    if drawn := [folder for folder in checkpoints if (folder / SAMPLES_FILE).is_file()]:
        score_samples(drawn, options["clip"], device=device, json=json)
        return
    if options["raw"] and ema:
        raise OptionError("--raw and --ema exclude each other", "give one of them")
    if options["teacher_steps"] is not None and options["teacher"] is None:
        raise OptionError("--teacher_steps needs a teacher", "give --teacher CHECKPOINT too")
    if out is not None and out.suffix != ".json":
        raise OptionError(f"--out {out} is not a name for a JSON file", "give --out FILE.json")

    prompts = tuple(prompts_of((), prompts_file))
    weight = guidance_weight(guidance, guidance_scale)

    from vdiff.distributed import join
    from vdiff.evaluation.measure import evaluate
    from vdiff.evaluation.results import FILE
    from vdiff.models.checkpoint import read_config

    console = Console()
    folders = list(dict.fromkeys(checkpoints)) or [project.newest(console.line)]
    target = out or home_of(folders[0], project).parent / FILE
    folders = [imported(folder, console.line) for folder in folders]
    found = evaluate(
        folders,
        data or project.dataset_of(read_config(folders[0]).dataset),
        num_timesteps=num_timesteps or (),
        samplers=tuple(dict.fromkeys(samplers)),
        guidance=weight,
        prompts=prompts,
        out=target,
        processes=join(device),
        reporter=console,
        command=typed_command(),
        n=options.pop("num"),
        metrics=options.pop("metrics") or (),
        **options,
    )
    if json:
        console.result(*found.to_json().rstrip().split("\n"), is_json=True)
        return
    for line in head(found):
        console.result(line)
    columns, rows = table(found)
    console.table("Evaluation", columns, rows, num_keys=3)
    for note in found.notes:
        console.result(f"note       {note}")
    if found.pairs is not None:
        console.result(f"pairs      {target.with_name(found.pairs)}")
    console.result(f"figures    {target}")


SCORING = ("checkpoints", "clip", "device", "json", "project")
"""Parameters that apply to folders of samples."""


def score_samples(folders: Sequence[Path], clip: Path | None, *, device: str, json: bool) -> None:
    """Print the CLIP score of folders of samples and the prompts in their records.

    Raises:
        OptionError: an option does not apply to samples, or a folder has no prompts.
    """
    context = click.get_current_context()
    if others := [folder for folder in context.params["checkpoints"] if folder not in folders]:
        raise OptionError(f"{folders[0]} holds samples, and {others[0]} is a model", "evaluate them separately")
    for name in context.params.keys() - set(SCORING):
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            flag = "--prompts" if name == "prompts_file" else f"--{name}"
            raise OptionError(f"{flag} does not apply to the samples in {folders[0]}", "leave it out")
    if clip is None:
        raise OptionError(f"{folders[0]} holds samples, which only a CLIP model can score", "give --clip FOLDER")

    from dataclasses import asdict

    from vdiff.distributed import pick_device
    from vdiff.evaluation.clip import ClipScore
    from vdiff.sampling.packing import file_name, read_packed_record
    from vdiff.sampling.spec import spec_of

    work: list[tuple[Path, list[Path], list[str]]] = []
    for folder in folders:
        record = read_packed_record(folder)
        texts = spec_of(record).texts if record and record.get("prompts") else None
        if texts is None:
            raise OptionError(f"{folder} holds no samples of prompts", "give a folder that sample.py --prompt wrote")
        numbers = sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal())
        if not numbers:
            raise OptionError(f"{folder} holds no PNG files", "finish it with the same sample.py command")
        work.append((folder, [folder / file_name(k) for k in numbers], texts(numbers)))
    console, model = Console(), ClipScore(clip, pick_device(device))
    rows = []
    for folder, files, prompts in work:
        with console.progress(folder.name, len(files), "images") as bar:
            rows.append((folder, len(files), model.score_files(files, prompts, bar)))
    if json:
        found = [{"samples": folder.as_posix(), "n": n, "clip": asdict(score)} for folder, n, score in rows]
        as_json = jsonlib.dumps({"clip_fingerprint": model.fingerprint, "rows": found}, ensure_ascii=False)
        console.result(as_json, is_json=True)
        return
    cells = [[folder.as_posix(), f"{n:,}", str(score)] for folder, n, score in rows]
    console.table("CLIP score", ["samples", "images", HEADINGS["clip"]], cells, num_keys=1)


def head(found: Evaluation) -> list[str]:
    """What was measured: data, features, models and samples."""
    reference = found.reference
    split = "" if reference.split == "all" else f", part {reference.split}"
    how = ", ".join(part for part in (reference.resize, reference.format) if part) or "made by another program"
    size = f"{reference.image_size}×{reference.image_size}×{reference.channels}"
    noun = reference.noun
    size = f"{reference.image_size}×{reference.channels}" if noun == "sound" else size
    mark = reference.fingerprint[:SHORT] or "none"
    lines = [
        f"reference  {reference.name}{split}: {reference.num_images:,} {noun}s of {size}, {how}, fingerprint {mark}",
        f"features   {found.features}",
    ]
    models: dict[str, EvalRow] = {}
    for row in found.rows:
        models.setdefault(row.checkpoint, row)
    lines += [f"model      {name}: {row.weights}, {row.checkpoint_fingerprint[:SHORT]}" for name, row in models.items()]
    first = found.rows[0]
    guidances = {f"{row.guidance:g}" for row in found.rows}
    guidance = f", guidance {', '.join(sorted(guidances))}" if guidances != {"0"} else ""
    lines.append(f"samples    {first.n:,} a row, seed {first.seed}, {first.grid} grid{guidance}, {found.device}")
    if found.prompts:
        away = f"; negative prompt {found.negative_prompt!r}" if found.negative_prompt else ""
        lines.append(f"prompts    {found.prompts}{away}")
    if found.teacher:
        lines.append(f"teacher    {found.teacher}, ddim, {plural(found.teacher_steps or 0, 'step')}")
    for name, what in OF_DATA.items():
        if name in first.metrics:
            lines.append(f"data       {what}: {first.metrics[name]}")
    if found.scale:
        lines.append(f"scale      {found.scale}")
    lines.append(f"made       {found.date}, vdiff {found.vdiff_version}")
    return lines


def table(found: Evaluation) -> tuple[list[str], list[list[str]]]:
    """Headings and cells: values with half the width of their 95 % intervals."""
    names = list(dict.fromkeys(name for row in found.rows for name in row.metrics if name not in OF_DATA))
    names.sort(key=ORDER.index)
    n = found.rows[0].n
    headings = [f"{name}@{n}" if name in ("fd", "fid") else HEADINGS.get(name, name) for name in names]
    columns = ["model", "sampler", "steps", "evals", *headings, f"ms/{found.reference.noun}", "seconds"]
    columns += ["verdict"] if found.scale else []
    rows = []
    for row in found.rows:
        own = [Path(row.checkpoint).name, row.sampler, str(row.num_steps), f"{row.evaluations:g}"]
        figures = [str(row.metrics[name]) if name in row.metrics else "" for name in names]
        rows.append([*own, *figures, f"{row.ms_per_image:.2f}{DOUBTFUL * row.is_time_doubtful}", f"{row.seconds:.1f}"])
        if found.scale:
            rows[-1].append(quality.word if (quality := found.quality(row)) else "")
    return columns, rows
