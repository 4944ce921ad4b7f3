"""Parts of samplers: the rule for one step, the DDIM rotation, limits of predicted images, a solver's state.

A sampler is frozen. Its memory of earlier steps is a `SolverState`, which the loop creates for every batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from vdiff.diffusion.prediction import Prediction, from_x
from vdiff.diffusion.schedules import coefficient
from vdiff.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

Denoise = Callable[["Tensor", "Tensor"], Prediction]
"""(z, t) → Prediction: z (B, C, H, W), t (B,) float64."""


class Sampler(ABC):
    """A rule for one step from φ_t down to φ_s; on a grid's last step φ_s = 0.

    Attributes:
        solves_ode: it follows the probability flow: it draws no noise, and has no limits if `clipping_value` is None.
        jumps_to_image: its steps lead to the image and back; a network with a second time gets 0.
    """

    solves_ode: ClassVar[bool] = True
    jumps_to_image: ClassVar[bool] = False

    @abstractmethod
    def step(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, noise: Callable[[], Tensor]
    ) -> Tensor:
        """z_s from z_t: z (B, C, H, W); angles (B,) float64; `noise()` draws N(0, I) like z if the rule needs it."""

    def evaluations(self, num_steps: int) -> int:
        """The number of network evaluations for one image in `num_steps` steps."""
        return num_steps


@dataclass(frozen=True)
class PastStep:
    """What a sampler keeps of a step for later ones: the angle (B,), a predicted tensor, and perhaps z."""

    angle: Tensor
    value: Tensor
    z: Tensor | None = None


@dataclass
class SolverState:
    """The state of one run over a grid, for a sampler that uses earlier steps or evaluates the network twice per step.

    Attributes:
        num_steps: N.
        denoise: the network.
        t_s: the end of the current step, (B,) float64.
        steps_left: steps until the clean image, including the current one; ∞ on a grid that ends above t = 0.
        history: kept values of earlier steps, newest first.
    """

    num_steps: float = math.inf
    denoise: Denoise | None = None
    t_s: Tensor | None = None
    steps_left: float = math.inf
    history: list[PastStep] = field(default_factory=list)

    def at_end(self, z: Tensor) -> Prediction:
        """The prediction of the network for another z at the end of the current step.

        Raises:
            ValueError: the step is not part of a run, so there is no network.
        """
        if self.denoise is None or self.t_s is None:
            raise ValueError("this rule evaluates the network twice per step, but outside of a run there is none")
        return self.denoise(z, self.t_s)


def check_clipping_value(value: float) -> None:
    """Refuse a limit that is not a positive finite number.

    Raises:
        ValueError: the limit is not positive and finite.
    """
    if not 0 < value < math.inf:
        raise ValueError(f"clipping_value must be a positive number, got {value}")


@dataclass(frozen=True)
class Limits:
    """Limits of predicted images.

    Attributes:
        clipping_value: x̂ is clipped to ± this value, as in the code of Salimans & Ho 2022; None: no limit.
        threshold: a quantile p in (0, 1], for dynamic thresholding instead: x̂ is clipped to ±s and multiplied by
            `clipping_value`/s, where s is the larger of `clipping_value` and the p-quantile of |x̂| in each image.
            Source: Saharia et al. 2022 (Imagen), section 2.3, with `clipping_value` 1 and p = 0.995.

    Raises:
        ValueError: the limit is not positive, the quantile is outside (0, 1], or there is a quantile without a limit.
    """

    clipping_value: float | None = setting(
        "Clip predicted images to ±LIMIT; clipped clips the predicted noise too.",
        default=1.0, low=0, open_low=True, unit="LIMIT",
    )  # fmt: skip
    threshold: float | None = setting(
        "Scale an image down if this quantile of its values exceeds the limit, instead of clipping; 0.995 is usual.",
        default=None, low=0, high=1, open_low=True, unit="QUANTILE", flag="dynamic_threshold",
    )  # fmt: skip

    def __post_init__(self) -> None:
        if self.clipping_value is not None:
            check_clipping_value(self.clipping_value)
        if self.threshold is None:
            return
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold is a quantile in (0, 1], got {self.threshold}")
        if self.clipping_value is None:
            raise ValueError("threshold needs a clipping_value, got None")

    def limit(self, x: Tensor) -> Tensor:
        """x̂ within its limits."""
        if self.clipping_value is None:
            return x
        if self.threshold is None:
            return x.clamp(-self.clipping_value, self.clipping_value)
        largest = quantile(x.abs(), self.threshold).clamp(min=self.clipping_value).to(x.dtype)
        largest = largest.reshape(-1, *[1] * (x.ndim - 1))
        return x.maximum(-largest).minimum(largest) * (self.clipping_value / largest)

    def limited(self, prediction: Prediction, z: Tensor, angle: Tensor) -> Prediction:
        """The prediction with x̂ within its limits, and ε̂ and v̂ derived from it."""
        return prediction if self.clipping_value is None else from_x(z, self.limit(prediction.x), angle)


def quantile(values: Tensor, p: float) -> Tensor:
    """The p-quantile of each image (B, …), interpolated linearly: (B,), at least float32.

    Like `torch.quantile`, which in many releases and on MPS refuses tensors of more than 16 million elements.
    """
    import torch

    flat = values.flatten(1)
    flat = flat if flat.dtype == torch.float64 else flat.float()
    place = p * (flat.shape[1] - 1)
    below = math.floor(place)
    top = flat.topk(flat.shape[1] - below).values  # descending: ends with the values at `below` + 1 and `below`
    return top[:, -1].lerp(top[:, -min(2, top.shape[1])], place - below)


def ddim_step(z: Tensor, v: Tensor, angle_t: Tensor, angle_s: Tensor) -> Tensor:
    """z_s = cos δ · z_t − sin δ · v̂, δ = φ_t − φ_s.

    The deterministic DDIM step (Song et al. 2021) as a rotation: Salimans & Ho 2022, appendix D. Nothing is divided.
    """
    delta = angle_t - angle_s
    return coefficient(delta.cos(), z) * z - coefficient(delta.sin(), z) * v


@dataclass(frozen=True)
class StatefulSampler(Limits, Sampler):
    """A deterministic sampler with a step that also receives the state of the solver."""

    def step(
        self,
        *,
        z: Tensor,
        prediction: Prediction,
        angle_t: Tensor,
        angle_s: Tensor,
        noise: Callable[[], Tensor],  # noqa: ARG002 - every sampler is given it
        state: SolverState | None = None,
    ) -> Tensor:
        """`advance`; without a state, as the first step of a run.

        Raises:
            ValueError: the rule evaluates the network twice per step, but there is no state.
        """
        limited = self.limited(prediction, z, angle_t)
        return self.advance(z=z, prediction=limited, angle_t=angle_t, angle_s=angle_s, state=state or SolverState())

    @abstractmethod
    def advance(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, state: SolverState
    ) -> Tensor:
        """z_s from z_t and the limited prediction; adds what later steps need to `state.history`."""
