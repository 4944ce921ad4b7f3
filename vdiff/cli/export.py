"""`vdiff export`: write models for other tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vdiff.cli.console import Console
from vdiff.cli.options import CONTEXT, Checkpoint, Command, Number, OneOf, ProgramGroup, option, project_option, switch
from vdiff.cli.web import export_command
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


MERGE = switch("--merge", group="Model", help="CHECKPOINT is a LoRA: merge it into the weights of its base.")
COMPONENTS = option(
    "--components", group="Model", type=click.Path(path_type=Path), metavar="FOLDER",
    show_default="the folder that CHECKPOINT names", help="The model's text encoders, tokenizers and autoencoder.",
)  # fmt: skip


@click.group(cls=ProgramGroup, context_settings=CONTEXT)
def command() -> None:
    """Write a model for other tools.

    CHECKPOINT is a folder that train.py, distill.py or `vdiff import` wrote. Graphs are written only if their results
    equal vdiff's. Every export gets a model card: README.md with a picture.
    """


command.add_command(export_command, "web")

GRAPH_OPTIONS = [
    switch(
        "--sampler_graph", group="Graph",
        help="The whole sampler, noise to images, instead of one evaluation of the network.",
    ),
    option(
        "--num_timesteps", group="Graph", type=click.IntRange(1), metavar="STEPS", show_default="the model's own",
        help="Steps of the sampler, or of the coefficients in an evaluation's metadata.",
    ),
    option(
        "--output", group="Graph", type=OneOf(OUTPUTS), show_default="v; eps if the network predicts eps",
        help="Output of an evaluation, converted from the network's prediction.",
    ),
    option(
        "--clipping_value", group="Sampler", type=Number(0, min_open=True), metavar="LIMIT", show_default="1",
        help="Predicted images are clipped to ±LIMIT in every step.",
    ),
    switch("--no_clip", group="Sampler", help="Do not clip predicted images."),
    switch(
        "--guided", group="Sampler",
        help="Take a guidance weight for each image, and evaluate the network with and without the class.",
    ),
    license_option(show_default="unknown"),
    switch("--card", group="Output", default=True, help="Write a model card, README.md, beside FILE."),
    switch("--overwrite", group="Output", help="Replace FILE, and rewrite a card of the same weights."),
]  # fmt: skip
"""Options of graph exports, in the order of the help."""


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

    Nothing is written unless ONNX Runtime's results equal vdiff's, from the same noise, to 1e-4. Needs
    `pip install 'vdiff[onnx]'`.
    """
    from vdiff.interop.onnx import GRAPH, export_onnx, require_onnx
    from vdiff.interop.usage import onnx_usage

    require_onnx()
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
    """Write CHECKPOINT as a torch.export program, which needs only torch.

    It is one evaluation of the network, or the whole few-step sampler. Nothing is written unless the results of the
    reloaded file equal vdiff's, from the same noise, to 1e-4.
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
    """Copy CHECKPOINT to FOLDER for publishing: weights, configuration without paths, model card.

    FOLDER is itself a checkpoint for sample.py and distill.py. `vdiff push` uploads the same files.
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
        "vdiff export diffusers checkpoints/sd_lora exports/pokemon --merge",
    ],
)
@CHECKPOINT
@FOLDER
@project_option(read=False)
@switch(
    "--clip", group="Sampling", default=True,
    help="Clip predicted images to ±1, as sample.py does; the pipeline then needs use_clipped_model_output=True in its "
    "call. With False, a plain call equals sample.py --no_clip.",
)  # fmt: skip
@option(
    "--class", "class_name", group="Sampling", metavar="CLASS",
    help="Fix the class (a name, a number, or none), because the pipeline has no argument for a class.",
)  # fmt: skip
@option(
    "--guidance", group="Sampling", type=click.FLOAT, metavar="W",
    help="Fix the guidance weight of a network that takes one as an input.",
)  # fmt: skip
@MERGE
@COMPONENTS
@license_option(show_default="unknown; that of the base's pipeline for a text-to-image model")
@switch("--overwrite", group="Output", help="Replace an earlier export in FOLDER.")
def diffusers_command(
    checkpoint: Path, folder: Path, license_name: str | None, overwrite: bool, **options: Any
) -> None:
    """Write CHECKPOINT to FOLDER as a pipeline of diffusers, with a model card; it does not need vdiff.

    A latent model becomes a pipeline of its family (Stable Diffusion, DiT or PixArt), whose scheduler has vdiff's
    timesteps and the model's prediction type. Other models become a DDIMPipeline with a UNet2DModel. It generates the
    same images from the same noise, in every number of steps that divides the model's. Networks that UNet2DModel does
    not support are refused.
    """
    from vdiff.interop.diffusers.text_writing import export_text_pipeline
    from vdiff.interop.diffusers.transformer_writing import export_transformer_pipeline, pipeline_of
    from vdiff.interop.diffusers.writing import export_pipeline
    from vdiff.interop.modelspec import family_of
    from vdiff.models.checkpoint import read_config

    console = Console()
    of_text, of_pixels = ("merge", "components"), ("clip", "class_name", "guidance")
    said = read_config(checkpoint)
    of_transformer = pipeline_of(said)
    is_latent = bool(of_transformer) or family_of(said) is not None
    _refuse_given(of_pixels if is_latent else of_text, checkpoint, is_latent=is_latent)
    kept = {name: options[name] for name in (of_text if is_latent else of_pixels)}
    if of_transformer:
        config = export_transformer_pipeline(checkpoint, folder, license_name=license_name, overwrite=overwrite, **kept)
        console.result(f"{folder}: {of_transformer}, {_said(config)}")
        return
    if is_latent:
        made = export_text_pipeline(checkpoint, folder, license_name=license_name, overwrite=overwrite, **kept)
        for note in made.notes:
            console.line(note)
        console.result(f"{folder}: {made.family.pipeline}, {_said(made.config)}")
        return
    kept |= {"license_name": license_name or "unknown", "overwrite": overwrite}
    exported = export_pipeline(checkpoint, folder, **kept)
    console.result(f"{folder}: DDIMPipeline, {plural(exported.config.num_timesteps, 'step')}")
    if not exported.call:
        console.line("DDIMPipeline has no argument for a class: see README.md, or fix a class with --class")
        return
    arguments = ", ".join(f"{name}={value}" for name, value in exported.call.items())
    load = f"P.from_pretrained({json.dumps(str(folder))})"
    program = f"from diffusers import DDIMPipeline as P; {load}({arguments}).images[0].show()"
    console.result(f"next       {shell('python', '-c', program)}")


