"""`train.py`: train the base model, the first teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console, aligned
from vdiff.cli.options import PATH, Command, option, project_option, switch
from vdiff.cli.quality import quality_of
from vdiff.cli.settings import check_early, config_option, given, settings
from vdiff.errors import Interrupted, OptionError, VdiffError, shell
from vdiff.projects import Project
from vdiff.text import duration, quantity
from vdiff.training.config import EVALUATIONS, TrainConfig
from vdiff.training.presets import read_preset

if TYPE_CHECKING:
    from vdiff.models.checkpoint import CheckpointConfig
    from vdiff.training.dataset import TrainingData

SHARE = 25
"""The verdict uses at most 1/N of the run's network evaluations."""


@click.command(
    cls=Command,
    theirs="train",
    first="name out config resume overwrite dry_run data preset image_size class_conditional num_iters batch_size "
    "grad_accum lr ema flip sample_interval ckpt_interval seed device precision compile checkpointing",
    examples=[
        "python train.py                   # the only dataset under data/",
        "python train.py --data data/photos_64 --batch_size 64 --lr 1e-4",
        "python train.py --preset cifar10 --dry_run        # what it would cost",
        "python train.py --resume          # continue after Ctrl-C",
        "python train.py --config checkpoints/original/run.toml --out checkpoints/b",
        "python train.py --base checkpoints/original --data data/others --lora_rank 8",
    ],
)
@project_option()
@option(
    "--out",
    group="Run",
    type=PATH,
    metavar="FOLDER",
    show_default="checkpoints/original; with --base, BASE_lora or BASE_tuned",
    help="The checkpoint's folder.",
)
@config_option
@switch("--resume", group="Run", help="Continue the run in --out.")
@switch("--overwrite", group="Run", help="Replace what is in --out.")
@switch(
    "--dry_run", group="Run",
    help="Print the memory, time and disk that the training needs, then stop; with --preset no dataset is needed.",
)  # fmt: skip
@switch("--all", "every_setting", group="Run", help="With --dry_run: print every setting, without timing.")
@settings(TrainConfig)
def command(
    project: Project,
    out: Path | None,
    config_file: Path | None,
    resume: bool,
    overwrite: bool,
    dry_run: bool,
    every_setting: bool,
    **flags: Any,
) -> None:
    """Train a diffusion UNet on a dataset that prepare_data.py wrote, or fine-tune a checkpoint (--base).

    Settings come from flags, then VDIFF_* environment variables, then --config, then the preset. The folder gets
    model.safetensors (EMA weights), config.json, run.toml (all settings), samples/ and log/ (TensorBoard).
    """
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other", "give one of them")
    if not resume:
        check_early(TrainConfig, given(flags), config_file)
    if every_setting and not dry_run:
        raise OptionError("--all needs --dry_run", "give --dry_run too")

    from vdiff.replacing import is_free
    from vdiff.training.base import describe, resolve_training
    from vdiff.training.folder import check_new

    console = Console()
    out = out or folder_of_base(given(flags)) or project.original
    is_new = not resume and (overwrite or is_free(out))
    if not (resume or dry_run):
        check_new(out, overwrite=overwrite)
    config, images = resolve_training(
        given(flags), config_file, folder=out, resume=resume, assume=dry_run, reporter=console, project=project
    )
    if config.base and out.resolve() == Path(config.base).resolve():
        raise OptionError(f"--out {out} is the base itself", "choose another --out")
    description = describe(config, images)

    # torch is loaded here, when everything that needs no torch is known to be right
    from vdiff.distributed import pick_device
    from vdiff.models.condition import IMAGE, TOKENS
    from vdiff.training.base_training import base_task, train
    from vdiff.training.compilation import settled_compile
    from vdiff.training.engine import build_engine
    from vdiff.training.estimate import FEW_UPDATES, update_times
    from vdiff.training.run_log import preview_steps
    from vdiff.training.threads import settled_threads

    if is_new and not every_setting and config.num_iters >= FEW_UPDATES:
        threads = settled_threads(config, description.build, description.shape, console, None)
        config = replace(config, threads=threads)
    if dry_run:
        if every_setting:
            console.result(*aligned(costs(config, description)))
        else:
            console.result(*aligned(estimate(config, images, description, is_trial=True)[0]))
        return
    if is_new:
        rows, seconds = estimate(config, images, description, is_trial=False)
        for row in aligned(rows):
            console.line(row)
        compiles = settled_compile(
            config,
            build_engine(config),
            lambda engine: update_times(base_task(config, description.build()), description.shape, engine),
            updates=config.num_iters,
            seconds=seconds,
            num_networks=1,
            reporter=console,
        )
        config = replace(config, compile=compiles)
    done = train(config, images, folder=out, resume=resume, overwrite=overwrite, reporter=console)
    console.result(f"{out}: {done.num_iters} updates in {duration(done.train_seconds)}")
    data, budget = images.name if images.store else "", done.num_images * EVALUATIONS // SHARE
    try:
        verdict = quality_of(out, data, budget, device=pick_device(config.device), console=console)
    except Interrupted as stop:
        raise Interrupted(f"stopped; {out} is finished and saved", stop.exit_code) from None
    if verdict:
        console.result(f"verdict    {verdict.short}", f"scale      {verdict.scale}")
    draw = f"next       python sample.py {shell('--checkpoint', out)}"
    if TOKENS in done.signature.names:
        console.result(f"{draw} --prompt 'a red fox, watercolour'")
        return
    condition = " --condition FOLDER" * (IMAGE in done.signature.names)
    console.result(f"{draw}{condition} --sampler dpmpp_2m --num_timesteps {preview_steps(done)}")
    console.result(f"           python distill.py {shell('--base', out)}")


