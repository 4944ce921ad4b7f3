"""`prepare_data.py`: turn images into a dataset."""

from __future__ import annotations

import json as jsonlib
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from vdiff.cli.console import Console
from vdiff.cli.options import Command, Names, Number, OneOf, option, project_option, switch, typed_command
from vdiff.errors import OptionError, shell
from vdiff.projects import Project
from vdiff.text import megabytes

if TYPE_CHECKING:
    from vdiff.data.preparation import Part, Report

# spelled out because the help must not import the data room; a test compares them with its registries
FORMATS = ["jpeg", "png", "webp"]
CROPS = ["center", "random_resized", "pad", "stretch", "none"]
RESAMPLES = ["lanczos", "bicubic", "box"]
MAX_SIZE = 4096
OF_IMAGES = (
    "size", "image_format", "quality", "buckets", "bucket_step", "bucket_sides", "condition", "image_column", "crop",
    "crop_scale", "seed", "value_range", "resample", "min_size", "background",
)  # fmt: skip
OF_SOUNDS = ("rate", "length", "trim", "loudness", "audio_column")
EXIT_SKIPPED = 3


class PartType(click.ParamType):
    """A part of the whole: `1/4` … `4/4`."""

    name = "I/N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read two numbers."""
        if isinstance(value, tuple):
            return value
        number, slash, count = str(value).partition("/")
        is_pair = slash and number.isdecimal() and count.isdecimal() and len(number) <= len(count) < 10
        if not (is_pair and 1 <= int(number) <= int(count)):
            self.fail(f"need I/N with I from 1 to N, such as 1/4, not {value!r}", param, ctx)
        return int(number), int(count)


class RangeType(click.ParamType):
    """`full`, `auto`, or two numbers."""

    name = "full|auto|LOW,HIGH"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a word or two numbers."""
        if value in ("full", "auto") or isinstance(value, tuple):
            return value
        try:
            low, high = (float(word) for word in str(value).split(","))
        except ValueError:
            low = high = math.nan
        if not -math.inf < low < high < math.inf:
            self.fail(f"need full, auto or two numbers such as 0,4095, not {value!r}", param, ctx)
        return low, high


class LoudnessType(click.ParamType):
    """`none`, or a level in dBFS."""

    name = "DBFS|none"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read a number; nan is none."""
        level = math.nan if value == "none" else click.FLOAT.convert(value, param, ctx)
        if not (math.isnan(level) or -70 <= level <= 0):
            self.fail(f"need none or a level from -70 to 0, not {value!r}", param, ctx)
        return level


