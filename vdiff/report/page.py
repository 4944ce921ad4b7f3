"""The report as one HTML file that contains everything it shows and loads nothing."""

from __future__ import annotations

import base64
import datetime
import hashlib
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import PIL.Image

import vdiff
from vdiff.errors import VdiffError, printable
from vdiff.files import write_text
from vdiff.records import LOG_FOLDER, SAMPLES_FOLDER
from vdiff.replacing import Kind, check_free, locked
from vdiff.report import content, plots
from vdiff.report.content import Distances
from vdiff.report.formatting import figure, whole
from vdiff.report.ladder import LadderRun
from vdiff.report.plots import Curve
from vdiff.text import plural

NAME = "report.html"
GENERATOR = "vdiff"
LOSSLESS_PIXELS = 2**19
"""Pictures up to this size stay lossless."""
QUALITY = 88
MAX_SIDE = 4096
AGAIN = "move it away, and run the command that wrote it again"
LOSS = "loss"
MAX_POINTS = 400
FEWEST = 3
"""The fewest points for a plot; fewer are shown only in the tables."""
SHOWN_GRIDS = 4


@dataclass(frozen=True)
class Inlined:
    """A picture as a `data:` URL, and its size in pixels."""

    address: str
    width: int
    height: int


@dataclass(frozen=True)
class Rung:
    """A model in the ladder's picture: a strip of `count` images, from the same noise as the other strips."""

    name: str
    steps: str
    note: str
    strip: Inlined
    count: int


def _is_report(path: Path) -> str:
    with open(path, "rb") as file:
        return GENERATOR if f'content="{GENERATOR} '.encode() in file.read(4096) else ""


REPORT = Kind("report", _is_report)


def write_report(ladder: LadderRun, out: Path | None = None) -> Path:
    """Write the report on a ladder, whole or not at all; return its path.

    Args:
        out: the file; `report.html` in the ladder's folder by default. An earlier report is replaced.

    Raises:
        VdiffError: a picture cannot be read, the file is not a report, or the file system refuses.
    """
    path = out or ladder.folder / NAME
    with locked(path):
        check_free(path, REPORT, overwrite=True)
        write_text(path, render(ladder, path.parent))
    return path


