"""The evaluation that a report on a ladder wants: each student in its steps, the teacher with samplers of few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from vdiff.distributed import Processes
from vdiff.errors import VdiffError
from vdiff.evaluation.measure import Order, measure
from vdiff.evaluation.plan import Request, why_not
from vdiff.evaluation.results import FILE, Evaluation
from vdiff.models.checkpoint import CheckpointConfig, read_config
from vdiff.report.measured import PLAIN, teacher_steps
from vdiff.report.run import LadderRun
from vdiff.reporting import Reporter

SAMPLERS = (PLAIN, "dpmpp_2m")
FEW = (1, 2, 4, 8)
"""The steps in which the training-free samplers are measured: from where distillation is worth its time."""
QUICK_IMAGES, QUICK_SIZE = 256, 32
"""What a ladder does by itself at its end: at most so many samples of each row, of images up to 32 × 32."""
QUICK_LEAST = 64
"""… and none at all where so many would be too much for a ladder's few updates."""
QUICK_STEPS = 64
"""… in at most so many steps."""


@dataclass(frozen=True)
class Wish:
    """How a ladder is to be measured.

    Attributes:
        num: samples of each row.
        features: see `vdiff evaluate`.
        samplers, steps: with which, and in how many steps, the first teacher is drawn.
        most: nothing is drawn in more steps.
        batch_size: drawn at once.
    """

    num: int = 2000
    features: str = "pixels"
    samplers: tuple[str, ...] = SAMPLERS
    steps: tuple[int, ...] = FEW
    most: int = 2**20
    batch_size: int = 64


def requests(ladder: LadderRun, wish: Wish) -> list[Request]:
    """The rows: what the first teacher is held against, its samplers of few steps, then the students.

    Raises:
        VdiffError: the first teacher is not there.
    """
    first = ladder.first.folder
    if first is None:
        raise VdiffError(f"{ladder.first.name}, the first teacher, is not there", "give --data and `vdiff evaluate`")
    config = read_config(first)
    rows = [Request(first, PLAIN, steps) for steps in _reference(config, teacher_steps(ladder), wish.most)]
    rows += [
        Request(first, sampler, steps)
        for sampler in wish.samplers
        for steps in wish.steps
        if steps <= wish.most and not why_not(config, "uniform", steps)
    ]
    for model in ladder.students:
        if model.folder and model.steps <= wish.most:
            rows.append(Request(model.folder, PLAIN, model.steps))
    return list(dict.fromkeys(rows))


def quick_wish(ladder: LadderRun, budget: int) -> Wish | None:
    """How a ladder is measured at its end by at most `budget` network evaluations; None where these are too few."""
    wish = Wish(most=QUICK_STEPS)
    num = min(QUICK_IMAGES, budget // sum(request.num_steps for request in requests(ladder, wish)))
    return replace(wish, num=num, batch_size=num) if num >= QUICK_LEAST else None


def _reference(config: CheckpointConfig, began: int, most: int) -> list[int]:
    """The most steps, up to those that the ladder began with, that the teacher can be drawn in."""
    for steps in range(min(began, most), 0, -1):
        if not why_not(config, "uniform", steps):
            return [steps]
    return []


def evaluate_ladder(
    ladder: LadderRun,
    data: Path | str,
    wish: Wish,
    *,
    processes: Processes,
    overwrite: bool,
    reporter: Reporter,
    command: str,
) -> Evaluation:
    """Measure a ladder, into `evaluation.json` in the folder that holds it.

    Raises:
        Interrupted, VdiffError: see `vdiff.evaluation.measure.measure`.
    """
    return measure(
        requests(ladder, wish),
        data,
        Order(n=wish.num, batch_size=wish.batch_size),
        processes=processes,
        features=wish.features,
        out=ladder.root / FILE,
        overwrite=overwrite,
        reporter=reporter,
        command=command,
    )


def tells_of(evaluation: Evaluation | None, fingerprints: Sequence[str]) -> bool:
    """Whether an evaluation has rows of all these weights."""
    found = {row.checkpoint_fingerprint for row in evaluation.rows} if evaluation else set()
    return evaluation is not None and set(fingerprints) <= found
