"""The interface of distillation methods: their inputs, their result and their properties.

A method turns images and noise into a `TrainTarget`: noisy images z, their times t, and the image x* that the student
should predict. Most methods take z_t = α x + σ ε of real images, compute the point z_s where the student's single step
from t should end, and invert the step (`targets`); they differ in how they compute z_s.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import Schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True)
class TrainTarget:
    """A training target: noisy images `z` (B, C, H, W) at times `t` (B,), and the images `x` to predict.

    Attributes:
        rows: (B,) int64, the given image of each row, for its class and guidance weight; None: in their order.
        inputs: further inputs of the student's network, (B, …) by name: a second time, see `Method.network_options`.
        weight: (B,) factors of the losses, besides those of `--weighting`; None: all 1.
    """

    z: Tensor
    t: Tensor
    x: Tensor
    rows: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    weight: Tensor | None = None


DenoiseWith = Callable[..., Prediction]
"""(z, t, **inputs) → Prediction: a `stepping.Denoise` with further inputs of the network, by name."""
DeriveWith = Callable[..., "tuple[Tensor, Tensor]"]
"""(z, t, ż, ṫ, **inputs) → v̂ and its derivative ∂v̂/∂z · ż + ∂v̂/∂t · ṫ."""


@dataclass(frozen=True)
class DistillContext:
    """The inputs of a method.

    Attributes:
        teacher: frozen. If it is called with fewer rows than images, they belong to the first images.
        num_steps: N, the steps of the student.
        teacher_steps: n, the steps of the teacher.
        levels: the number of steps of the only grid that the teacher was trained for; None: any t.
        student: the current student, without gradient.
        average: a moving average of the student, for methods with `self_ema`.
        derivative: of the student's v̂ along a direction, without gradient.
        progress: the finished fraction of the stage's updates, 0 to 1.
        predicts_noise: whether the teacher predicts ε.
        networks: the method's networks, without gradient; None: it has none.
    """

    teacher: DenoiseWith
    schedule: Schedule
    num_steps: int
    teacher_steps: int
    levels: int | None = None
    student: DenoiseWith | None = None
    average: DenoiseWith | None = None
    derivative: DeriveWith | None = None
    progress: float = 0.0
    predicts_noise: bool = False
    networks: nn.Module | None = None

    @property
    def teacher_is_distilled(self) -> bool:
        """Whether the teacher supports fewer times than its schedule, as few-step students do."""
        return self.levels not in (None, self.schedule.num_levels)

    def fine_steps(self, wanted: float) -> int:
        """The number of teacher steps nearest to `wanted` (as a ratio): N·m, where N·m divides `levels`."""
        if self.levels is None:
            return self.num_steps * max(1, round(wanted / self.num_steps))
        most = self.levels // self.num_steps
        known = [self.num_steps * m for m in range(1, most + 1) if most % m == 0]
        return min(known, key=lambda steps: abs(math.log(steps / wanted)))


class Method(ABC):
    """A distillation method: a frozen dataclass; its fields, made by `setting`, are its settings.

    A new method is a class in a separate file and a line in `METHODS`. Flags, TOML keys, help texts and checks follow
    from its settings. Names of settings are unique over all methods.

    Attributes:
        keeps_steps: the student has as many steps as its teacher.
        needs_images: whether real images are used; if not, a batch of targets consists of whole paths of the student.
        is_annealed: whether targets depend on the progress of the training.
        has_fine_times: targets are at the times of the teacher's steps, not only at those of the student's.
        has_any_time: targets are at any time.
        knows_teachers_times: a student of one step jumps to the image from the time of every step of its teacher.
        network_options: options of the student's network that its teacher's may lack. With `second_time` the network
            receives the end time of a step from samplers. The method must pass it too: in `TrainTarget.inputs`, and by
            name to the context's student and to its teacher, which may be such a student.
    """

    keeps_steps: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True
    is_annealed: ClassVar[bool] = False
    has_fine_times: ClassVar[bool] = False
    has_any_time: ClassVar[bool] = False
    knows_teachers_times: ClassVar[bool] = False
    network_options: ClassVar[Mapping[str, Any]] = {}

    @property
    def self_ema(self) -> float | None:
        """Decay of the student's EMA that the method uses; None: it uses none."""
        return None

    @property
    def asks_teacher(self) -> bool:
        """Whether the student learns from predictions of its teacher."""
        return True

    @property
    def asks_at_any_time(self) -> bool:
        """Whether the teacher is evaluated at times that are on no grid of steps."""
        return False

    @classmethod
    def settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of distill.py for this method, which replace a preset's; presets are made for `Progressive`."""
        del preset
        return {}

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """The settings of the method's paper, for `--recipe paper`, without those that depend on network and data."""
        return cls.settings(preset)

    @abstractmethod
    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """The students' numbers of steps on the way from `num_steps` to `to_steps`.

        Raises:
            ValueError: the method cannot get there.
        """

    @abstractmethod
    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """A target for images x (B, C, H, W), noise N(0, I) like them, and u (B,) uniform in [0, 1)."""

    def networks(self, student: nn.Module) -> nn.Module | None:
        """The method's own networks, such as a critic, trained beside the student; None: none.

        They start with the same weights in every process, and are saved in the training state but not in checkpoints.
        """
        del student
        return None

    def build_optimizer(self, networks: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimiser of `networks`; its learning rates follow the student's, which starts at `lr`."""
        import torch

        return torch.optim.AdamW(networks.parameters(), lr=lr, weight_decay=0.0)

    def student_loss(self, networks: nn.Module, target: TrainTarget, prediction: Prediction) -> Tensor | None:
        """(B,) the term added to the student's loss of x̂; `prediction` is the student's for the target."""
        del networks, target, prediction
        return None

    def network_loss(self, networks: nn.Module, target: TrainTarget, prediction: Prediction) -> Tensor:
        """(B,) the loss of `networks`; no gradient reaches the student.

        Raises:
            NotImplementedError: a method with networks lacks it.
        """
        raise NotImplementedError(f"{type(self).__name__} has networks and no network_loss")


def scaled(lr: float, factor: float) -> float:
    """`factor` times a learning rate, in two digits."""
    return float(f"{lr * factor:.2g}")
