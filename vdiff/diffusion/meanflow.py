"""Flow maps between any two times, by the identity of MeanFlow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from vdiff.diffusion.continuous import TangentMethod, angle_rate
from vdiff.diffusion.method import DistillContext, TrainTarget
from vdiff.diffusion.prediction import from_v
from vdiff.diffusion.schedules import diffuse, grid_angles
from vdiff.diffusion.targets import flow_map_tangent
from vdiff.settings import setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MeanFlow(TangentMethod):
    """A student learns the jump between any two times t ≥ s: v* = v̂ + g. Its network receives s as an input.

    g is `flow_map_tangent`. In a part of the batch s = t, and the student learns the flow itself. MeanFlow's identity
    u = v − (t − s) du/dt holds for straight lines z_s = z − (t − s) u. On the circle, z_s = cos δ z − sin δ v̂, it is
    v̂ = ż − tan δ (z + dv̂/dφ), which is g = 0. With `flow` "data" the teacher is not evaluated, as in the paper. The
    student still starts as a copy of its teacher, so an untrained teacher means training from scratch. Each loss is
    divided by (‖g‖² + 0.001)^p, where ‖g‖² is the mean square.
    Source: Geng et al. 2025, *Mean Flows for One-step Generative Modeling*. Identity, times and the form of the weight
    agree with their code, which uses the sum of squares and 0.01.

    Args:
        flow_share: the fraction of a batch with s = t.
        loss_power: p.
    """

    network_options: ClassVar[Mapping[str, Any]] = {"second_time": True}
    flow_share: float = setting(
        "Fraction of a batch in which meanflow learns the flow at a single time.", default=0.5, low=0, high=1
    )
    loss_power: float = setting(
        "p in the loss weight 1/(‖g‖² + 0.001)^p of meanflow, where g is the tangent; 0 = none.",
        default=0.5,
        low=0,
        high=2,
    )

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of their code for ImageNet 256×256, from scratch: the flow of the images, and no warm-up."""
        own = {"proposal": "-0.4,1.0", "flow": "data", "flow_share": 0.75, "loss_power": 1.0, "tangent_warmup": 0.0}
        return {**cls.settings(preset), "lr": preset["lr"], "lr_schedule": "constant", **own}

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Noisy images at any time t, and an earlier one s."""
        assert context.derivative is not None
        schedule = context.schedule
        # two more uniform numbers from later binary digits of u; stratification only fixes its first digits
        one, other = self.times(schedule, u), self.times(schedule, (u * 2**18) % 1)
        is_flow = (u * 2**36) % 1 < self.flow_share
        t = one.where(is_flow, one.maximum(other))
        s = one.where(is_flow, one.minimum(other) - 1 / schedule.label_scale)
        angle = schedule.angle(t)
        z = diffuse(x, noise, angle)
        velocity = self.velocity(context, x, noise, z, t, second_time=t)
        v, v_along = context.derivative(z, t, velocity, 1 / angle_rate(schedule, t), second_time=s)
        g = flow_map_tangent(z, velocity, v, v_along, angle - grid_angles(schedule, s), self.warmup(context))
        weight = (g.square().flatten(1).mean(1) + 1e-3) ** -self.loss_power
        return TrainTarget(z, t, from_v(z, v + g, angle).x, inputs={"second_time": s}, weight=weight)
