"""`vdiff report`: one page about the quality of a ladder; `distill.py` writes it at its end."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vdiff.cli.console import Console
from vdiff.cli.options import NUM, OLD_NUM, Command, OneOf, option, project_option, switch, typed_command
from vdiff.cli.sample import DEVICES
from vdiff.errors import OptionError, VdiffError, shell
from vdiff.projects import Project

if TYPE_CHECKING:
    import torch

    from vdiff.distributed import Processes
    from vdiff.evaluation.plan import EvalPlan, RowSpec
    from vdiff.report.ladder import LadderRun
    from vdiff.training.stages import Stage


@click.command(
    cls=Command,
    examples=[
        "vdiff report                                    # checkpoints/report.html",
        "vdiff report checkpoints --evaluate --open      # measure the ladder first",
        "vdiff report checkpoints/base_5 --out p.html # the ladder to base_5",
    ],
)
@click.argument("run_dir", required=False, type=click.Path(path_type=Path))
@project_option()
@option(
    "--out", group="Output", type=click.Path(path_type=Path), metavar="FILE.html",
    show_default="RUN_DIR/report.html",
    help="The page; it replaces only an earlier report.",
)  # fmt: skip
@switch("--open", "open_it", group="Output", help="Open it in the browser.")
@switch("--json", group="Output", help="Print one JSON object: the path of the page, and the figures of each model.")
@switch(
    "--evaluate", group="Measuring",
    help="First measure each student in its steps, and the teacher in 1, 2, 4 and 8 steps of ddim and dpmpp_2m. This "
    "replaces evaluation.json.",
)  # fmt: skip
@option(
    "--data", group="Measuring", metavar="DATASET", show_default="the models' training data",
    help="Real images to measure against.",
)  # fmt: skip
@option(
    *NUM,
    old=OLD_NUM,
    group="Measuring",
    type=click.IntRange(1),
    default=2000,
    metavar="IMAGES",
    help="Samples per row.",
)
@option(
    "--features", group="Measuring", default="pixels", metavar="pixels|inception|FILE",
    help="Features to compare, as in vdiff evaluate.",
)  # fmt: skip
@option("--device", group="Measuring", type=OneOf(DEVICES), default="auto", help="Auto takes a GPU if there is one.")
def command(
    run_dir: Path | None,
    project: Project,
    out: Path | None,
    open_it: bool,
    json: bool,
    evaluate: bool,
    data: str | None,
    num: int,
    features: str,
    device: str,
) -> None:
    """Write one HTML page about the ladder in RUN_DIR (default: checkpoints).

    The page works offline. It shows samples of all models from the same noise, their distance to the data against the
    number of steps (from `vdiff evaluate` or --evaluate), times, losses, memorisation, settings, and the commands that
    reproduce the ladder. RUN_DIR is a folder of checkpoints, or the last student of a ladder if the folder has several
    ladders.
    """
    if data is not None and not evaluate:
        raise OptionError("--data needs --evaluate", "give --evaluate too, or leave --data out")
    if out is not None and out.is_dir():
        raise OptionError(f"--out {out} is a folder", "give --out FILE.html")

    from vdiff.report.content import distances_of, models
    from vdiff.report.ladder import read_ladder
    from vdiff.report.page import write_report

    console = Console()
    run_dir = run_dir or project.checkpoints
    ladder = read_ladder(run_dir)
    if evaluate:
        from vdiff.distributed import Processes, pick_device
        from vdiff.evaluation.plan import EvalPlan
        from vdiff.report.ladder import ladder_rows

        images = data or project.dataset_of(str(ladder.first.description.get("dataset", "")))
        plan = EvalPlan(n=num, features=features)
        _evaluate(ladder, ladder_rows(ladder), images, plan, Processes(pick_device(device)), console)
        ladder = read_ladder(run_dir)
    path = write_report(ladder, out)
    if json:
        found = distances_of(ladder)
        values = {"path": path.as_posix(), "distance": found.name, "basis": found.basis}
        console.result(jsonlib.dumps({**values, "models": models(ladder, found)}, ensure_ascii=False), is_json=True)
    else:
        console.result(f"report     {path}")
    if open_it:
        _show(path, console)


def report_at_the_end(
    stages: Sequence[Stage],
    data: str,
    *,
    measure: bool,
    budget: int,
    device: torch.device,
    console: Console,
    open_it: bool,
) -> None:
    """The last step of `distill.py`: a quick evaluation for small images, then the report.

    A failure here is printed in one line; the ladder still succeeds.

    Args:
        data: the dataset; empty if there is none.
        measure: whether to measure distances. An existing evaluation of the same weights is kept.
        budget: how many network evaluations the measurement may use.
    """
    folder, last = stages[-1].folder.parent, stages[-1].folder
    try:
        from vdiff.report.ladder import read_ladder
        from vdiff.report.page import write_report

        ladder = read_ladder(folder, last=last)
        if measure and data:
            try:
                _measure_quickly(ladder, data, budget, device, console)
            except VdiffError as error:
                again = f"`{shell('vdiff', 'report', folder, '--evaluate')}` makes one"
                console.line(f"no evaluation for the report: {error.cause}; {again}")
            ladder = read_ladder(folder, last=last)
        path = write_report(ladder)
    except Exception as error:
        reason = error.cause if isinstance(error, VdiffError) else f"{type(error).__name__}: {error}".splitlines()[0]
        console.line(f"no report was written: {reason}; `{shell('vdiff', 'report', folder)}` tries again")
        return
    console.result(f"report     {path}")
    if open_it:
        _show(path, console)


def _measure_quickly(ladder: LadderRun, data: str, budget: int, device: torch.device, console: Console) -> None:
    from vdiff.distributed import Processes
    from vdiff.report.ladder import QUICK_SIZE, quick_plan

    measured = {row.checkpoint_fingerprint for row in ladder.evaluation.rows} if ladder.evaluation else set()
    if ladder.first.number("image_size") > QUICK_SIZE or ladder.last.fingerprint in measured:
        return
    found = quick_plan(ladder, budget)
    if found is None:
        raise VdiffError("the training was short", "")
    _evaluate(ladder, found[0], data, found[1], Processes(device), console)


def _evaluate(
    ladder: LadderRun, rows: list[RowSpec], data: str, plan: EvalPlan, processes: Processes, console: Console
) -> None:
    """Measure a ladder, into `evaluation.json` in the folder that holds it."""
    from vdiff.evaluation.measure import evaluate
    from vdiff.evaluation.results import FILE

    out, command = ladder.root / FILE, typed_command()
    evaluate(rows, data, processes=processes, reporter=console, out=out, overwrite=True, command=command, **vars(plan))


def _show(path: Path, console: Console) -> None:
    """Open a page in the browser; print a line if there is no browser."""
    import webbrowser

    if not webbrowser.open(path.resolve().as_uri()):
        console.line(f"no browser was found; open {path} in one")
