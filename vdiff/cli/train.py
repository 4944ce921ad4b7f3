"""`train.py`: train the base model, the first teacher."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console, aligned
from vdiff.cli.options import PATH, Command, option, project_option, switch
from vdiff.cli.quality import quality_of
from vdiff.cli.settings import config_option, given, settings
from vdiff.errors import Interrupted, OptionError, shell
from vdiff.projects import Project
from vdiff.text import duration, quantity
from vdiff.training.config import TrainConfig

if TYPE_CHECKING:
    from vdiff.models.checkpoint import CheckpointConfig

EVALUATIONS, SHARE = 3, 25
"""An update costs so many network evaluations an image; the verdict costs at most one part in so many of all."""


@click.command(
    cls=Command,
    first="name out config resume overwrite dry_run data preset image_size class_conditional num_iters batch_size "
    "grad_accum lr ema flip sample_interval ckpt_interval seed device precision compile checkpointing",
    examples=[
        "python train.py                   # the only dataset under data/",
        "python train.py --data data/photos_64 --batch_size 64 --lr 1e-4",
        "python train.py --preset cifar10 --dry_run        # what it would cost",
        "python train.py --resume          # go on after Ctrl-C",
        "python train.py --config checkpoints/original/run.toml --out checkpoints/b",
    ],
)
@project_option()
@option(
    "--out",
    group="Run",
    type=PATH,
    metavar="FOLDER",
    show_default="checkpoints/original",
    help="The checkpoint's folder.",
)
@config_option
@switch("--resume", group="Run", help="Continue the run in --out.")
@switch("--overwrite", group="Run", help="Replace what is in --out.")
@switch(
    "--dry_run", group="Run",
    help="Print what would be trained and its cost, then stop; with --preset it needs no dataset.",
)  # fmt: skip
@settings(TrainConfig)
def command(
    project: Project,
    out: Path | None,
    config_file: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    **flags: Any,
) -> None:
    """Train a diffusion UNet on a dataset that prepare_data.py wrote.

    Settings come from flags, then VDIFF_* environment variables, then --config, then the preset. The folder gets
    model.safetensors (averaged weights), config.json, run.toml (all settings), samples/ and log/ (TensorBoard).
    """
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other", "give one of them")

    from vdiff.distributed import pick_device
    from vdiff.training.base import describe, resolve_training, train
    from vdiff.training.run_log import preview_steps

    console = Console()
    out = out or project.original
    config, images = resolve_training(
        given(flags), config_file, folder=out, resume=resume, assume=dry_run, reporter=console, project=project
    )
    description = describe(config, images)
    if dry_run:
        console.result(*costs(config, description))
        return
    done = train(config, images, folder=out, resume=resume, overwrite=overwrite, reporter=console)
    console.result(f"{out}: {done.num_iters} updates in {duration(done.train_seconds)}")
    data, budget = images.name if images.store else "", done.num_images * EVALUATIONS // SHARE
    try:
        verdict = quality_of(out, data, budget, device=pick_device(config.device), console=console)
    except Interrupted as stop:
        raise Interrupted(f"stopped; {out} is finished and saved", stop.exit_code) from None
    if verdict:
        console.result(f"verdict    {verdict}")
    steps = preview_steps(done)
    console.result(
        f"next       python sample.py {shell('--checkpoint', out)} --sampler dpmpp_2m --num_timesteps {steps}"
    )
    console.result(f"           python distill.py {shell('--base', out)}")


def costs(config: TrainConfig, description: CheckpointConfig) -> list[str]:
    """The network, the settings and what training and sampling cost, as aligned lines."""
    from dataclasses import asdict

    from vdiff.models.backbone import count_flops

    parameters, flops = count_flops(lambda: description.build().network, description.shape)
    steps = config.num_timesteps
    rows = {
        "parameters": f"{quantity(parameters)} ({parameters:,})",
        "FLOPs": f"{quantity(flops)} an evaluation, {quantity(flops * steps)} a sample of {steps} steps",
        "images seen": f"{quantity(config.num_iters * config.batch_size)}: "
        f"{config.num_iters:,} updates of {config.batch_size}",
        "schedule": ", ".join(f"{key} {value}" for key, value in description.schedule.items()),
    }
    shown = {key: value for key, value in asdict(config).items() if key not in ("unet", "schedule", "data")}
    rows |= {key: "none" if value == "" else str(value) for key, value in shown.items()}
    rows |= {f"unet.{key}": str(value) for key, value in description.unet.items()}
    return aligned(rows)
