"""Whether a student may become a teacher, by its distance from its own teacher and from the data; and what follows."""

from __future__ import annotations

import glob
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vdiff.diffusion.samplers import Ddim
from vdiff.errors import VdiffError
from vdiff.files import remove, write_json
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint, read_config, save_checkpoint
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw, squared_errors
from vdiff.records import FAILED, VERDICT, read_record
from vdiff.reporting import Reporter
from vdiff.training.config import DistillConfig
from vdiff.training.engine import Engine
from vdiff.training.stages import Stage
from vdiff.training.state import remove_state
from vdiff.training.student import begin_student, describe_student

HELD_OUT = 2**63
"""Added to the seed: noise that is never drawn otherwise."""
MIN_NOISES = 64
"""Start and end of a stage are compared by at least so many images."""
ROUNDING = 0.01, 1e-4
"""The RMSE of a student may be this part larger than before its training, and this much in pixels."""
WORTH_A_WORD = 1.5
"""A student whose distance to the data is more than this many times its teacher's is spoken of."""
BATCH = 64

Distance = Callable[[Tensor], float]
"""How far images (B, C, H, W) in [−1, 1] are from the data."""


@dataclass(frozen=True)
class Verdict:
    """What was found of a student after its stage.

    Attributes:
        rmse_before, rmse: `vdiff.models.drawing.rmse` from its teacher's images of the same noise, before and after the
            stage; DDIM, the teacher in the steps that it taught with.
        distance, teacher_distance: from the data; None where it was not measured.
        num_images: that the distances rest on.
        attempts: how often the stage was done.
        reason: what makes it a failure; empty where it is none.
        rmse_limit: the largest `rmse` that rounding and the choice of noises explain where training did no harm.
        every: teacher and student were drawn in every so many-th of their steps, see `plan_check`.
        start_distance: of the student before its training, where that is nearer to the teacher.
        kept_start: why the student is what it was before its training; empty where it is not.
    """

    rmse_before: float
    rmse: float
    distance: float | None
    teacher_distance: float | None
    num_images: int
    attempts: int
    reason: str
    rmse_limit: float = 0.0
    every: int = 1
    start_distance: float | None = None
    kept_start: str = ""


