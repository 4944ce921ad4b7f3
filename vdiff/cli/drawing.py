"""The meaning of the flags of `sample.py`, and its summary at the end."""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.cli.options import PATH, option
from vdiff.data.captions import read_prompts
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import OptionError, VdiffError
from vdiff.settings import COMMAND_LINE, check_value, parameters
from vdiff.text import plural

if TYPE_CHECKING:
    from vdiff.models.checkpoint import CheckpointConfig
    from vdiff.sampling.job import SampleReport
    from vdiff.sampling.spec import SampleSpec

SUFFIXES = {"png": "", "zip": ".zip", "npz": ".npz", "lmdb": ".lmdb", "wav": "", "flac": ""}
NO_FOLDERS = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".wav", ".flac", ".mp4")
"""Suffixes with which nobody names a folder."""


def guidance_options(group: str) -> Callable[[Any], Any]:
    """The options `--guidance` and `--guidance_scale`, under a heading."""

    def decorate(function: Any) -> Any:
        function = option(
            "--guidance_scale",
            group=group,
            type=float,
            metavar="S",
            show_default="W + 1",
            help="The same in the scale of other tools: 1 = none.",
        )(function)
        return option(
            "--guidance",
            group=group,
            type=float,
            metavar="W",
            show_default="0; Stable Diffusion 6.5, XL 4",
            help="Weight W of classifier-free guidance: 0 = none, -1 = without the class. It takes two evaluations "
            "per step, unless the network was distilled for guidance. The guidance scale of other tools is W + 1.",
        )(function)

    return decorate


def text_options(function: Any) -> Any:
    """The options `--negative_prompt`, `--components` and `--vae`."""
    function = option(
        "--vae",
        group="Text",
        type=PATH,
        metavar="FOLDER",
        show_default="the model's own",
        help="Another autoencoder: a pipeline folder, or its subfolder vae.",
    )(function)
    function = option(
        "--components",
        group="Text",
        type=PATH,
        metavar="FOLDER",
        show_default="the folder that the checkpoint names",
        help="The folder of the model's text encoders, tokenizers and autoencoder, if it has moved.",
    )(function)
    return option("--negative_prompt", group="Text", default="", metavar="TEXT", help="What guidance moves away from.")(
        function
    )


@contextmanager
def asked_by(flag: str, hint: str = "") -> Iterator[None]:
    """Name the responsible flag in errors of the block.

    Raises:
        OptionError: instead of a VdiffError.
    """
    try:
        yield
    except VdiffError as error:
        raise OptionError(f"{flag}: {error.cause}", hint or error.hint) from None


def sampling_steps(config: CheckpointConfig, num_timesteps: int | None, time_scale: int | None) -> int:
    """The number of steps, according to the flags.

    Raises:
        OptionError: both flags are given, or the divisor does not divide the steps.
    """
    if num_timesteps is not None and time_scale is not None:
        raise OptionError("--num_timesteps and --time_scale both set the number of steps", "give one of them")
    if time_scale is not None and config.num_timesteps % time_scale:
        raise OptionError(
            f"--time_scale {time_scale} does not divide the model's {config.num_timesteps} steps",
            "give one that does"
            + (f", or --num_timesteps {config.num_timesteps // time_scale}" * config.takes_any_num_steps),
        )
    return num_timesteps or config.num_timesteps // (time_scale or 1)


def sampler_options(name: str, flags: Mapping[str, Any], *, no_clip: bool) -> dict[str, Any]:
    """The settings of the sampler `name`, according to the flags.

    Raises:
        OptionError: this sampler does not have a flag, or the value is invalid.
    """
    known = parameters(SAMPLERS[name])
    options = {key: value for key, value in flags.items() if value is not None}
    for key, value in options.items():
        readers = {sampler: found[key] for sampler, kind in SAMPLERS.items() if key in (found := parameters(kind))}
        spelt = next(iter(readers.values())).metadata["flag"] or key
        if no_clip and key in ("clipping_value", "threshold"):
            raise OptionError(f"--no_clip and --{spelt} exclude each other", "give one of them")
        if key not in known:
            hint = f"leave it out, or give --sampler {next(iter(readers))}"
            raise OptionError(f"the sampler {name} does not use --{spelt}", hint)
        check_value(known[key], value, COMMAND_LINE)
    if no_clip and name == "clipped":
        raise OptionError("--no_clip: the clipped sampler always clips", "give --sampler ddim")
    return options | ({"clipping_value": None} if no_clip else {})


