"""Shared by methods that train at any time: the distribution of noise levels, and the flow that they follow."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vdiff.diffusion.method import DistillContext, Method, scaled
from vdiff.diffusion.phases import single_plan
from vdiff.diffusion.schedules import Schedule, alpha_sigma
from vdiff.errors import OptionError
from vdiff.settings import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class ContinuousMethod(Method):
    """A method with targets at any time of [1/L, 1], where 1/L is the first level of the schedule.

    Args:
        proposal: "uniform": times are uniform; "MEAN,STD": log(σ/α) is normal, clamped to the levels of the schedule.

    Raises:
        OptionError: no such distribution.
    """

    proposal: str = setting(
        "Noise levels of scm, ect and meanflow: uniform in time, or log(σ/α) normal with this mean and deviation.",
        default="uniform", unit="uniform|MEAN,STD",
    )  # fmt: skip
    has_any_time: ClassVar[bool] = True

    def __post_init__(self) -> None:
        self.normal()

    def normal(self) -> tuple[float, float] | None:
        """Mean and deviation of log(σ/α); None: times are uniform."""
        if self.proposal == "uniform":
            return None
        try:
            mean, deviation = (float(word) for word in self.proposal.split(","))
        except ValueError:
            mean, deviation = math.nan, math.nan
        if not (math.isfinite(mean) and 0 < deviation < math.inf):
            raise OptionError(
                f"--proposal {self.proposal}: not a distribution", 'give uniform, or two numbers: "-1.0,1.4"'
            )
        return mean, deviation

    @classmethod
    def settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """10/3 times the learning rate, an EMA of the weights, and errors of v."""
        return {
            "lr": scaled(preset["lr"], 10 / 3), "ema_remainder": 1e-3, "last_factor": 1.0, "weighting": "snr_plus_one",
        }  # fmt: skip

    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """`single_plan`."""
        return single_plan(num_steps, to_steps)

    def times(self, schedule: Schedule, u: Tensor) -> Tensor:
        """t of u (B,) uniform in [0, 1): falling, in [1/L, 1]."""
        if (normal := self.normal()) is None:
            t = 1 - u
        else:
            mean, deviation = normal
            quantile = 2**0.5 * (1 - 2 * u).erfinv()  # of a standard normal distribution, at 1 − u
            t = schedule.time((mean + deviation * quantile).exp().atan())
        return t.clamp(1 / schedule.label_scale, 1)


@dataclass(frozen=True)
class TangentMethod(ContinuousMethod):
    """A continuous method that uses the derivative of the student's jump along the flow, `flow_map_tangent`.

    Args:
        flow: "teacher": the teacher's v̂, for distillation; "data": v of the image and its noise; its mean for a given z
            is the flow of the data.
        tangent_warmup: the fraction of the updates in which the factor of the network's derivative rises from 0 to 1.
    """

    flow: str = setting(
        "Flow that scm and meanflow follow: of the teacher, or of the images.",
        default="teacher", choices=("teacher", "data"),
    )  # fmt: skip
    tangent_warmup: float = setting(
        "Fraction of the updates in which scm and meanflow phase in the derivative of the network.",
        default=0.1, low=0, high=1,
    )  # fmt: skip
    is_annealed: ClassVar[bool] = True

    @property
    def asks_teacher(self) -> bool:
        """With the teacher's flow."""
        return self.flow == "teacher"

    @property
    def asks_at_any_time(self) -> bool:
        """As `asks_teacher`."""
        return self.asks_teacher

    def warmup(self, context: DistillContext) -> float:
        """r = min(1, progress/warm-up)."""
        return min(1.0, context.progress / self.tangent_warmup) if self.tangent_warmup else 1.0

    def velocity(
        self, context: DistillContext, x: Tensor, noise: Tensor, z: Tensor, t: Tensor, **inputs: Tensor
    ) -> Tensor:
        """dz/dφ of the flow at z: v̂ of the teacher, or v = α ε − σ x."""
        if self.flow == "teacher":
            return context.teacher(z, t, **inputs).v
        alpha, sigma = alpha_sigma(context.schedule.angle(t), z)
        return alpha * noise - sigma * x


def angle_rate(schedule: Schedule, t: Tensor) -> Tensor:
    """dφ/dt (B,); at a corner of a table, the derivative from above."""
    import torch

    with torch.enable_grad():
        t = t.detach().requires_grad_()
        (rate,) = torch.autograd.grad(schedule.angle(t).sum(), t)
    return rate
