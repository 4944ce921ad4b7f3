"""`sample.py`: draw images from a checkpoint."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console
from vdiff.cli.options import Command, Names, OneOf, option, switch
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import OptionError, suggestion

if TYPE_CHECKING:
    from vdiff.models.checkpoint import CheckpointConfig

DEVICES = ["auto", "cpu", "cuda", "mps"]


@click.command(
    cls=Command,
    examples=[
        "python sample.py                                              # 64 images from the newest checkpoint",
        "python sample.py --clipped_sampling True                      # the clipped sampler",
        "python sample.py --checkpoint checkpoints/original --time_scale 8   # an eighth of its steps",
        "python sample.py --checkpoint checkpoints/base_5 --num 50000 --batch_size 500 --seed 1",
    ],
)
@option(
    "--checkpoint",
    group="Model",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="the newest under checkpoints/",
    help="A folder that train.py or distill.py wrote.",
)
@option("--device", group="Model", type=OneOf(DEVICES), default="auto", help="Auto takes a GPU where there is one.")
@option("--num", group="Images", type=click.IntRange(1), default=64, metavar="IMAGES", help="How many.")
@option(
    "--batch_size",
    group="Images",
    type=click.IntRange(1),
    default=64,
    metavar="IMAGES",
    help="Drawn at once; images do not depend on it.",
)
@option(
    "--seed",
    group="Images",
    type=click.IntRange(0, 2**64 - 1),
    default=0,
    metavar="INTEGER",
    help="Image k of a seed is always the same.",
)
@option(
    "--classes",
    group="Images",
    type=Names(click.STRING, "CLASS[,CLASS…]"),
    show_default="all in turn",
    help="Names or numbers of the classes that the images take in turn.",
)
@option(
    "--out",
    group="Images",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="samples/CHECKPOINT-SAMPLER-STEPSsteps-seedSEED",
    help="Gets one PNG file an image, grid.png and samples.json.",
)
@switch("--overwrite", group="Images", help="Replace what is in --out.")
@option("--sampler", group="Sampler", type=OneOf(list(SAMPLERS)), show_default="ddim", help="The rule for one step.")
@switch("--clipped_sampling", group="Sampler", help="The same as --sampler clipped.")
@option(
    "--num_timesteps",
    group="Sampler",
    type=click.IntRange(1),
    metavar="STEPS",
    show_default="the model's own",
    help="Sampling steps, each one network evaluation.",
)
@option(
    "--time_scale",
    group="Sampler",
    type=click.IntRange(1),
    metavar="K",
    help="Take every K-th of the model's steps, instead of --num_timesteps.",
)
@option(
    "--clipping_value",
    group="Sampler",
    type=click.FloatRange(0, min_open=True),
    metavar="LIMIT",
    show_default="1.2 for clipped, else 1",
    help="Predicted images are clipped to ±LIMIT; by clipped, predicted noise too.",
)
@switch("--no_clip", group="Sampler", help="Do not clip predicted images (ddim, ddpm).")
@option(
    "--eta",
    group="Sampler",
    type=click.FloatRange(0, 1),
    metavar="NUMBER",
    show_default="0",
    help="Noise added at each step by ddim and clipped: 0 none, 1 as much as ddpm.",
)
def command(
    checkpoint: Path | None,
    device: str,
    num: int,
    batch_size: int,
    seed: int,
    classes: tuple[str, ...] | None,
    out: Path | None,
    overwrite: bool,
    sampler: str | None,
    clipped_sampling: bool,
    num_timesteps: int | None,
    time_scale: int | None,
    clipping_value: float | None,
    no_clip: bool,
    eta: float | None,
) -> None:
    """Draw images from a checkpoint, which is all that is needed.

    The same command goes on where it was stopped, and does nothing where all images exist.
    """
    if clipped_sampling and sampler not in (None, "clipped"):
        raise OptionError(f"--clipped_sampling and --sampler {sampler} exclude each other", "give one of them")
    name = "clipped" if clipped_sampling else sampler or "ddim"
    options = sampler_options(name, clipping_value=clipping_value, no_clip=no_clip, eta=eta)

    from vdiff.models.checkpoint import newest_checkpoint, read_config, weights_fingerprint
    from vdiff.models.device import pick_device
    from vdiff.sampling.folder import GRID, Order, draw_folder

    console = Console()
    folder = checkpoint or newest_checkpoint()
    config = read_config(folder)
    if config.prediction == "eps" and no_clip:
        raise OptionError(
            "--no_clip: an eps-prediction at zero signal says nothing about the image, so x must be clipped",
            "leave --no_clip out",
        )
    steps = sampling_steps(config, num_timesteps, time_scale)
    order = Order(
        checkpoint=folder.as_posix(),
        fingerprint=weights_fingerprint(folder),
        sampler=name,
        options=options,
        num_steps=steps,
        seed=seed,
        classes=class_numbers(config, classes),
    )
    target = out or Path("samples") / f"{folder.resolve().name}-{name}-{steps}steps-seed{seed}"
    progress = "" if config.is_finished else f", unfinished: {config.num_iters} of {config.target_iters} updates"
    console.line(f"{folder}{progress}")
    report = draw_folder(
        order,
        target,
        num=num,
        batch_size=batch_size,
        device=pick_device(device),
        overwrite=overwrite,
        reporter=console,
    )
    console.result(report)
    console.result(f"picture    {target / GRID}")


def sampling_steps(config: CheckpointConfig, num_timesteps: int | None, time_scale: int | None) -> int:
    """The number of steps that the flags ask for.

    Raises:
        OptionError: both flags, or a number of steps that the model was not made for.
    """
    if num_timesteps is not None and time_scale is not None:
        raise OptionError("--num_timesteps and --time_scale say the same in two ways", "give one of them")
    if time_scale is not None and config.num_timesteps % time_scale:
        raise OptionError(
            f"--time_scale {time_scale} does not divide the model's {config.num_timesteps} steps",
            "give one that does",
        )
    steps = num_timesteps or config.num_timesteps // (time_scale or 1)
    try:
        config.check_num_steps(steps)
    except ValueError as error:
        raise OptionError(f"--num_timesteps {steps}: {error}", "give a number that does") from None
    return steps


def class_numbers(config: CheckpointConfig, words: tuple[str, ...] | None) -> list[int]:
    """Classes by name or number; all of them where none is named.

    Raises:
        OptionError: an unknown class, or a model without classes.
    """
    names = config.class_names
    if words is None:
        return list(range(len(names)))
    if not names:
        raise OptionError("--classes: this model knows no classes", "leave it out")
    numbers = []
    for word in words:
        if word not in names and not (word.isdecimal() and int(word) < len(names)):
            raise OptionError(f"--classes: no class {word!r}", suggestion(word, names))
        numbers.append(names.index(word) if word in names else int(word))
    return numbers


def sampler_options(name: str, *, clipping_value: float | None, no_clip: bool, eta: float | None) -> dict[str, Any]:
    """The parameters of the sampler `name` that the flags ask for.

    Raises:
        OptionError: a flag that this sampler has no use for.
    """
    known = {field.name for field in fields(SAMPLERS[name])}  # type: ignore[arg-type]
    if no_clip and clipping_value is not None:
        raise OptionError("--no_clip and --clipping_value exclude each other", "give one of them")
    if no_clip and name == "clipped":
        raise OptionError("--no_clip: the clipped sampler is nothing without its clip", "give --sampler ddim")
    if eta is not None and "eta" not in known:
        raise OptionError(f"--eta has no meaning for the sampler {name}", "leave it out, or give --sampler ddim")
    options: dict[str, Any] = {}
    if no_clip or clipping_value is not None:
        options["clip"] = clipping_value
    if eta is not None:
        options["eta"] = eta
    return options
