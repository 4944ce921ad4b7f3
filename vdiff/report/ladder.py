"""A ladder's files: models, verdicts, logs and pictures; and the evaluation for a report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vdiff.errors import VdiffError
from vdiff.evaluation.plan import EvalPlan, RowSpec, why_not
from vdiff.evaluation.results import FILE as EVALUATION
from vdiff.evaluation.results import Evaluation
from vdiff.files import read_json, read_text
from vdiff.models.checkpoint import CONFIG, CheckpointConfig, read_config, weights_fingerprint, weights_path
from vdiff.projects import models_in
from vdiff.records import (
    LADDER,
    LADDER_IMAGES,
    LADDER_PICTURE,
    RUN_FILE,
    SAMPLES_FOLDER,
    VERDICT,
    LadderRow,
    read_ladder_rows,
)
from vdiff.text import cause_of

AGAIN = "move it away, and run the same distill.py command to write it again"
PLAIN = "ddim"
SAMPLERS = (PLAIN, "dpmpp_2m")
FEW = (1, 2, 4, 8)
"""The steps in which training-free samplers are measured, where distillation competes with them."""
QUICK_IMAGES, QUICK_SIZE, QUICK_STEPS = 256, 32, 64
"""The evaluation at the end of `distill.py`: the most samples per row and pixels per side, and the steps."""
QUICK_LEAST = 64
"""No evaluation if the budget allows fewer samples."""


@dataclass(frozen=True)
class LadderModel:
    """One model of a ladder: the first teacher, or a student.

    Attributes:
        name: of its folder.
        folder: None if only the description in its student's checkpoint is left.
        description: its `config.json`, without its teacher's.
        fingerprint: SHA-256 of its weights; empty if unknown.
        verdict: its `verdict.json`; empty if there is none.
        settings: its `run.toml`.
    """

    name: str
    folder: Path | None
    description: Mapping[str, Any]
    fingerprint: str
    verdict: Mapping[str, Any]
    settings: str

    @property
    def steps(self) -> int:
        """Its default number of sampling steps."""
        return int(self.description["num_timesteps"])

    @property
    def key(self) -> tuple[str, int]:
        """Weights and steps: a student with its initial weights has its teacher's weights."""
        return self.fingerprint, self.steps

    def number(self, key: str) -> float:
        """A number in its description; 0 if it is missing."""
        value = self.description.get(key)
        return value if isinstance(value, int | float) else 0


@dataclass(frozen=True)
class LadderRun:
    """Everything in a report.

    Attributes:
        folder: the folder of the call.
        root: the folder of the ladder; the same, unless `folder` is a checkpoint.
        models: the first teacher, then its students in order.
        compared: models that sampled from the same noise, if any.
        images: the picture of those samples, with a row for each of `compared`, or None.
        picture: the same with captions, as `distill.py` writes it.
        samples: the newest grid of samples of the last model.
        evaluation: of these and other models, or None.
        pairs: samples beside their nearest images of the data.
        others: the last students of other ladders in the folder.
    """

    folder: Path
    root: Path
    models: tuple[LadderModel, ...]
    compared: tuple[LadderRow, ...]
    images: Path | None
    picture: Path | None
    samples: Path | None
    evaluation: Evaluation | None
    pairs: Path | None
    others: tuple[Path, ...]

    @property
    def first(self) -> LadderModel:
        """The first teacher."""
        return self.models[0]

    @property
    def last(self) -> LadderModel:
        """The last student; the first teacher, if nothing was distilled."""
        return self.models[-1]

    @property
    def students(self) -> tuple[LadderModel, ...]:
        """All models except the first."""
        return self.models[1:]

    @property
    def teacher_steps(self) -> int:
        """The steps of the first teacher in the first stage: its own, or fewer if the ladder began with fewer."""
        mine = [steps for name, steps in (line.key for line in self.compared) if name == self.first.name]
        return mine[-1] if mine else self.first.steps


def read_ladder(folder: Path, *, last: Path | None = None) -> LadderRun:
    """The ladder in `folder`, which holds checkpoints or is the last checkpoint of a ladder.

    Of several ladders in a folder, it is the one with the newest last student; `others` names the others.

    Args:
        last: the last student, to choose the ladder.

    Raises:
        VdiffError: the folder is missing or holds no checkpoint, or a file cannot be read.
    """
    if not folder.exists():
        raise VdiffError(f"{folder}: no such folder", "give the one that holds original, base_0, base_1 …")
    if not folder.is_dir():
        raise VdiffError(f"{folder} is a file", "give the folder that holds original, base_0, base_1 …")
    root = folder
    if (folder / CONFIG).is_file():
        last, root = folder, folder.parent if folder.name not in ("", "..") else folder.resolve().parent
    found = {path: read_config(path) for path in models_in(root)}
    if not found:
        raise VdiffError(f"{folder} holds no checkpoint", "run `python train.py` first, or give another folder")
    fingerprints = {path: weights_fingerprint(path) for path in found}
    ends = _ends(found, fingerprints)
    chosen = ends[-1]
    if last:
        chosen = next((path for path in [*ends, *found] if path.resolve() == last.resolve()), last)
    models = _lineage(chosen, found, fingerprints)
    holder = models[-1].folder or chosen
    compared = _compared(holder / LADDER)
    record = _file(folder / EVALUATION, root / EVALUATION)
    evaluation = Evaluation.read(record) if record else None
    pairs = Path(evaluation.pairs).name if evaluation and evaluation.pairs else None
    return LadderRun(
        folder=folder,
        root=root,
        models=models,
        compared=compared,
        images=_file(holder / LADDER_IMAGES) if compared else None,
        picture=_file(holder / LADDER_PICTURE),
        samples=max((holder / SAMPLES_FOLDER).glob("*.png"), default=None),
        evaluation=evaluation,
        pairs=_file(folder / pairs, root / pairs) if pairs else None,
        others=tuple(path for path in ends if path != chosen),
    )


