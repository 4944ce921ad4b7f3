"""`sample.py`: draw images from a checkpoint."""

from __future__ import annotations

import json as jsonlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from vdiff.cli.console import Console
from vdiff.cli.drawing import (
    SUFFIXES,
    asked_by,
    default_name,
    guidance_options,
    guidance_weight,
    image_format,
    path_of,
    prompts_of,
    report_line,
    report_values,
    sampler_options,
    sampling_steps,
    text_options,
)
from vdiff.cli.options import NUM, OLD_NUM, PATH, Checkpoint, Command, Names, OneOf, option, project_option, switch
from vdiff.cli.settings import sampler_settings
from vdiff.cli.vdiffusion import home_of, imported
from vdiff.diffusion.grids import GRIDS
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import OptionError, VdiffError
from vdiff.projects import Project

DEVICES = ["auto", "cpu", "cuda", "mps"]
PRECISIONS = ["auto", "fp32", "bf16", "fp16"]


@click.command(
    cls=Command,
    theirs="sample",
    first="name checkpoint device precision num batch_size seed prompt prompts negative_prompt condition classes "
    "guidance interpolate out format trajectory overwrite json sampler num_timesteps grid",
    examples=[
        "python sample.py              # 64 images from the newest checkpoint",
        "python sample.py --checkpoint checkpoints/original --num_timesteps 128",
        "python sample.py --sampler dpmpp_2m --num_timesteps 16 --grid logsnr",
        "python sample.py --sampler clipped",
        "python sample.py --num 50000 --batch_size 500 --out samples/fifty.npz",
        "python sample.py --classes 3,7 --guidance 1.5 --trajectory --json",
        "python sample.py --interpolate 32 37 --num 12",
        "python sample.py --prompts prompts.txt --negative_prompt blurry",
        "python sample.py --condition blurred        # one image from each of them",
    ],
)
@project_option()
@option(
    "--checkpoint",
    group="Model",
    type=Checkpoint(imports=False),
    metavar="FOLDER",
    show_default="the newest under checkpoints/",
    help="A folder that train.py or distill.py wrote.",
)
@option("--device", group="Model", type=OneOf(DEVICES), default="auto", help="Auto takes a GPU if there is one.")
@option(
    "--precision",
    group="Model",
    type=OneOf(PRECISIONS),
    default="auto",
    help="Precision of the network; auto is fp32, on CUDA with TF32 products.",
)
@switch(
    "--compile",
    group="Model",
    help="Compile the network first (about a minute); on CUDA also record a CUDA graph.",
)
@option(
    *NUM,
    old=OLD_NUM,
    group="Images",
    type=click.IntRange(1),
    metavar="IMAGES",
    show_default="64; 4 for one prompt; one for each of several prompts or condition images",
    help="Number of images; under torchrun use -n.",
)
@option(
    "--batch_size",
    group="Images",
    type=click.IntRange(1),
    metavar="IMAGES",
    show_default="64; with prompts 4",
    help="Images in a batch of each process; the images do not depend on it.",
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
    "--condition",
    group="Images",
    type=PATH,
    metavar="FOLDER",
    show_default="none",
    help="Condition images: one sample for each, with its name. For models trained on pairs.",
)
@option(
    "--classes",
    group="Images",
    type=Names(click.STRING, "CLASS[,CLASS…]"),
    show_default="all in turn",
    help="Names or numbers of classes, which the images take in turn.",
)
@guidance_options("Images")
@option(
    "--guidance_interval",
    group="Images",
    type=Names(click.FLOAT, "FIRST,LAST"),
    show_default="0,1",
    help="Apply guidance only between these times; 1 is noise, 0 is the image.",
)
@option(
    "--prompt",
    "prompts",
    group="Text",
    multiple=True,
    metavar="TEXT",
    help="Prompt for a text-to-image model. If it is given several times, the images take the prompts in turn.",
)
@option(
    "--prompts",
    "prompts_file",
    group="Text",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="A text file with one prompt per line, instead of --prompt.",
)
@text_options
@option(
    "--interpolate",
    group="Images",
    type=click.IntRange(0),
    nargs=2,
    metavar="A B",
    help="Interpolate from image A to image B of the seed, in --num images.",
)
@option(
    "--out",
    group="Output",
    type=click.Path(path_type=Path),
    metavar="PATH",
    show_default="samples/CHECKPOINT-SAMPLER-STEPSsteps-seedSEED",
    help="A folder; a path that ends in .zip, .npz or .lmdb; or FILE.png for the grid alone (images go to samples/).",
)
@option(
    "--format",
    "image_store",
    group="Output",
    type=OneOf(list(SUFFIXES)),
    show_default="from the ending of --out, else png, or wav for sounds",
    help="A folder of PNG files, a zip of PNG files, an npz as in ADM's evaluation suite, or a dataset for train.py."
    " Of sounds, a folder of WAV or FLAC files.",
)
@switch(
    "--trajectory",
    group="Output",
    help="Also write x̂ after each step for the first images: OUT.trajectory.png and .webp.",
)
@switch("--overwrite", group="Output", help="Replace what is in --out.")
@switch("--json", group="Output", help="Print the result as one JSON object.")
@option("--sampler", group="Sampler", type=OneOf(list(SAMPLERS)), show_default="ddim", help="Sampler.")
@switch("--clipped_sampling", group="Sampler", help="The same as --sampler clipped.")
@option(
    "--num_timesteps",
    group="Sampler",
    type=click.IntRange(1),
    metavar="STEPS",
    show_default="the model's own",
    help="Sampling steps, each one network evaluation (heun: two).",
)
@option(
    "--time_scale",
    group="Sampler",
    type=click.IntRange(1),
    metavar="K",
    help="Take every K-th step of the model, instead of --num_timesteps.",
)
@option(
    "--grid",
    group="Sampler",
    type=OneOf(list(GRIDS)),
    default="uniform",
    help="Spacing of the steps; a distilled model supports only uniform.",
)
@switch("--no_clip", group="Sampler", help="Do not clip predicted images (not for the sampler clipped).")
@sampler_settings
def command(
    project: Project,
    checkpoint: Path | None,
    device: str,
    precision: str,
    compile: bool,  # noqa: A002 - the flag's name
    num: int | None,
    batch_size: int | None,
    seed: int,
    classes: tuple[str, ...] | None,
    guidance: float | None,
    guidance_scale: float | None,
    guidance_interval: tuple[float, ...] | None,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    condition: Path | None,
    negative_prompt: str,
    components: Path | None,
    vae: Path | None,
    interpolate: tuple[int, int] | None,
    out: Path | None,
    image_store: str | None,
    trajectory: bool,
    overwrite: bool,
    json: bool,
    sampler: str | None,
    clipped_sampling: bool,
    num_timesteps: int | None,
    time_scale: int | None,
    grid: str,
    no_clip: bool,
    **flags: Any,
) -> None:
    """Generate images from a checkpoint.

    The same command continues after an interruption, and does nothing if all images exist. Under torchrun or accelerate
    the processes share the work.
    """
    if clipped_sampling and sampler not in (None, "clipped"):
        raise OptionError(f"--clipped_sampling and --sampler {sampler} exclude each other", "give one of them")
    name = "clipped" if clipped_sampling else sampler or "ddim"
    options = sampler_options(name, flags, no_clip=no_clip)
    texts = prompts_of(prompts, prompts_file)
    count = num or (4 if len(texts) == 1 else len(texts) or 64)
    path = path_of(interpolate, count)
    form = image_format(out, image_store)
    console = Console()
    folder = checkpoint or project.newest(console.line)
    project = project if project.name else Project.of_model(home_of(folder, project))
    picture = out if out is not None and out.suffix.lower() == ".png" and not out.is_dir() else None

    import PIL.Image

    from vdiff.data.conditions import ConditionFiles
    from vdiff.data.images import PICTURE, save_png
    from vdiff.distributed import join
    from vdiff.files import make_folder
    from vdiff.models import checks
    from vdiff.models.autoencoder import vae_weights
    from vdiff.models.checkpoint import read_config, weights_fingerprint
    from vdiff.models.kinds import PYTHON
    from vdiff.models.prompting import Prompting, has_surroundings
    from vdiff.models.reading import file_fingerprint
    from vdiff.models.speed import pick_precision
    from vdiff.replacing import check_free
    from vdiff.sampling.job import RunOptions, draw_images
    from vdiff.sampling.outputs import SOUND_FORMATS, ImageKind, open_output
    from vdiff.sampling.packing import file_name
    from vdiff.sampling.spec import SampleSpec

    named, folder = folder, imported(folder, console.line)
    config = read_config(folder)
    is_surrounded = has_surroundings(config)
    batch_size = batch_size or (4 if is_surrounded else 64)
    with asked_by("--prompt"):
        checks.check_prompts(config, texts, negative_prompt)
    with asked_by("--condition"):
        checks.check_condition(config, is_given=condition is not None)
    conditions = ConditionFiles(condition, config.shape, config.condition_images or {}) if condition else None
    if conditions is not None and num is not None and num > len(conditions):
        raise OptionError(f"--num {num}: {condition} holds {len(conditions)} images", "leave --num out")
    if conditions is not None and interpolate is not None:
        raise OptionError("--interpolate does not apply to --condition", "leave it out")
    num = num or (len(conditions) if conditions else count)
    is_sound = config.space.is_sound and bool(config.sample_rate)
    form = "wav" if is_sound and picture and not image_store else form or ("wav" if is_sound else "png")
    if is_sound != (form in SOUND_FORMATS):
        raise OptionError(
            f"--format {form}: {folder} generates {config.space.noun}s",
            f"give {'wav or flac' if is_sound else 'png, zip, npz or lmdb'}, or leave it out",
        )
    fits = texts or config.image_size or is_sound or (len(config.shape) == 3 and form in ("png", "zip"))
    if config.kind != PYTHON and not fits:  # a network in Python is refused at loading
        shape = " × ".join(map(str, config.shape))
        raise VdiffError(
            f"{folder} generates samples of {shape}, not images for {form}", "vdiff.load generates tensors"
        )
    with asked_by(f"--sampler {name}"):
        options = checks.without_limits(config, name, options)
    with asked_by("--no_clip", "leave --no_clip out"):
        checks.check_limits(config, options)
    steps = sampling_steps(config, num_timesteps, time_scale)
    with asked_by(f"--num_timesteps {steps}" if grid == "uniform" else f"--grid {grid}"):
        checks.check_grid(config, grid, steps)
    asked = guidance_weight(guidance, guidance_scale)
    weight = checks.default_guidance(config) if asked is None else asked
    if asked is None and weight:
        limits = config.guidance_range
        other = "--guidance {:g} to {:g}".format(*limits) if limits else "--guidance 0: none"
        console.line(f"guidance {weight:g} as in diffusers' pipelines, scale {weight + 1:g}; {other}")
    with asked_by("--guidance"):
        checks.check_guidance(config, weight)
    with asked_by("--negative_prompt"):
        checks.check_negative_prompt(config, negative_prompt, weight)
    with asked_by("--guidance_interval"):
        checks.check_interval(config, weight, guidance_interval)
    with asked_by("--classes"):
        numbers = checks.class_numbers(config, classes)
    processes = join(device)
    spec = SampleSpec(
        checkpoint=folder.as_posix(),
        fingerprint=weights_fingerprint(folder),
        sampler=name,
        options=options,
        num_steps=steps,
        seed=seed,
        classes=numbers,
        grid=grid,
        guidance=weight,
        guidance_interval=list(guidance_interval or ()),
        precision=pick_precision(precision, processes.device),
        path=path,
        prompts=texts,
        negative_prompt=negative_prompt,
        components=(config.components or {}).get("fingerprint", ""),
        vae=file_fingerprint(vae_weights(vae)) if vae else "",
        condition="" if condition is None else condition.as_posix(),
        condition_fingerprint=conditions.fingerprint if conditions else "",
        names=conditions.names if conditions else [],
    )
    target = (None if picture else out) or project.samples / default_name(folder, spec, form)
    side, channels = config.shape[-1] if is_sound else config.image_size, config.shape[0]
    if is_surrounded:
        prompting = Prompting.read(config, components=components, vae=vae)
        channels, side = prompting.shape[0], prompting.shape[-1]
        for note in prompting.notes([*texts, negative_prompt]) if texts else ():
            console.line(note)
    kind = ImageKind(side, channels, config.class_names, config.sample_rate)
    progress = "" if config.is_finished else f", unfinished: {config.num_iters} of {config.target_iters} updates"
    console.line(f"drawing from {named}{progress}")
    if picture:
        check_free(picture, PICTURE, overwrite=True)
    report = draw_images(
        spec,
        open_output(form, target, kind, processes.rank, spec.names),
        RunOptions(num, batch_size, precision, compile, overwrite, trajectory, components, vae, conditions),
        processes=processes,
        reporter=console,
    )
    if picture and processes.is_main:
        has_grid = num > 1 or is_sound
        drawn = report.picture if has_grid else report.out / (spec.names[0] if spec.names else file_name(0))
        with PIL.Image.open(drawn) as image:
            save_png(image, make_folder(picture.parent) / picture.name)
        report = replace(report, picture=picture)
    if json:
        values = report_values(
            spec, config, report, form=form, device=processes.device.type, processes=processes.world_size
        )
        console.result(jsonlib.dumps(values, ensure_ascii=False), is_json=True)
        return
    console.result(report_line(spec, report, config.space.noun))
    console.result(f"picture    {report.picture}")
    for picture in report.trajectory:
        console.result(f"trajectory {picture}")
