"""Easy consistency tuning, ECT: consistency training that starts from a diffusion model."""

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
"""k of the gap's adjustment 1 + k·sigmoid(−σ): it makes the relative gap larger at small noise levels."""


@dataclass(frozen=True)
class Ect(ContinuousMethod):
    """The student at one noise level learns its own prediction at a lower level of the same image and noise.

    With τ = σ/α = tan φ, the target is a step from τ_t to τ_r = τ_t · max(0, 1 − q^{−a} (1 + k/(1 + e^{τ_t}))), k = 8,
    and then the student's jump to the end of the segment. During training a increases from 1 to `gap_stages`, and each
    increase divides the gap by q. At first many targets are the image itself; at the end they come from nearby levels.
    The teacher only gives the initial weights. The loss is divided by the gap.
    Source: Geng et al. 2024, *Consistency Models Made Easy*. The formulas agree with their code.

    Args:
        gap_ratio: q.
        gap_stages: the number of stages, each with a smaller gap.
        gap_weight: "angle": 1/sin(φ_t − φ_r); "sigma": the paper's 1/(τ_t − τ_r); "none": 1.
    """

    gap_ratio: float = setting(
        "Each stage of ect divides the gap between two noise levels by this.", default=2.0, low=1, high=256
    )
    gap_stages: int = setting("Number of stages of ect; each has a smaller gap.", default=8, low=1, high=64)
    gap_weight: str = setting(
        "Loss weight of ect: 1/gap, measured in angles or in σ/α; none = 1.",
        default="angle", choices=("angle", "sigma", "none"),
    )  # fmt: skip
    is_annealed: ClassVar[bool] = True

    @property
    def asks_teacher(self) -> bool:
        """The teacher only gives the initial weights."""
        return False

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of their code for CIFAR-10: P_mean −1.1, P_std 2.0, q = 2, eight stages.

        Their loss is the norm of the error; `huber` differs from it only at tiny errors.
        """
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
        # the network was not trained below the first level, so the segment ends there
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