def _refuse_given(names: Iterable[str], checkpoint: Path, *, is_latent: bool) -> None:
    """Refuse options that were typed for a model of the other kind."""
    context = click.get_current_context()
    kind = "a latent model" if is_latent else "no latent model"
    for param in context.command.params:
        if param.name in names and context.get_parameter_source(str(param.name)) != ParameterSource.DEFAULT:
            raise OptionError(f"{param.opts[0]}: {checkpoint} is {kind}", "leave it out")


def _said(config: CheckpointConfig) -> str:
    """`predicts v, zero terminal SNR, 4 steps`."""
    from vdiff.interop.modelspec import is_student

    zero_snr = ", zero terminal SNR" * bool(config.schedule.get("zero_snr"))
    steps = f", {plural(config.num_timesteps, 'step')}" * is_student(config)
    return f"predicts {config.prediction}{zero_snr}{steps}"


@command.command(
    "single_file",
    cls=Command,
    examples=[
        "vdiff export single_file checkpoints/sd exports/sd.safetensors",
        "vdiff export single_file checkpoints/sd_lora exports/fox.safetensors --merge",
    ],
)
@CHECKPOINT
@click.argument("file", metavar="FILE.safetensors", type=click.Path(path_type=Path))
@project_option(read=False)
@MERGE
@option(
    "--precision", group="Output", type=OneOf(["fp32", "fp16"]), default="fp32",
    help="Precision of the weights; fp16 takes half the bytes.",
)  # fmt: skip
@COMPONENTS
@license_option(show_default="that of the base's pipeline")
@switch("--card", group="Output", default=True, help="Write a model card, README.md, beside FILE.")
@switch("--overwrite", group="Output", help="Replace an earlier export.")
def single_file_command(checkpoint: Path, file: Path, **options: Any) -> None:
    """Write CHECKPOINT, Stable Diffusion 1.5, 2 or XL, as one file for ComfyUI, A1111 and diffusers.

    It holds UNet, text encoders and autoencoder under their original names, the keys v_pred and ztsnr where they apply,
    and modelspec metadata. FILE.yaml beside it is for A1111. README.md says how to use it in each program.
    """
    from vdiff.interop.diffusers.text_writing import export_single_file

    console = Console()
    made = export_single_file(checkpoint, file, **options)
    for note in made.notes:
        console.line(note)
    console.result(f"{file}: {made.family.name}, {_said(made.config)}")