@click.command(
    cls=Command,
    theirs="prepare",
    first="name kind size out format channels buckets root split label_column condition captions "
    "caption_column only_captioned repeats crop resample background num_workers shard overwrite strict json",
    examples=[
        "python prepare_data.py              # the built-in digits",
        "python prepare_data.py photos --size 64,128",
        "python prepare_data.py photos.zip --crop pad --background black",
        "python prepare_data.py photos --captions captions.jsonl",
        "python prepare_data.py sharp --condition blurred        # pairs",
        "python prepare_data.py cifar10      # from torchvision: --root, or downloaded",
        "python prepare_data.py hf:huggan/flowers-102-categories --size 64",
        "python prepare_data.py photos --out data/photos.tar     # tar shards",
        "python prepare_data.py shards/x-*.tar                   # of WebDataset",
        "python prepare_data.py speech --kind audio --rate 16000 --length 16384",
    ],
)
@click.argument("paths", nargs=-1, metavar="[PATH]...")
@project_option()
@option(
    "--size",
    group="Dataset",
    type=Names(click.IntRange(1, MAX_SIZE), "PIXELS[,PIXELS…]"),
    show_default="64; small sets keep theirs: digits 8, mnist 28, cifar10 32 …",
    help="Width and height of the images; one dataset can hold several sizes.",
)
@option(
    "--kind",
    group="Dataset",
    type=OneOf(["image", "audio"]),
    default="image",
    help="What PATH holds. Sounds (WAV, FLAC, OGG, MP3, AIFF …) become pieces of equal length: see --rate, --length, "
    "--trim and --loudness.",
)
@option(
    "--rate", group="Sounds", type=click.IntRange(1000, 192_000), metavar="HZ", show_default="16000",
    help="Samples per second; sounds of other rates are resampled.",
)  # fmt: skip
@option(
    "--length", group="Sounds", type=click.IntRange(1, 2**22), metavar="SAMPLES", show_default="16384",
    help="Samples per piece. Longer sounds are cut into pieces; shorter ones are padded with zeros.",
)  # fmt: skip
@option(
    "--trim", group="Sounds", type=Number(0, 120), metavar="DB", show_default="0: nothing",
    help="Cut off both ends of a sound where it is more than DB decibels below its loudest 50 ms.",
)  # fmt: skip
@option(
    "--loudness", group="Sounds", type=LoudnessType(), show_default="-20",
    help="Level of every sound in dBFS: the RMS of its 50 ms frames that are within 40 dB of the loudest frame. It "
    "is lower if the peak would exceed -1 dBFS. none = unchanged.",
)  # fmt: skip
@option(
    "--out",
    group="Dataset",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="data/NAME_SIZE",
    help="The dataset's folder; FOLDER.tar makes it a folder of WebDataset tar shards.",
)
@option(
    "--format",
    "image_format",
    group="Dataset",
    type=OneOf(FORMATS),
    show_default="jpeg; png for small sets",
    help="How images are stored; webp is lossless, jpeg keeps full colour resolution (4:4:4).",
)
@option("--quality", group="Dataset", type=click.IntRange(1, 100), show_default="100", help="Quality of jpeg.")
@switch(
    "--buckets",
    group="Dataset",
    help="Aspect-ratio buckets, for text-to-image models: sides are multiples of --bucket_step, the area is at most "
    "--size squared. The rest is cropped, and nothing is enlarged.",
)
@option(
    "--bucket_step",
    group="Dataset",
    type=click.IntRange(1, MAX_SIZE),
    show_default="64",
    help="For --buckets: sides are multiples of this.",
)
@option(
    "--bucket_sides",
    group="Dataset",
    type=Names(click.IntRange(1, MAX_SIZE), "LEAST,MOST"),
    show_default="half of --size, twice --size",
    help="For --buckets: the shortest and the longest side.",
)
@option(
    "--channels",
    group="Dataset",
    type=OneOf(["1", "2", "3"]),
    show_default="3; 1 for grey sets and sounds",
    help="1 = grey, 3 = colour; of sounds 1 = mono, 2 = stereo.",
)
@option(
    "--root",
    group="Source",
    type=click.Path(path_type=Path),
    default=Path("downloads"),
    metavar="FOLDER",
    help="Folder of torchvision's datasets; missing ones are downloaded to it.",
)
@option(
    "--split",
    group="Source",
    default="",
    show_default="train",
    help="Split of a named set, or of folders train, val and test above the class folders; all = all splits.",
)
@option(
    "--image_column",
    group="Source",
    default="",
    metavar="NAME",
    show_default="the one with images",
    help="Column of the images in an hf: set.",
)
@option(
    "--audio_column",
    group="Source",
    default="",
    metavar="NAME",
    show_default="the one with sounds",
    help="Column of the sounds in an hf: set.",
)
@option(
    "--label_column",
    group="Source",
    default="",
    metavar="NAME",
    show_default="the one with classes, or label",
    help="Column of the classes in an hf: set, metadata.csv or .jsonl; none = no classes.",
)
@option(
    "--condition",
    group="Source",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="none",
    help="A folder with a condition image for each image of PATH, with the same name apart from the suffix. It may "
    "have another size: it is cropped like its image and resized to the same size. Models learn to generate the "
    "image from it.",
)
@option(
    "--captions",
    group="Captions",
    default="",
    metavar="FILE|none",
    show_default="files beside the images",
    help="A .csv, .jsonl or .parquet with the columns file_name and text; names are relative to the top folder.",
)
@option(
    "--caption_column",
    group="Captions",
    default="",
    metavar="NAME",
    show_default="text, else caption",
    help="Column of the captions in an hf: set or a table.",
)
@switch("--only_captioned", group="Captions", help="Leave out images without a caption, and count them.")
@switch(
    "--repeats",
    group="Captions",
    help="Folders called N_name, such as 10_dog: training shows their images N times in an epoch; the name is the "
    "class, and the caption of images without one.",
)
@option(
    "--crop",
    group="Conversion",
    type=OneOf(CROPS),
    default="center",
    help="Make a square from the centre, from a random part (the same in every run), by padding with the background "
    "colour, or by stretching; none accepts only images that already have the size.",
)
@option(
    "--crop_scale",
    group="Conversion",
    type=Number(0, 1, min_open=True),
    show_default="0.25",
    help="Smallest fraction of the area that random_resized keeps.",
)
@option(
    "--seed",
    group="Conversion",
    type=click.IntRange(min=0),
    show_default="0",
    help="Seed of the random parts of random_resized.",
)
@option(
    "--range",
    "value_range",
    group="Conversion",
    type=RangeType(),
    default="full",
    help="Values of grey images with more than 8 bits that become 0 and 255: the full range, the range of all images"
    " (in whole bits; reads all images first), or two numbers.",
)
@option("--resample", group="Conversion", type=OneOf(RESAMPLES), default="lanczos", help="How images are resized.")
@option(
    "--min_size",
    group="Conversion",
    type=click.IntRange(min=0),
    default=0,
    metavar="PIXELS",
    show_default="0: smaller images are enlarged, and counted",
    help="Skip images with a shorter side (with pad: longer side) below this.",
)
@option(
    "--background",
    group="Conversion",
    default="white",
    metavar="COLOUR",
    help="Colour behind transparent pixels and of padding: a name or #rrggbb.",
)
@option(
    "--num_workers",
    group="Work",
    type=click.IntRange(min=0),
    show_default="CPU cores",
    help="Worker processes; 0 = none. The dataset is the same for any number.",
)
@option(
    "--shard",
    "part",
    group="Work",
    type=PartType(),
    show_default="everything",
    help="Prepare only part I of N of the images; vdiff data merge merges the parts of several machines.",
)
@switch("--overwrite", group="Work", help="Replace an existing dataset, once the new one is complete.")
@switch("--strict", group="Work", help="Stop at the first file that cannot be read instead of skipping it.")
@switch("--json", group="Work", help="Print the summary as one JSON object.")
def command(
    paths: tuple[str, ...],
    project: Project,
    size: tuple[int, ...] | None,
    kind: str,
    rate: int | None,
    length: int | None,
    trim: float | None,
    loudness: float | None,
    out: Path | None,
    image_format: str | None,
    quality: int | None,
    buckets: bool,
    bucket_step: int | None,
    bucket_sides: tuple[int, ...] | None,
    channels: str | None,
    root: Path,
    split: str,
    image_column: str,
    audio_column: str,
    label_column: str,
    condition: Path | None,
    captions: str,
    caption_column: str,
    only_captioned: bool,
    repeats: bool,
    crop: str,
    crop_scale: float | None,
    seed: int | None,
    value_range: str | tuple[float, float],
    resample: str,
    min_size: int,
    background: str,
    num_workers: int | None,
    part: tuple[int, int] | None,
    overwrite: bool,
    strict: bool,
    json: bool,
) -> int:
    """Turn the images or sounds of PATH (default: scikit-learn's digits) into an LMDB dataset.

    PATH is a folder, a zip, a tar or several tars, an npz of samples, a prepared dataset, the name of a torchvision
    dataset (cifar10, mnist, svhn, celeba, flowers102, imagenet, lsun …), or hf:OWNER/NAME for a dataset of the Hugging
    Face hub.

    Classes come from dataset.json (EDM, StyleGAN) or metadata.csv or .jsonl (Hugging Face) beside the images, or from
    .cls members (WebDataset) of a tar, else from subfolders if every image is in a subfolder. Captions come from .txt
    or .caption files with the images' names, or from the column text of a metadata file. vdiff's own pictures and
    samples are skipped. EXIF orientation and colour profiles are applied, transparent images are placed on the
    background, and the first frame of animations is used. Files that cannot be read are skipped and listed in the
    dataset's rejected.jsonl; the exit code is then 3. After any interruption the same command continues.
    """
    from vdiff.data.audio import AudioConfig, soundfile
    from vdiff.data.conversion import ConversionConfig
    from vdiff.data.preparation import Part, prepare
    from vdiff.data.source import SourceOptions
    from vdiff.data.sources import open_source

    options = SourceOptions(
        root, split, image_column, label_column, captions, caption_column, only_captioned, repeats,
        "" if condition is None else str(condition), audio_column, kind if kind == "audio" else "",
    )  # fmt: skip
    check_kind(kind, channels)
    source = open_source(paths or None, options)
    usual = source.defaults
    if kind == "image" and usual.image_format == "flac":
        raise OptionError(f"{source.path} holds sounds", "give --kind audio")
    image_format = image_format or usual.image_format
    if quality is not None and image_format != "jpeg":
        raise OptionError(
            f"--quality {quality} does not apply to {image_format} images", "leave it out or give --format jpeg"
        )
    for name, value in (("crop_scale", crop_scale), ("seed", seed)):
        if value is not None and crop != "random_resized":
            raise OptionError(f"--{name} {value} does not apply to --crop {crop}", "it is for --crop random_resized")
    sizes = tuple(sorted(set(size or (usual.size,))))
    if crop == "none" and len(sizes) > 1:
        raise OptionError("--crop none resizes nothing, so there can be only one --size", "give the images' own size")
    for name, given in (("bucket_step", bucket_step), ("bucket_sides", bucket_sides)):
        if given is not None and not buckets:
            raise OptionError(f"--{name} does not apply without --buckets", "give --buckets, or leave it out")
    config: ConversionConfig | AudioConfig = ConversionConfig(
        sizes=sizes,
        channels=int(channels) if channels and kind == "image" else usual.channels,
        crop=crop,
        crop_scale=0.25 if crop_scale is None else crop_scale,
        seed=seed or 0,
        value_range=value_range,
        resample=resample,
        min_size=min_size,
        background=parse_colour(background),
        image_format=image_format,
        quality=quality or 100,
        buckets=bucket_settings(sizes, crop, bucket_step or 64, bucket_sides) if buckets else None,
    )
    if kind == "audio":
        soundfile()  # before anything is written
        level = -20.0 if loudness is None else loudness
        config = AudioConfig(
            rate or 16_000, length or 16_384, int(channels or 1), trim or 0.0, None if math.isnan(level) else level
        )
    share = Part(*part) if part else None
    console = Console()
    report = prepare(
        source,
        out or default_output(source.name, config.sizes, share, project),
        config,
        num_workers=cpu_cores() if num_workers is None else num_workers,
        overwrite=overwrite,
        strict=strict,
        part=share,
        command=typed_command(),
        reporter=console,
    )
    console.result(*([as_json(report)] if json else summary(report, share, project)), is_json=json)
    return EXIT_SKIPPED if report.rejected else 0