def render(ladder: LadderRun, folder: Path | None = None) -> str:
    """The page as HTML.

    Args:
        folder: where it will lie; by default the ladder's folder.
    """
    import jinja2
    from markupsafe import Markup

    style, script = _part("page.css"), _part("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    environment.globals["svg"] = Markup  # only for vdiff's own drawings: `to_svg` escapes their texts
    environment.filters |= {"figure": figure, "whole": whole, "plural": plural}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = environment.from_string(_part("page.html")).render(
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        version=vdiff.__version__,
        date=datetime.date.today().isoformat(),
        web_page=content.web_page(ladder, folder or ladder.folder),
        **page_values(ladder, content.distances_of(ladder)),
    )
    return page.lstrip() + "\n"


def page_values(ladder: LadderRun, found: Distances) -> dict[str, Any]:
    """The values of the template."""
    strips, noun = rungs(ladder), content.noun_of(ladder)
    is_second = bool(strips)  # otherwise the file would contain pictures that are not shown
    times, levels = content.time_curve(ladder), {}
    if found.teacher and found.student_curve.points:
        levels[""] = found.teacher.y
    if found.scale:
        levels |= {f"other {noun}s": found.scale.same, "blurred": found.scale.blurred, "mean": found.scale.mean_image}
    return {
        "title": content.title(ladder),
        "is_ladder": bool(ladder.students),
        "summary": content.summary(ladder, found),
        "facts": content.facts(ladder, found),
        "notes": content.notes(ladder, found),
        "others": [path.as_posix() for path in ladder.others],
        "rungs": strips,
        "picture": _picture(None if is_second else ladder.picture),
        "samples": _picture(None if is_second or ladder.picture else ladder.samples),
        "found": found,
        "noun": noun,
        "distance_plot": _plot("distance", found.curves, f"network evaluations per {noun}", found.name, levels),
        "distance_table": content.distance_table(found),
        "evaluation": ladder.evaluation,
        "evaluation_table": content.evaluation_table(ladder),
        "evaluate_command": content.evaluate_command(ladder),
        "sample_command": content.sample_command(ladder),
        "time_plot": _plot("time", [times], "steps", f"milliseconds per {noun}"),
        "progress": progress(ladder),
        "time_table": content.time_table(ladder),
        "losses": losses(ladder),
        "stages": content.stage_table(ladder, found),
        "pairs": _picture(ladder.pairs),
        "nearest": content.nearest_table(ladder),
        "settings": [(model.name, model.steps, model.settings) for model in ladder.models if model.settings],
        "recipes": content.recipes(ladder),
    }


def rungs(ladder: LadderRun) -> list[Rung]:
    """The ladder's picture in strips; empty if it is missing or belongs to another comparison."""
    if not ladder.images:
        return []
    picture = read_picture(ladder.images)
    drawn = [line for line in ladder.compared if line.ms_per_image is not None]
    cut = split_rows(picture, len(drawn))
    count = picture.width * len(cut) // picture.height
    result = []
    for line, strip in zip(drawn, cut, strict=False):
        error = "" if line.rmse_to_first is None else f"RMSE {figure(line.rmse_to_first)}"
        name, steps = line.key
        result.append(Rung(name, plural(steps, "step"), error, inlined(strip), count))
    return result


def losses(ladder: LadderRun) -> list[tuple[str, str, str]]:
    """Name, steps and plot of each model that logged its losses."""
    result = []
    for k, model in enumerate(ladder.models):
        points = read_losses(model.folder) if model.folder else []
        if len(points) >= FEWEST:
            steps = plural(model.steps, "step")
            result.append((model.name, steps, plots.losses(f"loss-{k}", points, f"{model.name}, {steps}")))
    return result


def _picture(path: Path | None) -> Inlined | None:
    return inlined(read_picture(path)) if path else None


def progress(ladder: LadderRun) -> list[tuple[str, Inlined]]:
    """Grids of samples from the first teacher's training: the first, the last and some in between."""
    folder = ladder.first.folder
    paths = sorted((folder / SAMPLES_FOLDER).glob("[0-9]*.png")) if folder else []
    last = min(len(paths), SHOWN_GRIDS) - 1
    few = [paths[k * (len(paths) - 1) // max(last, 1)] for k in range(last + 1)]
    return [(f"{int(path.stem):,} updates", inlined(read_picture(path))) for path in few]


def _plot(
    name: str, curves: Sequence[Curve], x: str, y: str, levels: Mapping[str, float] | None = None
) -> dict[str, str]:
    """A plot for wide and for narrow screens; empty if there are too few points."""
    is_line = max((len(curve.points) for curve in curves), default=0) >= FEWEST
    sizes = {"wide": plots.WIDE, "narrow": plots.NARROW} if is_line else {}
    return {key: plots.trade(f"{name}-{key}", size, curves, x, y, levels or {}) for key, size in sizes.items()}


def _printable(value: Any) -> Any:
    """Texts without control characters; vdiff's markup, which is not of type `str`, and numbers are unchanged."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def _part(name: str) -> str:
    return resources.files("vdiff.report").joinpath(name).read_text(encoding="utf-8")


# Pictures and losses


def read_picture(path: Path) -> PIL.Image.Image:
    """A picture file, decoded.

    Raises:
        VdiffError: it cannot be read.
    """
    try:
        with PIL.Image.open(path) as picture:
            picture.load()
            return picture if picture.mode in ("L", "RGB") else picture.convert("RGB")
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise VdiffError(f"{path} is not a readable picture: {error}", AGAIN) from None


def inlined(picture: PIL.Image.Image) -> Inlined:
    """The picture as WebP: lossless if it is small, else with quality 88 and at most 4096 pixels per side."""
    buffer, is_small = io.BytesIO(), picture.width * picture.height <= LOSSLESS_PIXELS
    if max(picture.size) > MAX_SIDE:
        picture = picture.copy()
        picture.thumbnail((MAX_SIDE, MAX_SIDE), PIL.Image.Resampling.LANCZOS)
    mode = "RGBA" if picture.mode == "RGBA" else "RGB"
    picture.convert(mode).save(buffer, format="WEBP", lossless=is_small, quality=100 if is_small else QUALITY)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return Inlined(f"data:image/webp;base64,{data}", picture.width, picture.height)


def split_rows(picture: PIL.Image.Image, rows: int) -> list[PIL.Image.Image]:
    """A picture of square images cut into `rows`, with gaps between the images of a row; empty if it does not fit."""
    side, rest = divmod(picture.height, rows)
    if rest or not side or picture.width % side:
        return []
    count, step = picture.width // side, side + max(1, side // 16)
    found = [PIL.Image.new("RGBA", (count * step - step + side, side)) for _ in range(rows)]
    for k, strip in enumerate(found):
        for i in range(count):
            strip.paste(picture.crop((i * side, k * side, (i + 1) * side, (k + 1) * side)), (i * step, 0))
    return found


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """(update, loss) of a run's TensorBoard log, in order; for updates that a resumed run repeated, the last loss.

    Empty if there is no readable log. Of very many, every k-th and the last.
    """
    if not any((folder / LOG_FOLDER).glob("events.out.tfevents.*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = logging.getLogger("tensorboard")
    before, logger.disabled = logger.disabled, True  # it warns about a log that a kill cut short
    try:
        events = EventAccumulator(str(folder / LOG_FOLDER), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
        events.Reload()
        scalars = events.Scalars(LOSS) if LOSS in events.Tags()["scalars"] else []
    finally:
        logger.disabled = before
    losses = {event.step: event.value for event in scalars if math.isfinite(event.value)}
    return thinned(sorted(losses.items()))


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MAX_POINTS` points and the last one."""
    step = -(-len(points) // MAX_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]
