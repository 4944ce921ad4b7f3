"""Whether a student may become a teacher: how far it is from its own teacher, and from the data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdiff.diffusion.samplers import Ddim
from vdiff.errors import VdiffError
from vdiff.files import parse, read_text, write_text
from vdiff.models.checkpoint import load_checkpoint
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw
from vdiff.reporting import Reporter

VERDICT = "verdict.json"
HELD_OUT = 2**63
"""Added to the seed: noise that is never drawn otherwise."""
MIN_RMSE = 0.05
"""Differences from the teacher below this are no failure, whatever they were before training."""
WORTH_A_WORD = 1.5
"""A student whose distance to the data is more than this many times its teacher's is spoken of."""
BATCH = 64

Distance = Callable[[Tensor], float]
"""How far images (B, C, H, W) in [−1, 1] are from the data."""


@dataclass(frozen=True)
class Verdict:
    """What was found of a student after its stage.

    Attributes:
        rmse_before, rmse: from its teacher's images of the same noise, before and after the stage; pixels in [−1, 1].
        distance, teacher_distance: from the data; None where it was not measured.
        num_images: that the distances rest on.
        attempts: how often the stage was done.
        reason: what makes it a failure; empty where it is none.
    """

    rmse_before: float
    rmse: float
    distance: float | None
    teacher_distance: float | None
    num_images: int
    attempts: int
    reason: str


def read_verdict(folder: Path) -> Verdict | None:
    """What was found of the student in `folder`; None where nothing was, or nothing that can be read."""
    try:
        return Verdict(**parse(read_text(folder / VERDICT)))
    except (OSError, ValueError, TypeError):
        return None


def write_verdict(folder: Path, verdict: Verdict) -> None:
    """Keep it beside the student, whole or not at all."""
    write_text(folder / VERDICT, json.dumps(asdict(verdict), indent=2) + "\n")


class Examiner:
    """Draws teachers and students from the same noise; images of a student are kept, as the next stage's teacher's.

    Args:
        num_images: for the difference from the teacher.
        num_distance_images: for the distance from the data.
        distance: None: it is not measured.
    """

    def __init__(
        self,
        *,
        seed: int,
        num_images: int,
        num_distance_images: int,
        distance: Distance | None,
        device: torch.device,
        reporter: Reporter,
    ) -> None:
        self.seed, self.num_images, self.num_distance_images = seed, num_images, num_distance_images
        self.distance, self.device, self.reporter = distance, device, reporter
        self._kept: tuple[tuple[Path, int], Tensor] | None = None

    def examine(
        self,
        *,
        base: Path,
        teacher_steps: int,
        start: Denoiser,
        folder: Path,
        num_steps: int,
        guidance: Sequence[float],
        measure_distance: bool,
        max_regression: float,
        attempts: int,
    ) -> Verdict:
        """Compare the student in `folder` with the teacher in `base`, and with what it was before its training.

        Args:
            start: the student before its training.
            guidance: the range of weights that the student takes as an input; the middle of it is tried.
            measure_distance: whether the distance to the data is due.
        """
        count = max(self.num_images, self.num_distance_images if measure_distance and self.distance else 0)
        weight = sum(guidance) / 2 if guidance else 0.0
        theirs = self._images(base, teacher_steps, count, weight)
        student, model = load_checkpoint(folder, self.device)
        size = model.image_size
        before = self._draw(start.to(self.device), size, num_steps, self.num_images, weight, "before training")
        try:
            mine = self._draw(student, size, num_steps, count, weight, folder.name)
        except VdiffError as error:
            return Verdict(rmse(before, theirs), math.inf, None, None, count, attempts, str(error).partition(";")[0])
        self._kept = (folder, num_steps), mine
        far, teachers = None, None
        if measure_distance and self.distance is not None:
            far, teachers = self.distance(mine), self.distance(theirs)
        same = mine[: self.num_images]  # those that there are from before the training
        found = Verdict(rmse(before, theirs), rmse(same, theirs), far, teachers, count, attempts, "")
        return Verdict(**{**asdict(found), "reason": why_failed(found, max_regression)})

    def _images(self, folder: Path, num_steps: int, count: int, weight: float) -> Tensor:
        """A teacher's images, those kept if they are enough."""
        if self._kept is not None and self._kept[0] == (folder, num_steps) and len(self._kept[1]) >= count:
            return self._kept[1][:count]
        denoiser, model = load_checkpoint(folder, self.device)
        return self._draw(denoiser, model.image_size, num_steps, count, weight, folder.name)

    def _draw(self, denoiser: Denoiser, size: int, num_steps: int, count: int, weight: float, name: str) -> Tensor:
        parts: list[Tensor] = []
        guidance = weight if denoiser.network.config.null_class else 0.0
        with self.reporter.progress(f"checking {name}", num_steps * -(-count // BATCH), "evaluations") as bar:
            for first in range(0, count, BATCH):
                done = len(parts) * num_steps
                parts.append(
                    draw(
                        denoiser,
                        Ddim(),
                        indices=range(first, min(first + BATCH, count)),
                        image_size=size,
                        num_steps=num_steps,
                        seed=HELD_OUT + self.seed,
                        guidance=guidance,
                        on_step=lambda step, done=done: bar.update(done + step),  # type: ignore[misc]
                    )
                )
        return torch.cat(parts)


def why_failed(found: Verdict, max_regression: float) -> str:
    """What makes a student no teacher; empty where nothing does."""
    if not found.rmse <= max(found.rmse_before, MIN_RMSE):
        return f"RMSE to its teacher rose from {found.rmse_before:.3f} to {found.rmse:.3f} by the training"
    far, teachers = found.distance, found.teacher_distance
    if far is not None and teachers is not None and not far <= max_regression * teachers:
        return f"distance to the data is {far:.3g}, its teacher's {teachers:.3g}"
    return ""


def warning(found: Verdict) -> str:
    """A word on a student that is good enough, and much worse than its teacher; empty where none is due."""
    far, teachers = found.distance, found.teacher_distance
    if found.reason or far is None or not teachers or far <= WORTH_A_WORD * teachers:
        return ""
    return f"its distance to the data is {far / teachers:.1f} times its teacher's: more --num_iters may help"


def rmse(a: Tensor, b: Tensor) -> float:
    """√ mean (a − b)² over the images that both have."""
    count = min(len(a), len(b))
    return float((a[:count] - b[:count]).square().mean().sqrt())
