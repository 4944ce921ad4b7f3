"""`vdiff import`: bring in models that other tools wrote."""

from __future__ import annotations

from pathlib import Path

import click

from vdiff.cli.console import Console
from vdiff.cli.diffusers import import_command
from vdiff.cli.options import CONTEXT, Command, OneOf, Program, option, switch
from vdiff.errors import shell
from vdiff.text import plural


class Group(Program, click.Group):
    """Commands that import."""


@click.group(cls=Group, context_settings=CONTEXT)
def command() -> None:
    """Bring in a model that another tool wrote: sample.py, distill.py and the exports take it like any other.

    Nothing in a foreign file is ever run, and a file that claims impossible sizes is refused before memory is taken.
    """


@command.command(
    cls=Command,
    examples=[
        "vdiff import reference checkpoint.pt --out checkpoints/celebahq",
        "vdiff import reference checkpoints/celeba_u/base_6/checkpoint.pt   # a student: checkpoints/base_6",
        "vdiff import reference digits.pt --image_size 32 --attention_heads 1 --image_channels 1",
    ],
)
@click.argument("file", type=click.Path(path_type=Path))
@option(
    "--image_size",
    group="Model",
    type=click.IntRange(1, 2**13),
    default=256,
    metavar="PIXELS",
    help="Width and height of its images, which no tensor tells.",
)
@option(
    "--attention_heads",
    group="Model",
    type=click.IntRange(1),
    default=4,
    metavar="HEADS",
    help="Its attn_heads, which no tensor tells.",
)
@option(
    "--image_channels",
    group="Model",
    type=click.IntRange(1, 4096),
    metavar="CHANNELS",
    show_default="3, or 1 where 3 cannot be",
    help="Of its images.",
)
@option(
    "--channel_order",
    group="Model",
    type=OneOf(["bgr", "rgb"]),
    default="bgr",
    help="Of the 3 channels that it was trained on: those repositories read images as OpenCV does, blue first.",
)
@option(
    "--out",
    group="Output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="checkpoints/NAME after the file, or after its folder for a checkpoint.pt",
    help="The new checkpoint's folder.",
)
@switch("--overwrite", group="Output", help="Replace an imported model.")
def reference(
    file: Path,
    image_size: int,
    attention_heads: int,
    image_channels: int | None,
    channel_order: str,
    out: Path | None,
    overwrite: bool,
) -> None:
    """Bring in FILE, the checkpoint.pt of a v-diffusion repository.

    That is {"G", "n_timesteps", "time_scale"} with the weights of the rosinality UNet. Its architecture is found from
    their shapes; what these do not tell are the options below, whose defaults are the CelebA-HQ model's. From the same
    noise, its channels in --channel_order, sample.py --clipped_sampling draws the images that the clipped sampling of
    that repository draws.
    """
    from vdiff.interop.reference import import_reference
    from vdiff.models.unet import UNetConfig

    console = Console()
    target = out or Path("checkpoints") / (file.resolve().parent.name if file.stem == "checkpoint" else file.stem)
    config = import_reference(
        file,
        target,
        image_size=image_size,
        attention_heads=attention_heads,
        image_channels=image_channels,
        channel_order=channel_order,
        overwrite=overwrite,
    )
    unet = UNetConfig.from_dict(config.unet)
    console.result(
        f"{target}: {plural(config.num_timesteps, 'step')}, {image_size} × {image_size} × {unet.in_channels}, "
        f"{unet.channels} channels × {list(unet.multipliers)}, {plural(unet.num_blocks, 'block')} a level, "
        f"attention at {list(unet.attention_strides)}, {plural(unet.num_heads, 'head')}"
    )
    console.result(f"next       python sample.py {shell('--checkpoint', target)} --clipped_sampling True")


command.add_command(import_command, "diffusers")
