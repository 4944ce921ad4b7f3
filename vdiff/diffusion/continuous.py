"""What methods share that learn at any time: their distribution of noise levels, and the flow that they follow."""

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
    """A method whose targets lie at any time of (0, 1], from the first level 1/L of the schedule up.

    Args:
        proposal: "uniform": every time is as likely; "MEAN,STD": log(σ/α) is normal, cut at both ends of the schedule.

    Raises:
        OptionError: no such distribution.
    """

    proposal: str = setting(
        "Noise levels that scm, ect and meanflow learn: uniform in time, or mean and deviation of log(σ/α).",
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
                f"--proposal {self.proposal}: no distribution", 'give uniform, or two numbers: "-1.0,1.4"'
            )
        return mean, deviation

    @classmethod
    def settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """10/3 times the learning rate, an average for inference, and errors of v."""
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
    """A continuous method that learns from the derivative of the student's jump along the flow, `flow_map_tangent`.

    Args:
        flow: "teacher": the teacher's v̂, which distils it; "data": v of the image and its noise, whose mean given z is
            the flow of the data.
        tangent_warmup: the share of the updates in which the derivative of the network comes in, from 0 to 1.
    """

    flow: str = setting(
        "Flow that scm and meanflow follow: the teacher's, or that of the images.",
        default="teacher", choices=("teacher", "data"),
    )  # fmt: skip
    tangent_warmup: float = setting(
        "Share of the updates of scm and meanflow in which the derivative of the network comes in.",
        default=0.1, low=0, high=1,
    )  # fmt: skip
    is_annealed: ClassVar[bool] = True

    @property
    def asks_at_any_time(self) -> bool:
        """With the teacher's flow."""
        return self.flow == "teacher"

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
    """dφ/dt (B,), from above where a table has a corner."""
    import torch

    with torch.enable_grad():
        t = t.detach().requires_grad_()
        (rate,) = torch.autograd.grad(schedule.angle(t).sum(), t)
    return rate