def check_kind(kind: str, channels: str | None) -> None:
    """Refuse options of the other kind of data.

    Raises:
        OptionError: names the flag.
    """
    context = click.get_current_context()
    for param in context.command.params:
        is_foreign = param.name in (OF_IMAGES if kind == "audio" else OF_SOUNDS)
        if is_foreign and context.get_parameter_source(str(param.name)) is not ParameterSource.DEFAULT:
            hint = "leave it out" if kind == "audio" else "give --kind audio, or leave it out"
            raise OptionError(f"{param.opts[0]} does not apply to {kind} data", hint)
    if channels == ("3" if kind == "audio" else "2"):
        need = "1 or 2 for sounds" if kind == "audio" else "1 or 3 for images"
        raise OptionError(f"--channels {channels} does not apply to {kind} data", f"give {need}")


def default_output(source: str, sizes: tuple[int, ...], part: Part | None, project: Project) -> Path:
    """`data/NAME_SIZE`, `data/NAME_SIZE.1of4` for a part."""
    whole = project.new_dataset(source, sizes)
    return whole.with_name(f"{whole.name}.{part.number}of{part.count}") if part else whole


def bucket_settings(
    sizes: tuple[int, ...], crop: str, step: int, sides: tuple[int, ...] | None
) -> tuple[int, int, int]:
    """Step, least and most side of the buckets.

    Raises:
        OptionError: several sizes, a crop that is not the center, or sides that allow no shape.
    """
    from vdiff.data.buckets import bucket_shapes

    if len(sizes) > 1:
        raise OptionError("--buckets takes one --size, whose square is the largest area", "give one --size")
    if crop != "center":
        raise OptionError(f"--crop {crop} does not apply to --buckets", "leave it out")
    least, most = sides if sides and len(sides) == 2 else (sizes[0] // 2, 2 * sizes[0])
    if (sides and len(sides) != 2) or not bucket_shapes(sizes[0], step, max(least, step), most):
        raise OptionError(
            f"--buckets: no shape has sides from {least} to {most} in steps of {step} and an area of {sizes[0]}²",
            "give a larger --size, a smaller --bucket_step, or --bucket_sides LEAST,MOST",
        )
    return step, max(least, step), most


def parse_colour(text: str) -> tuple[int, int, int]:
    """`white` or `#ffffff` as (255, 255, 255).

    Raises:
        OptionError: not a colour.
    """
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise OptionError(f"--background {text!r} is not a colour", "give a name such as black, or #rrggbb") from None


def cpu_cores() -> int:
    """The number of processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    return jsonlib.dumps(report.to_dict(), ensure_ascii=False)


def summary(report: Report, part: Part | None = None, project: Project | None = None) -> list[str]:
    """The report as aligned lines, with the next command at the end."""
    from vdiff.data.listing import few

    sizes = ", ".join(map(str, report.sizes))
    classes = f", {len(report.class_names)} classes" if report.class_names else ""
    pairs = ", each with a condition image" * report.has_conditions
    noun = "sound" if report.rate else "image"
    form = f"{sizes} samples at {report.rate:,} Hz" if report.rate else f"size {sizes}"
    rows = [("written", f"{report.images} {noun}s{pairs}{classes}, {form}, to {report.path}")]
    if report.class_names:
        rows.append(("classes", few(report.class_names)))
    if report.captions:
        rows.append(("captions", f"{report.captions} of {report.images} {noun}s have one"))
    if report.buckets:
        rows.append(("buckets", counted(report.buckets)))
    if report.kept:
        rows.append(("kept", f"{report.kept} of them from an earlier run"))
    if report.skipped:
        rows.append(("skipped", f"{counted(report.skipped)} (listed in {report.path / 'rejected.jsonl'})"))
    if report.ignored:
        rows.append(("ignored", counted(report.ignored)))
    if report.converted:
        rows.append(("converted", counted(report.converted)))
    rows.append(
        ("took", f"{report.seconds:.1f} s, {report.images_per_second:.0f} {noun}s/s, {megabytes(report.num_bytes)}")
    )
    choice = f" --image_size {report.sizes[0]}" if len(report.sizes) > 1 else ""
    name = (project or Project()).name_beside(report.path)
    train = f"python train.py {shell('--data', report.path)}{choice}{f' --name {name}' if name else ''}"
    pieces = str(report.path).split(f".{part.number}of") if part else []
    rows.append(("next", f"vdiff data merge {'.*of'.join(map(shell, pieces))}" if part else train))
    return [f"{head:<10} {text}" for head, text in rows]


def counted(counts: dict[str, int]) -> str:
    """`{"damaged": 2, "empty file": 1}` → `2 damaged, 1 empty file`, the most frequent first."""
    return ", ".join(f"{count} {what}" for what, count in sorted(counts.items(), key=lambda pair: -pair[1]))