def _ends(found: Mapping[Path, CheckpointConfig], fingerprints: Mapping[Path, str]) -> list[Path]:
    """The checkpoints that are not teachers, in the order of their time; base models before students."""
    teachers = [config.teacher or {} for config in found.values()]
    # a student with its initial weights has its teacher's weights, but other steps
    known = {(str(teacher.get("fingerprint")), teacher.get("num_timesteps")) for teacher in teachers}
    ends = [path for path in found if (fingerprints[path], found[path].num_timesteps) not in known]

    def age(path: Path) -> tuple[bool, int, str]:
        return found[path].teacher is not None, (path / CONFIG).stat().st_mtime_ns, str(path)

    return sorted(ends, key=age)


def _lineage(
    last: Path, found: Mapping[Path, CheckpointConfig], fingerprints: Mapping[Path, str]
) -> tuple[LadderModel, ...]:
    """The models from the first teacher to `last`; weights and steps identify a teacher in any folder."""
    config = found[last] if last in found else read_config(last)
    fingerprint = fingerprints[last] if last in found else weights_fingerprint(last)
    models = [_model(last.name, last, vars(config), fingerprint)]
    teacher = config.teacher
    while teacher:
        wanted, path = str(teacher.get("fingerprint") or ""), Path(str(teacher.get("path") or "?"))
        same = [other for other in found if wanted and fingerprints[other] == wanted]
        steps = teacher.get("num_timesteps")
        folder = next((other for other in same if found[other].num_timesteps == steps), same[0] if same else None)
        if folder is None and wanted and (path / CONFIG).is_file() and weights_path(path).is_file():
            folder = path if weights_fingerprint(path) == wanted else None
        models.append(_model(folder.name if folder else path.name, folder, teacher, wanted))
        teacher = teacher.get("teacher")
    return tuple(reversed(models))


def _model(name: str, folder: Path | None, description: Mapping[str, Any], fingerprint: str) -> LadderModel:
    steps = description.get("num_timesteps")
    if not isinstance(steps, int) or steps < 1:  # a teacher's description does not come from its own run
        raise VdiffError(f"{name}: the description of a teacher lacks the number of steps", "restore the student")
    own = {key: value for key, value in description.items() if key not in ("teacher", "path", "fingerprint")}
    verdict = read_json(folder / VERDICT, AGAIN) if folder and (folder / VERDICT).is_file() else {}
    return LadderModel(name, folder, own, fingerprint, verdict, _text(folder / RUN_FILE) if folder else "")


def _compared(path: Path) -> tuple[LadderRow, ...]:
    """The rows of `ladder.json`, if it exists.

    Raises:
        VdiffError: it cannot be read.
    """
    try:
        return tuple(read_ladder_rows(path)) if path.is_file() else ()
    except (OSError, ValueError) as error:
        raise VdiffError(f"{path} is not a comparison: {cause_of(error)}", AGAIN) from None


def _text(path: Path) -> str:
    """A text file; empty if it is missing.

    Raises:
        VdiffError: it cannot be read.
    """
    if not path.is_file():
        return ""
    try:
        return read_text(path)
    except (OSError, ValueError) as error:
        raise VdiffError(f"{path} cannot be read: {cause_of(error)}", AGAIN) from None


def _file(*paths: Path) -> Path | None:
    """The first of some files that exists."""
    return next((path for path in paths if path.is_file()), None)


def ladder_rows(ladder: LadderRun, *, most_steps: int = 2**20) -> list[RowSpec]:
    """The rows to measure: the first teacher in its most steps, up to the ladder's first number, and with `SAMPLERS` in
    few steps; then the students.

    Args:
        most_steps: rows with more steps are omitted.

    Raises:
        VdiffError: the first teacher is missing.
    """
    first = ladder.first.folder
    if first is None:
        raise VdiffError(f"{ladder.first.name}, the first teacher, is missing", "use `vdiff evaluate --data DATASET`")
    config = read_config(first)
    began = range(min(ladder.teacher_steps, most_steps), 0, -1)
    reference = next((steps for steps in began if not why_not(config, "uniform", steps)), None)
    rows = [RowSpec(first, PLAIN, reference)] if reference else []
    few = [steps for steps in FEW if steps <= most_steps and not why_not(config, "uniform", steps)]
    rows += [RowSpec(first, sampler, steps) for sampler in SAMPLERS for steps in few]
    students = [model for model in ladder.students if model.folder and model.steps <= most_steps]
    rows += [RowSpec(model.folder, PLAIN, model.steps) for model in students if model.folder]
    return list(dict.fromkeys(rows))


def quick_plan(ladder: LadderRun, budget: int) -> tuple[list[RowSpec], EvalPlan] | None:
    """An evaluation with at most `budget` network evaluations; None if these are too few."""
    rows = ladder_rows(ladder, most_steps=QUICK_STEPS)
    num = min(QUICK_IMAGES, budget // sum(row.num_steps for row in rows))
    return (rows, EvalPlan(n=num, batch_size=num)) if num >= QUICK_LEAST else None
