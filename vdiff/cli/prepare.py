"""`prepare_data.py`: turn a folder or a zip of images into an LMDB dataset."""

from __future__ import annotations

import json as jsonlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vdiff.cli.console import Console
from vdiff.cli.options import Command, Names, OneOf, option, switch
from vdiff.errors import OptionError

if TYPE_CHECKING:
    from vdiff.data.preparation import Report
    from vdiff.data.sources import Source

# spelled out because the help must not import the data room; a test compares them with its registries
FORMATS = ["jpeg", "png", "webp"]
CROPS = ["center", "pad", "stretch"]
RESAMPLES = ["lanczos", "bicubic", "box"]
MAX_SIZE = 4096
EXIT_SKIPPED = 3


@click.command(
    cls=Command,
    examples=[
        "python prepare_data.py              # the built-in digits",
        "python prepare_data.py photos --size 64,128",
        "python prepare_data.py photos.zip --crop pad --background black",
    ],
)
@click.argument("path", required=False, type=click.Path(path_type=Path))
@option(
    "--size",
    group="Dataset",
    type=Names(click.IntRange(1, MAX_SIZE), "PIXELS[,PIXELS…]"),
    show_default="8 for digits, else 64",
    help="Width and height of the images; one dataset can hold several sizes.",
)
@option(
    "--out",
    group="Dataset",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    show_default="data/NAME_SIZE",
    help="Where the dataset goes.",
)
@option(
    "--format",
    "image_format",
    group="Dataset",
    type=OneOf(FORMATS),
    show_default="png for digits, else jpeg",
    help="How images are stored; webp is lossless, jpeg keeps full colour resolution (4:4:4).",
)
@option(
    "--quality", group="Dataset", type=click.IntRange(1, 100), show_default="100", help="JPEG quality; for jpeg alone."
)
@option(
    "--channels",
    group="Dataset",
    type=OneOf(["1", "3"]),
    show_default="1 for digits, else 3",
    help="Grey or colour.",
)
@option(
    "--crop",
    group="Conversion",
    type=OneOf(CROPS),
    default="center",
    help="Make a square of the middle, of the whole on the background colour, or by distorting.",
)
@option("--resample", group="Conversion", type=OneOf(RESAMPLES), default="lanczos", help="How images are resized.")
@option(
    "--background",
    group="Conversion",
    default="white",
    metavar="COLOUR",
    help="What lies behind transparent pixels and padding: a name or #rrggbb.",
)
@option(
    "--num_workers",
    group="Work",
    type=click.IntRange(min=0),
    show_default="CPU cores",
    help="Processes; 0 converts in the main one. The dataset is the same for any number.",
)
@switch("--overwrite", group="Work", help="Replace an existing dataset, once the new one is complete.")
@switch("--strict", group="Work", help="Stop at the first file that cannot be read instead of skipping it.")
@switch("--json", group="Work", help="Print the summary as one JSON object.")
def command(
    path: Path | None,
    size: tuple[int, ...] | None,
    out: Path | None,
    image_format: str | None,
    quality: int | None,
    channels: str | None,
    crop: str,
    resample: str,
    background: str,
    num_workers: int | None,
    overwrite: bool,
    strict: bool,
    json: bool,
) -> int:
    """Turn the images in PATH, a folder or a zip, into an LMDB dataset; without PATH, scikit-learn's digits.

    Subfolders become classes if every image lies in one. EXIF orientation is applied, transparency is laid on the
    background, animations give their first frame. Files that cannot be read are skipped, listed in rejected.jsonl
    in the dataset, and make the exit code 3.
    """
    from vdiff.data.conversion import ConversionConfig
    from vdiff.data.preparation import prepare
    from vdiff.data.sources import Digits, open_source

    source = open_source(path)
    digits = isinstance(source, Digits)
    sizes = tuple(sorted(set(size or ((8,) if digits else (64,)))))
    image_format = image_format or ("png" if digits else "jpeg")
    if quality is not None and image_format != "jpeg":
        raise OptionError(
            f"--quality {quality} has no meaning for {image_format} images", "leave it out or give --format jpeg"
        )
    config = ConversionConfig(
        sizes=sizes,
        channels=int(channels) if channels else (1 if digits else 3),
        crop=crop,
        resample=resample,
        background=parse_colour(background),
        image_format=image_format,
        quality=quality or 100,
    )
    console = Console()
    report = prepare(
        source,
        out or default_output(source, sizes),
        config,
        num_workers=cpu_cores() if num_workers is None else num_workers,
        overwrite=overwrite,
        strict=strict,
        reporter=console,
    )
    console.result(as_json(report) if json else summary(report))
    return EXIT_SKIPPED if report.rejected else 0


def default_output(source: Source, sizes: tuple[int, ...]) -> Path:
    """`data/NAME_SIZE`, or `data/NAME_64_128` for several sizes."""
    return Path("data") / "_".join([source.name, *map(str, sizes)])


def parse_colour(text: str) -> tuple[int, int, int]:
    """`white` or `#ffffff` as (255, 255, 255).

    Raises:
        OptionError: no such colour.
    """
    from PIL import ImageColor

    try:
        return ImageColor.getrgb(text)[:3]
    except ValueError:
        raise OptionError(f"--background {text!r} is no colour", "give a name such as black, or #rrggbb") from None


def cpu_cores() -> int:
    """The processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def as_json(report: Report) -> str:
    """The report as one JSON object."""
    return jsonlib.dumps(report.to_dict(), ensure_ascii=False)


def summary(report: Report) -> str:
    """The report as aligned lines, ending with the command to run next."""
    sizes = ", ".join(map(str, report.sizes))
    classes = f", {len(report.class_names)} classes" if report.class_names else ""
    rows = [("written", f"{report.images} images{classes}, size {sizes}, to {report.path}")]
    if report.skipped:
        rows.append(("skipped", f"{counted(report.skipped)} (listed in {report.path / 'rejected.jsonl'})"))
    if report.ignored:
        rows.append(("ignored", counted(report.ignored)))
    if report.converted:
        rows.append(("converted", counted(report.converted)))
    rows.append(
        ("took", f"{report.seconds:.1f} s, {report.images_per_second:.0f} images/s, {megabytes(report.num_bytes)}")
    )
    choice = f" --image_size {report.sizes[0]}" if len(report.sizes) > 1 else ""
    rows.append(("next", f"python train.py --data {report.path}{choice}"))
    return "\n".join(f"{head:<10} {text}" for head, text in rows)


def counted(counts: dict[str, int]) -> str:
    """`{"damaged": 2, "empty file": 1}` → `2 damaged, 1 empty file`."""
    return ", ".join(f"{count} {what}" for what, count in counts.items())


def megabytes(num_bytes: int) -> str:
    """`1234567` → `1.2 MB`."""
    return f"{num_bytes / 1e6:.1f} MB"