def read_verdict(folder: Path) -> Verdict | None:
    """What was found of the student in `folder`; None where nothing was, or nothing that can be read."""
    try:
        return read_record(folder / VERDICT, Verdict, "")
    except VdiffError:
        return None


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Keep it beside the student, whole or not at all."""
    write_json(folder / VERDICT, asdict(verdict))


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Draws teachers and students from the same noise; a student's images are kept, for it is the next stage's teacher.

    Attributes:
        num_images: for the difference from the teacher.
        num_distance_images: for the distance from the data.
        distance: None: it is not measured.
    """

    seed: int
    num_images: int
    num_distance_images: int
    distance: Distance | None
    device: torch.device
    reporter: Reporter
    _kept: dict[tuple[Path, int], Tensor] = field(default_factory=dict)

    def examine(
        self,
        stage: Stage,
        start: Denoiser,
        *,
        guidance: Sequence[float],
        measure_distance: bool,
        max_regression: float,
        attempts: int,
        budget: int,
    ) -> Verdict:
        """Compare the student of a stage with its teacher, and with what it was before its training.

        Args:
            start: the student before its training.
            guidance: the range of weights that the student takes as an input; the middle of it is tried.
            measure_distance: whether the distance to the data is due.
            budget: network evaluations that the comparison may cost, see `plan_check`.
        """
        measure = self.distance if measure_distance else None
        wanted = max(self.num_images, self.num_distance_images if measure else 0)
        every, num_images, count = plan_check(stage.teacher_steps, stage.num_steps, self.num_images, wanted, budget)
        weight = sum(guidance) / 2 if guidance else 0.0
        steps, teacher_steps, name = stage.num_steps // every, stage.teacher_steps // every, stage.folder.name
        if every > 1 or count < wanted:
            few = f"{count} images in {steps} of {stage.num_steps} steps"
            self.reporter.line(f"{name} is checked by {few}, as its training was short")
        theirs = self._images(stage.base, teacher_steps, count, weight)
        student, model = load_checkpoint(stage.folder, self.device)
        before = self._draw(start.to(self.device), model, steps, num_images, weight, "before training")
        errors_before = squared_errors(before, theirs, model.space)
        rmse_before = float(errors_before.mean().sqrt())
        try:
            mine = self._draw(student, model, steps, count, weight, name)
        except VdiffError as error:
            reason = str(error).partition(";")[0]
            return Verdict(rmse_before, math.inf, None, None, count, attempts, reason, every=every)
        errors = squared_errors(mine[:num_images], theirs, model.space)
        # of the same noises the differences scatter much less than the errors do
        scatter = float((errors - errors_before).std() / num_images**0.5) if num_images > 1 else 0.0
        found = Verdict(
            rmse_before=rmse_before,
            rmse=float(errors.mean().sqrt()),
            distance=measure(mine) if measure else None,
            teacher_distance=measure(theirs) if measure else None,
            num_images=count,
            attempts=attempts,
            reason="",
            rmse_limit=max((rmse_before**2 + 2 * scatter) ** 0.5, (1 + ROUNDING[0]) * rmse_before + ROUNDING[1]),
            every=every,
        )
        if measure and worsening(found, max_regression):
            before = self._draw(start, model, steps, count, weight, "before training")
            found = replace(found, start_distance=measure(before))
        self._kept.clear()
        self._kept[stage.base, teacher_steps] = theirs
        if not worsening(found, max_regression):  # else another student comes in its place
            self._kept[stage.folder, steps] = mine
        return replace(found, reason=why_failed(found, max_regression))

    def _images(self, folder: Path, num_steps: int, count: int, weight: float) -> Tensor:
        """A teacher's images, those kept if they are enough, and were drawn in the same batches: to the same bits."""
        kept = self._kept.get((folder, num_steps))
        if kept is not None and (len(kept) == count or (len(kept) > count and count % BATCH == 0)):
            return kept[:count]
        denoiser, model = load_checkpoint(folder, self.device)
        return self._draw(denoiser, model, num_steps, count, weight, folder.name)

    def _draw(
        self, denoiser: Denoiser, model: CheckpointConfig, num_steps: int, count: int, weight: float, name: str
    ) -> Tensor:
        parts: list[Tensor] = []
        guidance = weight if denoiser.network.signature.null else 0.0
        with self.reporter.progress(f"checking {name}", num_steps * -(-count // BATCH), "evaluations") as bar:
            for first in range(0, count, BATCH):
                done = len(parts) * num_steps
                parts.append(
                    draw(
                        denoiser,
                        Ddim(clipping_value=model.space.limit),
                        indices=range(first, min(first + BATCH, count)),
                        image_size=model.shape[1:],
                        num_steps=num_steps,
                        seed=HELD_OUT + self.seed,
                        guidance=guidance,
                        on_step=lambda step, done=done: bar.update(done + step),
                    )
                )
        return torch.cat(parts)


def plan_check(
    teacher_steps: int, num_steps: int, num_images: int, num_distance: int, budget: int
) -> tuple[int, int, int]:
    """How a check costs at most about `budget` network evaluations: a function of numbers alone, so that all agree.

    Fewer images are drawn, at least `MIN_NOISES`; if these still cost too much, teacher and student are both drawn in
    every so many-th of their steps only.

    Returns:
        every, images for the difference from the teacher (drawn by the teacher, the student, and the student before
        its training), images for the distance to the data (by the first two).
    """
    few = min(num_images, MIN_NOISES)
    per_image = teacher_steps + 2 * num_steps
    common = [k for k in range(1, num_steps + 1) if num_steps % k == 0 and teacher_steps % k == 0]
    every = next((k for k in common if few * per_image <= budget * k), common[-1])
    images = max(few, min(num_images, budget * every // per_image))
    more = (budget * every - images * per_image) // (teacher_steps + num_steps)
    return every, images, max(images, min(num_distance, images + more))


def collapse(found: Verdict, max_regression: float) -> str:
    """What makes a student no model of the data any more; empty where nothing does."""
    if not math.isfinite(found.rmse):
        return found.reason or "its images are not finite"
    return _regression(found.distance, found.teacher_distance, max_regression)


def worsening(found: Verdict, max_regression: float) -> str:
    """Why the student before its training is the better one; empty where it is not."""
    is_worse = found.rmse > max(found.rmse_limit, found.rmse_before)
    if not is_worse or _regression(found.start_distance, found.teacher_distance, max_regression):
        return ""
    return f"RMSE to its teacher rose from {found.rmse_before:.4f} to {found.rmse:.4f} by the training"


def why_failed(found: Verdict, max_regression: float) -> str:
    """What makes a student no teacher; empty where nothing does."""
    return collapse(found, max_regression) or worsening(found, max_regression)


def _regression(far: float | None, teachers: float | None, most: float) -> str:
    if far is None or teachers is None or far <= most * teachers:
        return ""
    return f"distance to the data is {far:.3g}, its teacher's {teachers:.3g}"


def warning(found: Verdict) -> str:
    """A word on a student that is good enough, and much worse than its teacher; empty where none is due."""
    far, teachers = found.distance, found.teacher_distance
    if found.reason or far is None or not teachers or far <= WORTH_A_WORD * teachers:
        return ""
    return f"its distance to the data is {far / teachers:.1f} times its teacher's: more --num_iters may help"


def summary(verdict: Verdict) -> str:
    """`RMSE to its teacher 0.031 (before training 0.112), distance to data 0.23 (teacher 0.21)`."""
    text = f"RMSE to its teacher {verdict.rmse:.4f} (before training {verdict.rmse_before:.4f})"
    if verdict.every > 1:
        text += f", both in one of {verdict.every} steps"
    if verdict.distance is not None:
        text += f", distance to the data {verdict.distance:.3g} (teacher {verdict.teacher_distance:.3g})"
    return text


# Attempts that failed


def failed_attempts(folder: Path) -> list[Path]:
    """The students that were set aside for `folder`, in their order."""
    paths = folder.parent.glob(f"{glob.escape(folder.name)}{FAILED}*")
    numbers = {path: path.name.removeprefix(f"{folder.name}{FAILED}") for path in paths}
    return sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))


def times_failed(folder: Path) -> int:
    """How often the stage of `folder` was done in vain, as the students set aside tell."""
    verdicts = [read_verdict(path) for path in failed_attempts(folder)]
    return max([len(verdicts), *(verdict.attempts for verdict in verdicts if verdict)])


def set_aside(folder: Path) -> None:
    """Make room for another attempt."""
    last = [int(path.name.removeprefix(f"{folder.name}{FAILED}")) for path in failed_attempts(folder)[-1:]]
    folder.rename(folder.with_name(f"{folder.name}{FAILED}{sum(last) + len(last)}"))


def keep_best(folder: Path, verdict: Verdict) -> None:
    """Leave in `folder` the attempt that is nearest to the teacher, and no other; it knows how many there were."""
    best = _nearest([*failed_attempts(folder), folder])
    write_verdict(best, replace(read_verdict(best) or verdict, attempts=verdict.attempts))
    if best != folder:
        set_aside(folder)
        best.rename(folder)
    for path in failed_attempts(folder):
        remove(path)


def finish_keeping(folder: Path, retries: int) -> None:
    """What a kill between the two renames of `keep_best` left undone."""
    if not folder.exists() and times_failed(folder) > retries:
        _nearest(failed_attempts(folder)).rename(folder)


def _nearest(attempts: list[Path]) -> Path:
    verdicts = {path: read_verdict(path) for path in attempts}
    return min(attempts, key=lambda path: verdict.rmse if (verdict := verdicts[path]) else math.inf)


# What follows from a verdict


def check_student(
    stage: Stage, config: DistillConfig, engine: Engine, examiner: Examiner, *, measure_distance: bool
) -> bool:
    """Whether the student is good; one that collapsed is set aside, so that the stage can be done again.

    One that is farther from its teacher than before its training is put back to what it was, and is good.

    Raises:
        VdiffError: it collapsed, as in every attempt before; the best of them is kept.
    """
    code, reporter = 0, examiner.reporter
    if engine.is_main:
        verdict = read_verdict(stage.folder)
        if verdict is None:
            description = describe_student(stage, config, read_config(stage.base))
            verdict = examiner.examine(
                stage,
                begin_student(stage, config, description)[0],
                guidance=description.guidance_range,
                measure_distance=measure_distance,
                max_regression=config.max_regression,
                attempts=times_failed(stage.folder) + 1,
                budget=stage.budget(config),
            )
            write_verdict(stage.folder, verdict)
            reporter.line(f"{stage.folder}: {summary(verdict)}")
            if text := warning(verdict):
                reporter.line(f"{stage.folder}: {text}")
        if verdict.reason and (reason := why_failed(verdict, config.max_regression)) != verdict.reason:
            verdict = replace(verdict, reason=reason)  # a larger --max_regression may be given afterwards
            write_verdict(stage.folder, verdict)
        if verdict.reason and not collapse(verdict, config.max_regression):
            verdict = _keep_start(stage, config, verdict)
            reporter.line(f"{stage.folder}: {verdict.kept_start}; it stays as it began")
        if verdict.reason and verdict.attempts <= config.retries:
            set_aside(stage.folder)
            reporter.line(f"{stage.folder} failed: {verdict.reason}; once more with half the learning rate")
            code = 1
        elif verdict.reason:
            keep_best(stage.folder, verdict)
            code = 2
    code = int(engine.sum(torch.tensor([code], device=engine.device)))
    if code == 2:
        found = read_verdict(stage.folder)
        reason = f": {found.reason}" if found else ""
        raise VdiffError(
            f"{stage.folder} collapsed{reason}; the best attempt is kept there",
            "give a lower --lr or more --num_iters, with another --out or with --overwrite",
        )
    return code == 0


def _keep_start(stage: Stage, config: DistillConfig, verdict: Verdict) -> Verdict:
    """Put the student before its training in place of the one that is farther from the teacher.

    The verdict is written last: a kill before that is made good by doing all of it again.
    """
    start, _ = begin_student(stage, config, describe_student(stage, config, read_config(stage.base)))
    save_checkpoint(stage.folder, start.state_dict(), replace(read_config(stage.folder), kept_start=True))
    remove_state(stage.folder)
    verdict = replace(
        verdict, rmse=verdict.rmse_before, distance=verdict.start_distance, reason="", kept_start=verdict.reason
    )
    write_verdict(stage.folder, verdict)
    return verdict
