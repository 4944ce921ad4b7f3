"""`vdiff evaluate`: measure checkpoints; a table row for each checkpoint and number of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console
from vdiff.cli.options import (
    NUM,
    OLD_NUM,
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
    *("isc", "rmse", "psnr", "nearest", "nearest_features", "closest"),
)
HEADINGS = {"rmse": "RMSE", "psnr": "PSNR dB", "nearest_features": "nearest feat."}
OF_DATA = {
    "nearest_data": "median distance of an image to its nearest other",
    "nearest_data_features": "the same in features",
}


@click.command(
    cls=Command,
    examples=[
        "vdiff evaluate checkpoints/base_5 --data data/photos_64",
        "vdiff evaluate checkpoints/original --num_timesteps 4,8 --samplers ddim,heun",
        "vdiff evaluate checkpoints/base_* --teacher checkpoints/original",
        "vdiff evaluate checkpoints/base_5 --features features.pt2 --num 10000",
        "vdiff evaluate checkpoints/base_5 --features inception --num 50000 --json",
        "torchrun --standalone --nproc_per_node 8 -m vdiff evaluate -n 50000",
    ],
)
@click.argument("checkpoints", nargs=-1, type=Checkpoint())
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
    help="Features to compare: pixels (at most 8×8); a network in a torch.export file (see vdiff features) or a "
    "TorchScript file, which is code; or torch-fidelity's Inception.",
)  # fmt: skip
@option(
    "--weights", group="Measuring", type=click.Path(path_type=Path), metavar="FILE", show_default="downloaded",
    help="Inception's weights.",
)  # fmt: skip
@option(
    "--metrics", group="Measuring", type=Names(click.STRING, "METRIC[,METRIC…]"), show_default="all that apply",
    help="fd and kd (fid and kid on Inception's features), precision, recall, isc, rmse, psnr, nearest.",
)  # fmt: skip
@option(
    "--teacher", group="Measuring", type=Checkpoint(), metavar="CHECKPOINT",
    help="Model whose samples from the same noise are compared with: rmse, psnr.",
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
@option(
    "--guidance", group="Samples", type=float, default=0.0, metavar="W",
    help="Weight of classifier-free guidance; 0 = none.",
)  # fmt: skip
@option(
    "--seed", group="Samples", type=click.IntRange(0, 2**64 - 1), default=0, metavar="INTEGER",
    help="Seed of the noise, the same for all rows.",
)  # fmt: skip
@switch("--raw", group="Samples", help="Use the weights without average, which a training stores in state/.")
@switch("--ema", group="Samples", hidden=True, help="Use the checkpoint's own weights (the default).")
@option(
    "--batch_size", group="Samples", type=click.IntRange(1), default=64, metavar="IMAGES",
    help="Images that each process draws at once.",
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
    ema: bool,
    device: str,
    out: Path | None,
    json: bool,
    **options: Any,
) -> None:
    """Measure CHECKPOINTS (default: the newest) against a dataset.

    Prints a row for each checkpoint, number of steps and sampler, with 95 % intervals; all rows use the same noise. The
    same command continues after an interruption. Under torchrun or accelerate each process draws a share.
    docs/evaluation.md explains the metrics.
    """
    if options["raw"] and ema:
        raise OptionError("--raw and --ema exclude each other", "give one of them")
    if options["teacher_steps"] is not None and options["teacher"] is None:
        raise OptionError("--teacher_steps needs a teacher", "give --teacher CHECKPOINT too")
    if out is not None and out.suffix != ".json":
        raise OptionError(f"--out {out} is not a name for a JSON file", "give --out FILE.json")

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


def head(found: Evaluation) -> list[str]:
    """What was measured: data, features, models and samples."""
    reference = found.reference
    split = "" if reference.split == "all" else f", part {reference.split}"
    how = ", ".join(part for part in (reference.resize, reference.format) if part) or "made by another program"
    size = f"{reference.image_size}×{reference.image_size}×{reference.channels}"
    mark = reference.fingerprint[:SHORT] or "none"
    lines = [
        f"reference  {reference.name}{split}: {reference.num_images:,} images of {size}, {how}, fingerprint {mark}",
        f"features   {found.features}",
    ]
    models: dict[str, EvalRow] = {}
    for row in found.rows:
        models.setdefault(row.checkpoint, row)
    lines += [f"model      {name}: {row.weights}, {row.checkpoint_fingerprint[:SHORT]}" for name, row in models.items()]
    first = found.rows[0]
    guidance = f", guidance {first.guidance:g}" if first.guidance else ""
    lines.append(f"samples    {first.n:,} a row, seed {first.seed}, {first.grid} grid{guidance}, {found.device}")
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
    columns = ["model", "sampler", "steps", "evals", *headings, "ms/image", "seconds"]
    columns += ["verdict"] if found.scale else []
    rows = []
    for row in found.rows:
        own = [Path(row.checkpoint).name, row.sampler, str(row.num_steps), f"{row.evaluations:g}"]
        figures = [str(row.metrics[name]) if name in row.metrics else "" for name in names]
        rows.append([*own, *figures, f"{row.ms_per_image:.2f}{DOUBTFUL * row.is_time_doubtful}", f"{row.seconds:.1f}"])
        if found.scale:
            rows[-1].append(quality.word if (quality := found.quality(row)) else "")
    return columns, rows
