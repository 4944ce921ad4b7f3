"""`vdiff export diffusers` and `vdiff import diffusers`."""

from __future__ import annotations

import json
from pathlib import Path

import click

from vdiff.cli.console import Console
from vdiff.cli.options import Command, option, switch
from vdiff.errors import shell
from vdiff.text import plural


@click.command(
    cls=Command,
    name="diffusers",
    examples=[
        "vdiff export diffusers checkpoints/base_6 exports/base_6",
        "vdiff export diffusers checkpoints/base_6 exports/base_6 --clip False --overwrite",
        "vdiff export diffusers checkpoints/base_6 exports/cats --class cat",
    ],
)
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.argument("folder", type=click.Path(path_type=Path))
@switch(
    "--clip",
    group="Sampling",
    default=True,
    help="Clip predicted images to ±1, as sample.py does; the pipeline is then to be called with "
    "use_clipped_model_output=True. With False, a plain call draws what sample.py --no_clip draws.",
)
@option(
    "--class",
    "class_name",
    group="Sampling",
    metavar="CLASS",
    help="Write the network for this class alone (a name, a number, or none), so that the pipeline can be called: it "
    "has no way to ask for one.",
)
@option(
    "--guidance",
    group="Sampling",
    type=click.FLOAT,
    metavar="W",
    help="Write the network for this weight of guidance alone, where it takes one as an input.",
)
@option(
    "--license",
    "license_name",
    group="Output",
    metavar="NAME",
    default="unknown",
    help="An identifier for the model card, such as mit or cc-by-4.0.",
)
@switch("--overwrite", group="Output", help="Replace an earlier export in FOLDER.")
def export_command(
    checkpoint: Path,
    folder: Path,
    clip: bool,
    class_name: str | None,
    guidance: float | None,
    license_name: str,
    overwrite: bool,
) -> None:
    """Write CHECKPOINT as a pipeline into FOLDER, which diffusers loads without vdiff; with a model card.

    It is a DDIMPipeline with a UNet2DModel, and draws the same images from the same noise, at every number of steps
    that divides the model's. Networks that UNet2DModel has no words for are refused.
    """
    from vdiff.interop.diffusers.writing import export_pipeline

    console = Console()
    made = export_pipeline(
        checkpoint,
        folder,
        clip=clip,
        class_name=class_name,
        guidance=guidance,
        license_name=license_name,
        overwrite=overwrite,
    )
    steps = made.config.num_timesteps
    console.result(f"{folder}: DDIMPipeline, {plural(steps, 'step')}")
    if not made.call:
        console.line(
            "DDIMPipeline asks for no class: README.md says how to draw, or give --class to write the network for one"
        )
        return
    arguments = ", ".join(f"{name}={value}" for name, value in made.call.items())
    load = f"P.from_pretrained({json.dumps(str(folder))})"
    program = f"from diffusers import DDIMPipeline as P; {load}({arguments}).images[0].show()"
    console.result(f"next       {shell('python', '-c', program)}")


@click.command(
    cls=Command,
    name="diffusers",
    examples=[
        "vdiff import diffusers google/ddpm-cifar10-32          # from the hub, to checkpoints/ddpm-cifar10-32",
        "vdiff import diffusers exports/base_6 --out checkpoints/again",
    ],
)
@click.argument("source")
@option(
    "--num_timesteps",
    group="Model",
    type=click.IntRange(1),
    metavar="STEPS",
    show_default="as many as it was trained with",
    help="Sampling steps of the checkpoint.",
)
@option(
    "--out",
    group="Output",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="checkpoints/NAME after the source",
    help="The new checkpoint's folder.",
)
@switch("--overwrite", group="Output", help="Replace an imported model.")
def import_command(source: str, num_timesteps: int | None, out: Path | None, overwrite: bool) -> None:
    """Import SOURCE, a pipeline of diffusers: a folder, or OWNER/NAME of the Hugging Face hub.

    It is a DDPMPipeline, DDIMPipeline or PNDMPipeline with a UNet2DModel that predicts ε, v or x. Only JSON and
    safetensors are read. A folder that `vdiff export diffusers` wrote gives back the checkpoint that it was.
    """
    from vdiff.interop.diffusers.reading import import_pipeline

    console = Console()
    target = out or Path("checkpoints") / Path(source).resolve().name
    made = import_pipeline(source, target, num_timesteps=num_timesteps, overwrite=overwrite)
    config = made.config
    for remark in made.remarks:
        console.line(remark)
    unet, size, steps = config.unet, config.image_size, config.num_timesteps
    console.result(
        f"{target}: predicts {config.prediction}, schedule {config.schedule['name']}, "
        f"{plural(steps, 'step')}, {size} × {size} × {unet['in_channels']}, "
        f"{unet['channels']} channels × {unet['multipliers']}"
    )
    console.result(f"next       python sample.py {shell('--checkpoint', target)}")
