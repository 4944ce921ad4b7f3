"""The evaluation of a ladder: each student in its steps, and the first teacher with training-free samplers."""

from __future__ import annotations

from collections.abc import Sequence

from vdiff.errors import VdiffError
from vdiff.evaluation.plan import EvalPlan, RowSpec, why_not
from vdiff.evaluation.results import Evaluation
from vdiff.models.checkpoint import read_config
from vdiff.report.measured import PLAIN, teacher_steps
from vdiff.report.run import LadderRun

SAMPLERS = (PLAIN, "dpmpp_2m")
FEW = (1, 2, 4, 8)
"""The steps in which the training-free samplers are measured: where distillation competes with them."""
QUICK_IMAGES, QUICK_SIZE, QUICK_STEPS = 256, 32, 64
"""The evaluation at the end of `distill.py`: at most so many samples a row, of images up to 32 × 32, in 64 steps."""
QUICK_LEAST = 64
"""No evaluation where the budget allows fewer samples."""


def ladder_rows(ladder: LadderRun, *, most_steps: int = 2**20) -> list[RowSpec]:
    """The first teacher in the most steps that it takes, up to those that the ladder began with, and with `SAMPLERS` in
    few steps; then the students.

    Args:
        most_steps: rows of more steps are left out.

    Raises:
        VdiffError: the first teacher is not there.
    """
    first = ladder.first.folder
    if first is None:
        raise VdiffError(f"{ladder.first.name}, the first teacher, is not there", "give --data and `vdiff evaluate`")
    config = read_config(first)
    began = range(min(teacher_steps(ladder), most_steps), 0, -1)
    reference = next((steps for steps in began if not why_not(config, "uniform", steps)), None)
    rows = [RowSpec(first, PLAIN, reference)] if reference else []
    few = [steps for steps in FEW if steps <= most_steps and not why_not(config, "uniform", steps)]
    rows += [RowSpec(first, sampler, steps) for sampler in SAMPLERS for steps in few]
    students = [model for model in ladder.students if model.folder and model.steps <= most_steps]
    rows += [RowSpec(model.folder, PLAIN, model.steps) for model in students if model.folder]
    return list(dict.fromkeys(rows))


def quick_plan(ladder: LadderRun, budget: int) -> tuple[list[RowSpec], EvalPlan] | None:
    """An evaluation of at most `budget` network evaluations; None where these are too few."""
    rows = ladder_rows(ladder, most_steps=QUICK_STEPS)
    num = min(QUICK_IMAGES, budget // sum(row.num_steps for row in rows))
    return (rows, EvalPlan(n=num, batch_size=num)) if num >= QUICK_LEAST else None


def tells_of(evaluation: Evaluation | None, fingerprints: Sequence[str]) -> bool:
    """Whether an evaluation has rows of all these weights."""
    return evaluation is not None and set(fingerprints) <= {row.checkpoint_fingerprint for row in evaluation.rows}