def prompts_of(prompts: Sequence[str], file: Path | None) -> list[str]:
    """The prompts that the flags give, in order; of a file, its lines that are not blank.

    Raises:
        OptionError: both flags, or a file that cannot be read or has no prompt.
    """
    if file is None:
        return list(prompts)
    if prompts:
        raise OptionError("--prompt and --prompts exclude each other", "give one of them")
    return read_prompts(file, "--prompts")


def guidance_weight(guidance: float | None, scale: float | None) -> float | None:
    """The weight w that the flags give; None: neither is given.

    Raises:
        OptionError: both flags.
    """
    if guidance is not None and scale is not None:
        raise OptionError("--guidance and --guidance_scale exclude each other", "give one of them")
    return guidance if scale is None else scale - 1


def path_of(interpolate: tuple[int, int] | None, num: int) -> list[int]:
    """`SampleSpec.path`: empty, or both ends and the number of images.

    Raises:
        OptionError: there is nothing to interpolate.
    """
    if interpolate is None:
        return []
    first, last = interpolate
    if first == last:
        raise OptionError(f"--interpolate {first} {last}: the ends are the same image", "give two different numbers")
    if num < 2:
        raise OptionError("--interpolate: --num 1 leaves no room for both ends", "give --num 2 or more")
    return [first, last, num]


def image_format(out: Path | None, asked: str | None) -> str:
    """The format from --format or from the name of the output; empty if neither gives one.

    Raises:
        OptionError: the two contradict each other, or the name is that of a file of another kind.
    """
    if out and out.suffix.lower() in NO_FOLDERS and not out.is_dir():
        raise OptionError(f"--out {out}: no such file is written", "give a folder, or FILE.png, .zip, .npz or .lmdb")
    of_suffix = {".png": "png"} | {suffix: form for form, suffix in SUFFIXES.items() if suffix}
    said = of_suffix.get(out.suffix.lower()) if out else None
    if asked and said and asked != said:
        raise OptionError(f"--out {out} and --format {asked} contradict each other", "give one of them")
    return asked or said or ""


def default_name(folder: Path, spec: SampleSpec, form: str) -> str:
    """The default name of an output: the settings that affect the images most."""
    parts = [folder.resolve().name, spec.sampler]
    parts += [spec.grid] if spec.grid != "uniform" else []
    parts += [f"{spec.num_steps}steps"]
    parts += [f"guidance{spec.guidance:g}"] if spec.guidance else []
    parts += [_short_name(spec.prompts)] if spec.prompts else []
    parts += [Path(spec.condition).resolve().name] if spec.condition else []
    parts += [f"seed{spec.seed}"]
    parts += [f"{spec.path[0]}to{spec.path[1]}"] if spec.path else []
    return "-".join(parts) + SUFFIXES[form]


def _short_name(prompts: Sequence[str]) -> str:
    """The first words of the first prompt, and a checksum of all prompts: `a_red_fox-1f3a9c00`."""
    words = "_".join(re.findall(r"\w+", prompts[0])[:4])[:40]
    return f"{words}-{zlib.crc32(chr(10).join(prompts).encode()):08x}"


def report_line(spec: SampleSpec, report: SampleReport, noun: str) -> str:
    """The summary of a run, in one line; `noun`: what the model draws."""
    if not report.drawn:
        return f"{report.out} already holds all {report.num} {noun}s"
    evaluations = report.evaluations or spec.num_steps
    each = f"{evaluations:.4g} evaluation{'s' if evaluations > 1 else ''} each"
    return (
        f"{plural(report.drawn, noun)} in {report.seconds:.1f} s ({report.images_per_second:.3g}/s), "
        f"{spec.sampler}, {each}, to {report.out}"
    )


def report_values(
    spec: SampleSpec, config: CheckpointConfig, report: SampleReport, *, form: str, device: str, processes: int
) -> dict[str, Any]:
    """The result as one JSON object: the settings, the speed, the checkpoint and the paths."""
    return {
        **report.to_dict(),
        "format": form,
        "checkpoint": spec.checkpoint,
        "fingerprint": spec.fingerprint,
        "weights": config.weights,
        "sampler": spec.sampler,
        "options": spec.options,
        "grid": spec.grid,
        "steps": spec.num_steps,
        "guidance": spec.guidance,
        "guidance_interval": spec.guidance_interval,
        "classes": [config.class_names[k] for k in spec.classes],
        "prompts": spec.prompts,
        "negative_prompt": spec.negative_prompt,
        "condition": spec.condition,
        "interpolate": spec.path[:2],
        "seed": spec.seed,
        "precision": spec.precision,
        "device": device,
        "processes": processes,
    }
