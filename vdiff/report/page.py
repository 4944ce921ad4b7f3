"""The report as one HTML file that asks nobody for anything."""

from __future__ import annotations

import base64
import datetime
import hashlib
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import vdiff
from vdiff.errors import printable
from vdiff.files import write_text
from vdiff.replacing import Kind, check_free, locked
from vdiff.report import plots, tables
from vdiff.report.figures import figure, whole
from vdiff.report.losses import read_losses
from vdiff.report.measured import Measured, measured, time_curve
from vdiff.report.pictures import Inlined, inlined, read_picture, strips
from vdiff.report.run import LadderRun
from vdiff.report.words import evaluate_command, facts, notes, recipes, sample_command, summary
from vdiff.text import plural

NAME = "report.html"
GENERATOR = "vdiff"
EVALUATIONS = "network evaluations an image"


@dataclass(frozen=True)
class Rung:
    """A model in the ladder's picture: a strip of `count` images, all from the noise of the other strips."""

    name: str
    steps: str
    note: str
    strip: Inlined
    count: int


@dataclass(frozen=True)
class Losses:
    """The plot of a model's losses."""

    name: str
    steps: str
    drawing: str


def _is_report(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return GENERATOR if f'content="{GENERATOR} '.encode() in file.read(4096) else ""
    except OSError:
        return ""


REPORT = Kind("report", _is_report)


def write_report(ladder: LadderRun, out: Path | None = None) -> Path:
    """Write the report on a ladder, whole or not at all; answer where it is.

    Args:
        out: the file; `report.html` in the ladder's folder by default. An earlier report is replaced.

    Raises:
        VdiffError: a picture cannot be read, the file is no report, or the file system refuses.
    """
    path = out or ladder.folder / NAME
    with locked(path):
        check_free(path, REPORT, overwrite=True)
        write_text(path, render(ladder))
    return path


def render(ladder: LadderRun) -> str:
    """The page as HTML."""
    import jinja2
    from markupsafe import Markup

    style, script = _part("page.css"), _part("page.js")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_printable
    )
    environment.globals["svg"] = Markup  # of our own drawings alone: `to_svg` escapes what they say
    environment.filters |= {"figure": figure, "whole": whole, "plural": plural}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode("ascii")
    page = environment.from_string(_part("page.html")).render(
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        version=vdiff.__version__,
        date=datetime.date.today().isoformat(),
        **content(ladder, measured(ladder)),
    )
    return page.lstrip() + "\n"


def content(ladder: LadderRun, found: Measured) -> dict[str, Any]:
    """All that the template puts on the page."""
    evaluation = ladder.evaluation
    strips_drawn = rungs(ladder)
    is_second = bool(strips_drawn)  # what is only shown where nothing better is there need not be in the file
    return {
        "folder": ladder.folder.as_posix(),
        "is_ladder": bool(ladder.students),
        "summary": summary(ladder, found),
        "facts": facts(ladder, found),
        "notes": notes(ladder, found),
        "others": [path.as_posix() for path in ladder.others],
        "rungs": strips_drawn,
        "picture": _picture(None if is_second else ladder.picture),
        "samples": _picture(None if is_second or ladder.picture else ladder.samples),
        "found": found,
        "distance_plot": _distance_plot(found),
        "distance_table": tables.distances(found),
        "evaluation": evaluation,
        "evaluation_table": tables.evaluation(ladder),
        "evaluate_command": evaluate_command(ladder),
        "sample_command": sample_command(ladder),
        "time_plot": _time_plot(ladder),
        "time_table": tables.times(ladder),
        "losses": losses(ladder),
        "stages": tables.stages(ladder, found),
        "pairs": _picture(ladder.pairs),
        "nearest": tables.nearest(ladder),
        "settings": [(model.name, model.steps, model.settings) for model in ladder.models if model.settings],
        "recipes": recipes(ladder),
    }


def rungs(ladder: LadderRun) -> list[Rung]:
    """The ladder's picture in strips; empty where it is not there, or of another comparison."""
    if not ladder.images:
        return []
    picture = read_picture(ladder.images)
    drawn = [line for line in ladder.compared if line.ms_per_image is not None]
    cut = strips(picture, len(drawn))
    count = picture.width * len(cut) // picture.height
    told = []
    for line, strip in zip(drawn, cut, strict=False):
        error = "" if line.rmse_to_first is None else f"RMSE {figure(line.rmse_to_first)}"
        told.append(Rung(line.name, plural(line.steps, "step"), error, inlined(strip), count))
    return told


def losses(ladder: LadderRun) -> list[Losses]:
    """The losses of each model that logged them."""
    told = []
    for k, model in enumerate(ladder.models):
        points = read_losses(model.folder) if model.folder else []
        if len(points) > 1:
            steps = plural(model.steps, "step")
            told.append(Losses(model.name, steps, plots.losses(f"loss-{k}", points, f"{model.name}, {steps}")))
    return told


def _picture(path: Path | None) -> Inlined | None:
    return inlined(read_picture(path)) if path else None


def _distance_plot(found: Measured) -> dict[str, str]:
    if not found.curves:
        return {}
    dashed = found.teacher if found.student_curve.points else None
    return plots.both_sizes(plots.trade, "distance", found.curves, EVALUATIONS, found.name, dashed)


def _time_plot(ladder: LadderRun) -> dict[str, str]:
    curve = time_curve(ladder)
    if len(curve.points) < 2:
        return {}
    return plots.both_sizes(plots.trade, "time", [curve], "steps", "milliseconds an image", None)


def _printable(value: Any) -> Any:
    """Texts of others without control characters; our own markup, whose type is not `str`, and numbers as they are."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def _part(name: str) -> str:
    return resources.files("vdiff.report").joinpath(name).read_text(encoding="utf-8")
