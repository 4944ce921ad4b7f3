"""Verdicts on students, by their distance to the teacher and to the data, and the consequences."""

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
from vdiff.models.drawing import Conditions, classes_in_turn, draw_in_batches, images_at_once, squared_errors
from vdiff.records import FAILED, VERDICT, read_record
from vdiff.reporting import Reporter
from vdiff.training.config import DistillConfig
from vdiff.training.engine import Engine
from vdiff.training.stages import Stage
from vdiff.training.state import remove_state
from vdiff.training.student import begin_student, describe_student

HELD_OUT = 2**63
"""Added to the seed, to get noise that nothing else uses."""
MIN_NOISES = 64
"""The student before and after a stage is compared by at least this many images."""
ROUNDING = 0.01, 1e-4
"""The RMSE of a student may exceed that before its training by this fraction, or by this much in pixels."""
WORTH_A_WORD = 1.5
"""A student is reported if its distance to the data is more than this many times its teacher's."""

Distance = Callable[[Tensor], float]
"""The distance of images (B, C, H, W) in [−1, 1] to the data."""


@dataclass(frozen=True)
class Verdict:
    """The measurements of a student after its stage.

    Attributes:
        rmse_before, rmse: `vdiff.models.drawing.rmse` to the teacher's images from the same noise, before and after the
        stage; both use DDIM, the teacher in its steps of this stage.
        distance, teacher_distance: to the data; None if not measured.
        num_images: number of images behind the distances.
        attempts: how often the stage was trained.
        reason: why the student failed; empty if it did not.
        rmse_limit: the largest `rmse` that rounding and the choice of noise explain without harm from training.
        every: teacher and student were drawn in every N-th of their steps, see `plan_check`.
        start_distance: distance of the student before its training, if that student is nearer to the teacher.
        kept_start: why the weights before training were restored; empty if they were not.
        scale: reference distances for `num_images` images, by their names in `vdiff.evaluation.results.Scale`.
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
    scale: dict[str, float | str] | None = None


def read_verdict(folder: Path) -> Verdict | None:
    """The verdict on the student in `folder`; None if it is missing or cannot be read."""
    try:
        return read_record(folder / VERDICT, Verdict, "")
    except VdiffError:
        return None


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Save it in the student's folder, whole or not at all."""
    write_json(folder / VERDICT, asdict(verdict))


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """Samples teacher and student from the same noise; keeps a student's images, as it is the next stage's teacher.

    Attributes:
        conditions: (denoiser, numbers of images) → their condition.
        num_images: images for the RMSE to the teacher.
        num_distance_images: images for the distance to the data.
        distance: the distance to measure; None: none.
    """

    seed: int
    num_images: int
    num_distance_images: int
    distance: Distance | None
    device: torch.device
    reporter: Reporter
    conditions: Conditions = classes_in_turn
    _kept: dict[tuple[Path, int], Tensor] = field(default_factory=dict)

    def examine(
        self,
        stage: Stage,
        start: Callable[[], Denoiser],
        *,
        guidance: Sequence[float],
        teacher_guidance: float = 0.0,
        measure_distance: bool,
        max_regression: float,
        attempts: int,
        budget: int,
    ) -> Verdict:
        """Compare the student of a stage with its teacher, and with itself before its training.

        Args:
            start: loads the student before its training.
            guidance: the range of weights that the student takes as an input; its middle is used.
            teacher_guidance: the weight of the teacher whose guided prediction the student has learned.
            measure_distance: whether to measure the distance to the data.
            budget: how many network evaluations the comparison may use, see `plan_check`.
        """
        measure = self.distance if measure_distance else None
        wanted = max(self.num_images, self.num_distance_images if measure else 0)
        every, num_images, count = plan_check(stage.teacher_steps, stage.num_steps, self.num_images, wanted, budget)
        weight = sum(guidance) / 2 if guidance else 0.0
        steps, teacher_steps, name = stage.num_steps // every, stage.teacher_steps // every, stage.folder.name
        model = read_config(stage.folder)
        if every > 1 or count < wanted:
            few = f"{count} {model.space.noun}s in {steps} of {stage.num_steps} steps"
            self.reporter.line(f"{name} is checked with {few}, as its training was short")
        theirs = self._images(stage.base, model, teacher_steps, count, weight or teacher_guidance)
        # one model at a time, as each has all weights of the base of a LoRA
        before = self._draw(start().to(self.device), model, steps, num_images, weight, "before training")
        errors_before = squared_errors(before, theirs, model.space)
        rmse_before = float(errors_before.mean().sqrt())
        try:
            mine = self._draw(load_checkpoint(stage.folder, self.device)[0], model, steps, count, weight, name)
        except VdiffError as error:
            reason = str(error).partition(";")[0]
            return Verdict(rmse_before, math.inf, None, None, count, attempts, reason, every=every)
        errors = squared_errors(mine[:num_images], theirs, model.space)
        # from the same noise, differences scatter much less than errors
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
            before = self._draw(start().to(self.device), model, steps, count, weight, "before training")
            found = replace(found, start_distance=measure(before))
        self._kept.clear()
        self._kept[stage.base, teacher_steps] = theirs
        if not worsening(found, max_regression):  # otherwise another student replaces it
            self._kept[stage.folder, steps] = mine
        return replace(found, reason=why_failed(found, max_regression))

    def _images(self, folder: Path, model: CheckpointConfig, num_steps: int, count: int, weight: float) -> Tensor:
        """A teacher's images, of the shape of its student's.

        Kept ones are used if enough were drawn in the same batches, so with the same bits.
        """
        kept = self._kept.get((folder, num_steps))
        if kept is not None and (
            len(kept) == count or (len(kept) > count and count % images_at_once(model.signature, model.shape) == 0)
        ):
            return kept[:count]
        return self._draw(load_checkpoint(folder, self.device)[0], model, num_steps, count, weight, folder.name)

    def _draw(
        self, denoiser: Denoiser, model: CheckpointConfig, num_steps: int, count: int, weight: float, name: str
    ) -> Tensor:
        at_once = images_at_once(model.signature, model.shape)
        with self.reporter.progress(f"checking {name}", num_steps * -(-count // at_once), "evaluations") as bar:
            return draw_in_batches(
                denoiser,
                Ddim(clipping_value=model.space.limit),
                count=count,
                at_once=at_once,
                image_size=model.shape[1:],
                conditions=self.conditions,
                num_steps=num_steps,
                seed=HELD_OUT + self.seed,
                guidance=weight if denoiser.network.signature.null else 0.0,
                on_step=bar.update,
            )


def plan_check(
    teacher_steps: int, num_steps: int, num_images: int, num_distance: int, budget: int
) -> tuple[int, int, int]:
    """The size of a check for at most about `budget` network evaluations; it depends on numbers alone, so that all
    processes agree.

    First the number of images is reduced, down to `MIN_NOISES`. If these still cost too much, teacher and student both
    use only every N-th of their steps.

    Returns:
        N, the number of images for the RMSE to the teacher (drawn by the teacher, the student, and the student before
        its training), and the number of images for the distance to the data (drawn by the first two).
    """
    few = min(num_images, MIN_NOISES)
    per_image = teacher_steps + 2 * num_steps
    common = [k for k in range(1, num_steps + 1) if num_steps % k == 0 and teacher_steps % k == 0]
    every = next((k for k in common if few * per_image <= budget * k), common[-1])
    images = max(few, min(num_images, budget * every // per_image))
    more = (budget * every - images * per_image) // (teacher_steps + num_steps)
    return every, images, max(images, min(num_distance, images + more))


def collapse(found: Verdict, max_regression: float) -> str:
    """Why a student collapsed; empty if it did not."""
    if not math.isfinite(found.rmse):
        return found.reason or "its samples are not finite"
    return _regression(found.distance, found.teacher_distance, max_regression)


def worsening(found: Verdict, max_regression: float) -> str:
    """Why the student before its training is better; empty if it is not."""
    is_worse = found.rmse > max(found.rmse_limit, found.rmse_before)
    if not is_worse or _regression(found.start_distance, found.teacher_distance, max_regression):
        return ""
    return f"training raised its RMSE to its teacher from {found.rmse_before:.4f} to {found.rmse:.4f}"


def why_failed(found: Verdict, max_regression: float) -> str:
    """Why a student cannot be the next teacher; empty if it can."""
    return collapse(found, max_regression) or worsening(found, max_regression)


def _regression(far: float | None, teachers: float | None, most: float) -> str:
    if far is None or teachers is None or far <= most * teachers:
        return ""
    return f"distance to the data is {far:.3g}, its teacher's {teachers:.3g}"


def warning(found: Verdict) -> str:
    """A warning about a student that is good enough, but much worse than its teacher; empty if there is none."""
    far, teachers = found.distance, found.teacher_distance
    if found.reason or far is None or not teachers or far <= WORTH_A_WORD * teachers:
        return ""
    return f"its distance to the data is {far / teachers:.1f} times its teacher's: more --num_iters may help"


def summary(verdict: Verdict) -> str:
    """`RMSE to its teacher 0.031 (before training 0.112), distance to data 0.23 (teacher 0.21)`."""
    text = f"RMSE to its teacher {verdict.rmse:.4f} (before training {verdict.rmse_before:.4f})"
    if verdict.every > 1:
        text += f", both in 1/{verdict.every} of their steps"
    if verdict.distance is not None:
        text += f", distance to the data {verdict.distance:.3g} (teacher {verdict.teacher_distance:.3g})"
    return text


# Attempts that failed


def failed_attempts(folder: Path) -> list[Path]:
    """The students of `folder` that were set aside, in order."""
    paths = folder.parent.glob(f"{glob.escape(folder.name)}{FAILED}*")
    numbers = {path: path.name.removeprefix(f"{folder.name}{FAILED}") for path in paths}
    return sorted((path for path in numbers if numbers[path].isdecimal()), key=lambda path: int(numbers[path]))


def times_failed(folder: Path) -> int:
    """How many attempts at the stage of `folder` have failed, from the students that were set aside."""
    verdicts = [read_verdict(path) for path in failed_attempts(folder)]
    return max([len(verdicts), *(verdict.attempts for verdict in verdicts if verdict)])


def set_aside(folder: Path) -> None:
    """Make room for another attempt."""
    last = [int(path.name.removeprefix(f"{folder.name}{FAILED}")) for path in failed_attempts(folder)[-1:]]
    folder.rename(folder.with_name(f"{folder.name}{FAILED}{sum(last) + len(last)}"))


def keep_best(folder: Path, verdict: Verdict) -> None:
    """Keep only the attempt nearest to the teacher, in `folder`; its verdict records the number of attempts."""
    best = _nearest([*failed_attempts(folder), folder])
    write_verdict(best, replace(read_verdict(best) or verdict, attempts=verdict.attempts))
    if best != folder:
        set_aside(folder)
        best.rename(folder)
    for path in failed_attempts(folder):
        remove(path)


def finish_keeping(folder: Path, retries: int) -> None:
    """Finish a `keep_best` that was killed between its two renames."""
    if not folder.exists() and times_failed(folder) > retries:
        _nearest(failed_attempts(folder)).rename(folder)


def _nearest(attempts: list[Path]) -> Path:
    verdicts = {path: read_verdict(path) for path in attempts}
    return min(attempts, key=lambda path: verdict.rmse if (verdict := verdicts[path]) else math.inf)


# The consequences of a verdict


def check_student(
    stage: Stage, config: DistillConfig, engine: Engine, examiner: Examiner, *, measure_distance: bool
) -> bool:
    """Whether the student is good; a collapsed one is set aside, so that the stage can be repeated.

    A student that training moved away from its teacher gets its initial weights back, and counts as good.

    Raises:
        VdiffError: it collapsed, as in every earlier attempt; the best attempt is kept.
    """
    code, reporter = 0, examiner.reporter
    engine.wait()  # until no process reads the folder, which may be renamed
    if engine.is_main:
        verdict = read_verdict(stage.folder)
        if verdict is None:
            description = describe_student(stage, config, read_config(stage.base))
            verdict = examiner.examine(
                stage,
                lambda: begin_student(stage, config, description)[0],
                guidance=description.guidance_range,
                teacher_guidance=config.guidance_scale - 1 if config.guidance_scale else 0.0,
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
            verdict = replace(verdict, reason=reason)  # a larger --max_regression may be given later
            write_verdict(stage.folder, verdict)
        if verdict.reason and not collapse(verdict, config.max_regression):
            verdict = _keep_start(stage, config, verdict)
            reporter.line(f"{stage.folder}: {verdict.kept_start}; its initial weights are kept")
        if verdict.reason and verdict.attempts <= config.retries:
            set_aside(stage.folder)
            reporter.line(f"{stage.folder} failed: {verdict.reason}; trying again with half the learning rate")
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
    """Replace a student that training made worse by the student before its training.

    The verdict is written last: after a kill before that, all of it is repeated.
    """
    start, _ = begin_student(stage, config, describe_student(stage, config, read_config(stage.base)))
    save_checkpoint(stage.folder, start.state_dict(), replace(read_config(stage.folder), kept_start=True))
    remove_state(stage.folder)
    verdict = replace(
        verdict, rmse=verdict.rmse_before, distance=verdict.start_distance, reason="", kept_start=verdict.reason
    )
    write_verdict(stage.folder, verdict)
    return verdict