def folder_of_base(flags: dict[str, Any]) -> Path | None:
    """Where a fine-tuning goes: beside its base; None: nothing says that it is one."""
    if not (base := flags.get("base")):
        return None
    place = Path(base).resolve() if Path(base).name in ("", "..") else Path(base)
    preset = flags.get("preset")
    is_lora = flags.get("lora_rank") or flags.get("lora") or (preset and read_preset(preset).train.get("lora_rank"))
    return place.with_name(f"{place.name}_{'lora' if is_lora else 'tuned'}")


def estimate(
    config: TrainConfig, images: TrainingData, description: CheckpointConfig, *, is_trial: bool
) -> tuple[dict[str, str], float]:
    """The cost of a run: parameters, memory, disk and time, as rows; and the seconds of an update, 0 if not measured.

    Raises:
        VdiffError: memory is too small, unless it is a trial.
    """
    from vdiff.distributed import memory_errors_named
    from vdiff.training.base_training import base_task, memory_of_base
    from vdiff.training.compilation import may_compile
    from vdiff.training.engine import REMEDIES, build_engine
    from vdiff.training.estimate import FEW_UPDATES, check_memory, facts, time_facts, update_times
    from vdiff.training.presets import preset_for

    engine = build_engine(config)
    parameters, _ = count_costs(description)
    seen = f"{quantity(config.num_iters * config.batch_size)}, {config.num_iters:,} updates of {config.batch_size}"
    rows = {"parameters": quantity(parameters), f"{images.codec.noun}s seen": seen}
    smaller = (
        ""
        if config.preset.startswith(("small", "digits", "toy", "audio_tiny"))
        else preset_for(images.shape, images.num_images, "cpu")
    )
    try:
        memory = check_memory(
            lambda config: memory_of_base(config, images, description, engine), config, engine, smaller
        )
    except VdiffError as error:
        if not is_trial:
            raise
        return {**rows, "memory": str(error)}, 0.0
    rows |= facts(memory, config, engine)
    if not is_trial and config.num_iters < FEW_UPDATES:
        return rows, 0.0
    with memory_errors_named(REMEDIES):
        _, seconds = update_times(base_task(config, description.build()), description.shape, engine)
    rows |= time_facts(seconds * config.num_iters, config.num_iters, engine.device.type)
    if is_trial and may_compile(config, engine, seconds * config.num_iters):
        rows["compiling"] = "will be tried first, because the run is long; --compile False skips this"
    return rows, seconds


def count_costs(description: CheckpointConfig) -> tuple[int, int]:
    """Parameters, and FLOPs of an evaluation."""
    from vdiff.models.backbone import count_flops

    return count_flops(lambda: description.build().network, description.shape)


def costs(config: TrainConfig, description: CheckpointConfig) -> dict[str, str]:
    """The network, the settings and what training and sampling cost."""
    from dataclasses import asdict

    parameters, flops = count_costs(description)
    steps = config.num_timesteps
    rows = {
        "parameters": f"{quantity(parameters)} ({parameters:,})",
        "FLOPs": f"{quantity(flops)} an evaluation, {quantity(flops * steps)} a sample of {steps} steps",
        f"{description.space.noun}s seen": f"{quantity(config.num_iters * config.batch_size)}: "
        f"{config.num_iters:,} updates of {config.batch_size}",
        "schedule": ", ".join(f"{key} {value}" for key, value in description.schedule.items()),
    }
    shown = {key: value for key, value in asdict(config).items() if key not in ("unet", "schedule", "data")}
    rows |= {key: "none" if value == "" else str(value) for key, value in shown.items()}
    rows |= {f"unet.{key}": str(value) for key, value in description.unet.items()}
    return rows
