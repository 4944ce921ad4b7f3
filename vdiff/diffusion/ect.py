"""Easy consistency tuning, ECT: consistency training that begins from a diffusion model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vdiff.diffusion.continuous import ContinuousMethod
from vdiff.diffusion.method import DistillContext, TrainTarget
from vdiff.diffusion.schedules import alpha_sigma, diffuse, grid_angles
from vdiff.diffusion.targets import segment_end, segment_target
from vdiff.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

SLOPE = 8.0
"""k of the gap's adjustment 1 + k·sigmoid(−σ): small noise levels are compared with smaller ones still."""


@dataclass(frozen=True)
class Ect(ContinuousMethod):
    """The student at a noise level learns what it says itself at a lower one, of the same image and noise.

    With τ = σ/α = tan φ: from τ_t to τ_r = τ_t · max(0, 1 − q^{−a} (1 + k/(1 + e^{τ_t}))), k = 8, then the student's
    jump to the end of the segment. a = 1, 2, … `gap_stages` grows during training, so the gap is divided by q = 2 each
    time: at first much is learned from the image itself, at last from close by. No path of the teacher is needed: the
    student begins as a copy of it. The loss is weighted by one over the gap.
    Source: Geng et al. 2024, *Consistency Models Made Easy*, sections 3.2 and 3.3 and their code.

    Args:
        gap_ratio: q.
        gap_stages: how often the gap is divided by q.
        gap_weight: "angle": 1/sin(φ_t − φ_r); "sigma": the paper's 1/(τ_t − τ_r); "none": 1.
    """

    gap_ratio: float = setting("By what the gap of ect is divided, stage by stage.", default=2.0, low=1, high=256)
    gap_stages: int = setting("How often ect divides the gap between two noise levels.", default=8, low=1, high=64)
    gap_weight: str = setting(
        "Loss weight of ect: 1 over the gap in angles, or in σ/α; none = 1.",
        default="angle", choices=("angle", "sigma", "none"),
    )  # fmt: skip
    is_annealed: ClassVar[bool] = True

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """Those for CIFAR-10."""
        own = {"proposal": "-1.1,2.0", "gap_ratio": 2.0, "gap_stages": 8, "gap_weight": "sigma"}
        loss = {"loss": "huber", "weighting": "constant", "lr": preset["lr"], "lr_schedule": "constant"}
        return {**cls.settings(preset), **loss, **own}

    def lower(self, ratio: Tensor, progress: float) -> Tensor:
        """τ_r of τ_t (B,) at a progress of 0 to 1."""
        stage = min(int(progress * self.gap_stages), self.gap_stages - 1) + 1
        return ratio * (1 - (1 + SLOPE * (-ratio).sigmoid()) / self.gap_ratio**stage).clamp(min=0)

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Noisy images at any time."""
        assert context.student is not None
        schedule, t = context.schedule, self.times(context.schedule, u)
        angle, end = schedule.angle(t), segment_end(t, context.num_steps)
        lower = self.lower(angle.tan(), context.progress).atan()
        middle = schedule.time(lower).clamp(max=t)
        # below the first level a network was taught nothing: there the segment ends
        middle = middle.where(middle >= 1 / schedule.label_scale, 0).maximum(end)
        z = diffuse(x, noise, angle)

        def first(z: Tensor, _: Tensor, angle_t: Tensor, __: Tensor) -> Tensor:
            alpha, sigma = alpha_sigma(angle_t, z)
            return alpha * noise - sigma * x

        target = segment_target(first, context.student, schedule, z=z, t=t, middle=middle, end=end)
        return TrainTarget(z, t, target.x, weight=self.weight(angle, grid_angles(schedule, middle)))

    def weight(self, angle_t: Tensor, angle_r: Tensor) -> Tensor | None:
        """`gap_weight` (B,)."""
        gaps = {"angle": (angle_t - angle_r).sin, "sigma": (angle_t.tan() - angle_r.tan()).clone}
        return None if self.gap_weight == "none" else 1 / gaps[self.gap_weight]()
