"""`vdiff export`: carry models to where other tools run them."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console
from vdiff.cli.options import CONTEXT, Checkpoint, Command, Number, OneOf, ProgramGroup, option, project_option, switch
from vdiff.errors import OptionError, VdiffError, shell
from vdiff.text import plural

if TYPE_CHECKING:
    from vdiff.interop.graphs import GraphOptions
    from vdiff.models.checkpoint import CheckpointConfig
    from vdiff.replacing import Kind

OUTPUTS = ["v", "x", "eps"]
LICENSE_HELP = "An identifier for the model card, such as mit or cc-by-4.0."
CHECKPOINT = click.argument("checkpoint", type=Checkpoint())
FOLDER = click.argument("folder", type=click.Path(path_type=Path))


def license_option(**attributes: Any) -> Callable[[Any], Any]:
    """`--license` of every export."""
    return option("--license", "license_name", group="Output", metavar="NAME", help=LICENSE_HELP, **attributes)


@click.group(cls=ProgramGroup, context_settings=CONTEXT)
def command() -> None:
    """Carry a model to where other tools run it.

    CHECKPOINT is a folder that train.py, distill.py or `vdiff import` wrote. Graphs are run before they are written,
    and must give vdiff's own images. Every export gets a model card: README.md with a picture.
    """


GRAPH_OPTIONS = [
    switch(
        "--sampler_graph", group="Graph",
        help="The whole sampler, noise to images, instead of one evaluation of the network.",
    ),
    option(
        "--num_timesteps", group="Graph", type=click.IntRange(1), metavar="STEPS", show_default="the model's own",
        help="Steps of the sampler; of an evaluation, those that its metadata tells the coefficients of.",
    ),
    option(
        "--output", group="Graph", type=OneOf(OUTPUTS), show_default="v; eps where the network predicts that",
        help="What an evaluation answers, whatever the network predicts.",
    ),
    option(
        "--clipping_value", group="Sampler", type=Number(0, min_open=True), metavar="LIMIT", show_default="1",
        help="Predicted images are clipped to ±LIMIT in every step.",
    ),
    switch("--no_clip", group="Sampler", help="Do not clip predicted images."),
    switch(
        "--guided", group="Sampler",
        help="Take a weight of guidance for each image, and evaluate the network with and without the class.",
    ),
    license_option(show_default="unknown"),
    switch("--card", group="Output", default=True, help="Write a model card, README.md, beside FILE."),
    switch("--overwrite", group="Output", help="Replace FILE, and write a card of the same weights anew."),
]  # fmt: skip
"""Of the exports of graphs, in the order of the help."""


def _shared(suffix: str) -> Callable[[Any], Any]:
    """Arguments and options of an export of graphs into a FILE of this suffix."""
    file = click.argument("file", metavar=f"FILE{suffix}", type=click.Path(path_type=Path))
    decorators = [CHECKPOINT, project_option(read=False), file, *GRAPH_OPTIONS]
    return lambda function: reduce(lambda inner, decorate: decorate(inner), reversed(decorators), function)


@command.command(
    "onnx",
    cls=Command,
    examples=[
        "vdiff export onnx checkpoints/base_6 exports/base_6/model.onnx",
        "vdiff export onnx checkpoints/base_6 sampler.onnx --sampler_graph",
    ],
)
@_shared(".onnx")
def onnx_command(checkpoint: Path, file: Path, **flags: Any) -> None:
    """Write CHECKPOINT as ONNX: one evaluation of the network, or the whole few-step sampler in one graph.

    ONNX Runtime must give vdiff's own answers from the same noise to 1e-4, or nothing is written. Needs
    `pip install 'vdiff[onnx]'`.
    """
    from vdiff.interop.onnx import GRAPH, export_onnx, require_packages
    from vdiff.interop.usage import onnx_usage

    require_packages()
    _export(checkpoint, file, ".onnx", GRAPH, write=export_onnx, usage=onnx_usage, program="ONNX Runtime", **flags)


@command.command(
    "torch",
    cls=Command,
    examples=[
        "vdiff export torch checkpoints/base_6 exports/base_6/model.pt2",
        "vdiff export torch checkpoints/base_6 sampler.pt2 --sampler_graph",
    ],
)
@_shared(".pt2")
def torch_command(checkpoint: Path, file: Path, **flags: Any) -> None:
    """Write CHECKPOINT as a torch.export program, which runs where torch is, without vdiff.

    It is one evaluation of the network, or the whole few-step sampler. The file, read again, must give vdiff's own
    answers from the same noise to 1e-4, or nothing is written.
    """
    from vdiff.interop.graphs import export_torch
    from vdiff.interop.usage import torch_usage
    from vdiff.models.program import PROGRAM

    _export(checkpoint, file, ".pt2", PROGRAM, write=export_torch, usage=torch_usage, program="torch.export", **flags)


@command.command(
    "weights", cls=Command, examples=["vdiff export weights checkpoints/base_6 exports/base_6 --license mit"]
)
@CHECKPOINT
@FOLDER
@project_option(read=False)
@license_option(default="unknown")
@switch("--overwrite", group="Output", help="Replace an earlier export in FOLDER.")
def weights_command(checkpoint: Path, folder: Path, license_name: str, overwrite: bool) -> None:
    """Copy CHECKPOINT into FOLDER as others may see it: weights, configuration without paths, model card.

    FOLDER is a checkpoint itself: sample.py and distill.py take it. It is what `vdiff push` uploads.
    """
    from vdiff.interop.hub import export_weights

    export_weights(checkpoint, folder, license_name=license_name, overwrite=overwrite)
    console = Console()
    console.result(str(folder))
    console.result(f"next       {shell('vdiff', 'push', folder, 'OWNER/NAME')}")


@command.command(
    "diffusers",
    cls=Command,
    examples=[
        "vdiff export diffusers checkpoints/base_6 exports/base_6",
        "vdiff export diffusers checkpoints/base_6 exports/base_6 --clip False",
        "vdiff export diffusers checkpoints/base_6 exports/cats --class cat",
    ],
)
@CHECKPOINT
@FOLDER
@project_option(read=False)
@switch(
    "--clip", group="Sampling", default=True,
    help="Clip predicted images to ±1, as sample.py does; the pipeline is then to be called with "
    "use_clipped_model_output=True. With False, a plain call draws what sample.py --no_clip draws.",
)  # fmt: skip
@option(
    "--class", "class_name", group="Sampling", metavar="CLASS",
    help="Write the network for this class alone (a name, a number, or none), so that the pipeline can be called: it "
    "has no way to ask for one.",
)  # fmt: skip
@option(
    "--guidance", group="Sampling", type=click.FLOAT, metavar="W",
    help="Write the network for this weight of guidance alone, where it takes one as an input.",
)  # fmt: skip
@license_option(default="unknown")
@switch("--overwrite", group="Output", help="Replace an earlier export in FOLDER.")
def diffusers_command(checkpoint: Path, folder: Path, **options: Any) -> None:
    """Write CHECKPOINT as a pipeline into FOLDER, which diffusers loads without vdiff; with a model card.

    It is a DDIMPipeline with a UNet2DModel, and draws the same images from the same noise, at every number of steps
    that divides the model's. Networks that UNet2DModel does not support are refused.
    """
    from vdiff.interop.diffusers.writing import export_pipeline

    console = Console()
    made = export_pipeline(checkpoint, folder, **options)
    console.result(f"{folder}: DDIMPipeline, {plural(made.config.num_timesteps, 'step')}")
    if not made.call:
        console.line(
            "DDIMPipeline asks for no class: README.md says how to draw, or give --class to write the network for one"
        )
        return
    arguments = ", ".join(f"{name}={value}" for name, value in made.call.items())
    load = f"P.from_pretrained({json.dumps(str(folder))})"
    program = f"from diffusers import DDIMPipeline as P; {load}({arguments}).images[0].show()"
    console.result(f"next       {shell('python', '-c', program)}")


def _export(
    checkpoint: Path,
    file: Path,
    suffix: str,
    kind: Kind,
    *,
    write: Callable[..., float],
    usage: Callable[[str, CheckpointConfig, GraphOptions], str],
    program: str,
    license_name: str | None,
    card: bool,
    overwrite: bool,
    **flags: Any,
) -> None:
    """Export one file and write its card, which is made first: its picture shows whether the model draws."""
    if file.suffix.lower() != suffix:
        raise OptionError(f"{file} is not a name for an export of this kind", f"give FILE{suffix}")
    if file.is_dir():
        raise VdiffError(f"{file} is a folder", f"give the name of a file in it: {file / ('model' + suffix)}")
    if license_name is not None and not card:
        raise OptionError("--license stands in the card that --card False leaves out", "leave one of them out")

    from vdiff.interop.card import CARD, PICTURE, card_beside
    from vdiff.interop.graphs import check_exportable
    from vdiff.models.checkpoint import load_checkpoint, weights_fingerprint
    from vdiff.replacing import check_free, locked

    console = Console()
    denoiser, config = load_checkpoint(checkpoint)
    check_exportable(denoiser)
    options = graph_options(config, **flags)
    with ExitStack() as locks:
        locks.enter_context(locked(file))
        check_free(file, kind, overwrite=overwrite, flag="another file")
        beside = None
        if card:
            # other exports into this folder add their sections to the same card
            locks.enter_context(locked(file.parent / CARD, file.parent / PICTURE))
            beside = card_beside(
                file.parent,
                checkpoint,
                usage={file.name: usage(file.name, config, options)},
                license_name=license_name,
                anew=overwrite,
                tags=[suffix.strip(".")],
            )
        what = f"{options.num_steps} steps of the sampler" if options.sampler else "one evaluation"
        console.line(f"exporting {what}; on a large network this takes minutes")
        difference = write(denoiser, config, options, file, fingerprint=weights_fingerprint(checkpoint))
        if beside is not None:
            beside.write(file.parent)
    console.result(f"{file}: {options.results} by {program} differ from vdiff's by at most {difference:.1e}")


def graph_options(
    config: CheckpointConfig,
    *,
    sampler_graph: bool,
    num_timesteps: int | None,
    output: str | None,
    clipping_value: float | None,
    no_clip: bool,
    guided: bool,
) -> GraphOptions:
    """What the flags ask for.

    Raises:
        OptionError: flags that exclude each other, or that this model has no use for.
    """
    from vdiff.interop.graphs import MAX_STEPS, GraphOptions

    steps, is_eps, takes = num_timesteps or config.num_timesteps, config.family.predicts_noise, config.signature
    of_samplers = {"--clipping_value": clipping_value is not None, "--no_clip": no_clip, "--guided": guided}
    useless = next((name for name, is_given in of_samplers.items() if is_given and not sampler_graph), "")
    both = "--no_clip and --clipping_value exclude each other"
    of_graphs = f"--output {output} is for evaluations, and a sampler answers images"
    eps = "an eps-prediction at zero signal says nothing about the image, so x must be clipped"
    no_null = "this network was trained without classes left out, so it has no answer without one"
    for is_wrong, cause, hint in (
        (no_clip and clipping_value is not None, both, "give one of them"),
        (useless, f"{useless} is for samplers, and this is one evaluation", "give --sampler_graph, too"),
        (sampler_graph and output, of_graphs, "leave it out"),
        (is_eps and no_clip, f"--no_clip: {eps}", "leave --no_clip out"),
        (guided and takes.takes_guidance, "--guided: this network takes a weight of guidance as it is", "leave it out"),
        (guided and not takes.null, f"--guided: {no_null}", "leave it out"),
    ):
        if is_wrong:
            raise OptionError(cause, hint)
    try:
        config.check_num_steps(steps)
    except ValueError as error:
        hint = "give a number that does" if config.is_distilled else "give fewer"
        raise OptionError(f"--num_timesteps {steps}: {error}", hint) from None
    if sampler_graph and steps > MAX_STEPS:
        raise OptionError(
            f"a graph of {steps} steps has {steps} copies of the network, and {MAX_STEPS} are the most",
            f"give --num_timesteps {MAX_STEPS} or less, a distilled model, or leave --sampler_graph out",
        )
    return GraphOptions(
        sampler=sampler_graph,
        output=output or ("eps" if is_eps else "v"),
        num_steps=steps,
        clipping_value=None if no_clip else clipping_value or 1.0,
        guided=guided,
    )