@command.command(
    "lora",
    cls=Command,
    examples=[
        "vdiff export lora checkpoints/sd_lora exports/pokemon.safetensors",
        "vdiff export lora checkpoints/base_4 exports --format both",
        "vdiff export lora checkpoints/sd_lora exports/step2000 --format peft",
    ],
)
@CHECKPOINT
@click.argument("target", metavar="FILE", type=click.Path(path_type=Path))
@project_option(read=False)
@option(
    "--format", "layout", group="Output", type=OneOf(["diffusers", "kohya", "both", "peft"]), default="diffusers",
    help="diffusers: a file for pipeline.load_lora_weights; kohya: a file for ComfyUI, A1111 and diffusers; both: two "
    "files, the second one FILE_kohya; peft: a folder whose unet/ is for PeftModel.from_pretrained.",
)  # fmt: skip
@license_option(show_default="that of the base's pipeline")
@switch("--card", group="Output", default=True, help="Write a model card, README.md, beside FILE.")
@switch("--overwrite", group="Output", help="Replace an earlier export.")
def lora_command(checkpoint: Path, target: Path, **options: Any) -> None:
    """Write the LoRA of CHECKPOINT, which train.py or distill.py --lora_rank trained, for other programs.

    FILE may be a folder: the file is then called after the checkpoint and its number of steps. It holds only the LoRA;
    to use it, the base is needed too. `vdiff export single_file --merge` writes both in one file. README.md says how to
    use it in diffusers, ComfyUI and A1111.
    """
    from vdiff.interop.lora import export_lora

    console = Console()
    made = export_lora(checkpoint, target, **options)
    for note in made.notes:
        console.line(note)
    rank = made.config.adapter.rank if made.config.adapter else 0
    for file in made.files:
        console.result(
            f"{file}: LoRA of rank {rank} on {(made.config.base or {}).get('path')}, predicts {made.config.prediction}"
        )


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
    """Export one file and its card; the card is made first, as its picture shows whether the model can sample."""
    if file.suffix.lower() != suffix:
        raise OptionError(f"{file} is not a name for an export of this kind", f"give FILE{suffix}")
    if file.is_dir():
        raise VdiffError(f"{file} is a folder", f"give the name of a file in it: {file / ('model' + suffix)}")
    if license_name is not None and not card:
        raise OptionError("--license needs a card, but --card False omits it", "leave one of them out")

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
    """The graph's options, from the flags.

    Raises:
        OptionError: flags exclude each other, or do not apply to this model.
    """
    from vdiff.interop.graphs import MAX_STEPS, GraphOptions

    steps, is_eps, takes = num_timesteps or config.num_timesteps, config.family.predicts_noise, config.signature
    of_samplers = {"--clipping_value": clipping_value is not None, "--no_clip": no_clip, "--guided": guided}
    useless = next((name for name, is_given in of_samplers.items() if is_given and not sampler_graph), "")
    both = "--no_clip and --clipping_value exclude each other"
    of_graphs = f"--output {output} is for evaluations, but a sampler returns images"
    eps = "an eps-prediction at zero signal carries no information about the image, so x must be clipped"
    no_null = "this network was trained only with classes and cannot predict without one"
    for is_wrong, cause, hint in (
        (no_clip and clipping_value is not None, both, "give one of them"),
        (useless, f"{useless} is for samplers, but this is one evaluation", "give --sampler_graph too"),
        (sampler_graph and output, of_graphs, "leave it out"),
        (is_eps and no_clip, f"--no_clip: {eps}", "leave --no_clip out"),
        (guided and takes.takes_guidance, "--guided: this network already takes a guidance weight", "leave it out"),
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
            f"a graph of {steps} steps has {steps} copies of the network; at most {MAX_STEPS} are allowed",
            f"give --num_timesteps {MAX_STEPS} or less, a distilled model, or leave --sampler_graph out",
        )
    return GraphOptions(
        sampler=sampler_graph,
        output=output or ("eps" if is_eps else "v"),
        num_steps=steps,
        clipping_value=None if no_clip else clipping_value or 1.0,
        guided=guided,
    )
