"""What a method of distillation is given, what it answers, and what it says of itself.

A method turns images and noise into a `TrainTarget`: noisy images z, their times t, and the image x* that the student
should see in them. Most methods pick z_t = α x + σ ε of real images, find the place z_s where the student's one step
from t should end, and invert the step (`targets`); they differ in how z_s is found.
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
    """What is learned from: noisy images `z` (B, C, H, W) at times `t` (B,), and the images `x` to see in them.

    Attributes:
        rows: (B,) int64, to which of the given images (their class, their weight of guidance) each belongs; None: in
            their order.
        inputs: what else the student's network takes, (B, …) by name: a second time, see `Method.network_options`.
    """

    z: Tensor
    t: Tensor
    x: Tensor
    rows: Tensor | None = None
    inputs: Mapping[str, Tensor] = field(default_factory=dict)


DenoiseWith = Callable[..., Prediction]
"""(z, t, **inputs) → Prediction: a `stepping.Denoise` whose network may take more, by name."""


@dataclass(frozen=True)
class DistillContext:
    """What a method may ask.

    Attributes:
        teacher: frozen. Called with fewer rows than there are images, it is asked about the first of them.
        num_steps: N, the steps of the student.
        teacher_steps: n, the steps that the teacher takes.
        levels: the steps of the only grid that the teacher knows; None: it knows every t.
        student: the student as it is now, without gradient.
        average: a moving average of the student; for methods that ask for one (`self_ema`).
        progress: the part of the stage's updates that is done, 0 to 1.
        predicts_noise: whether the teacher is an ε-prediction.
        networks: those of the method, without gradient; None: it has none.
    """

    teacher: DenoiseWith
    schedule: Schedule
    num_steps: int
    teacher_steps: int
    levels: int | None = None
    student: DenoiseWith | None = None
    average: DenoiseWith | None = None
    progress: float = 0.0
    predicts_noise: bool = False
    networks: nn.Module | None = None

    @property
    def teacher_is_distilled(self) -> bool:
        """Whether the teacher knows fewer times than its schedule, as a student of few steps does."""
        return self.levels not in (None, self.schedule.num_levels)

    def fine_steps(self, wanted: float) -> int:
        """The number of teacher steps nearest to `wanted` (as a ratio) that the student's N divide and the teacher
        knows: N·m, where N·m divides `levels`."""
        if self.levels is None:
            return self.num_steps * max(1, round(wanted / self.num_steps))
        most = self.levels // self.num_steps
        known = [self.num_steps * m for m in range(1, most + 1) if most % m == 0]
        return min(known, key=lambda steps: abs(math.log(steps / wanted)))


class Method(ABC):
    """A way to distil: a frozen dataclass whose fields, made by `setting`, are its parameters.

    A new one is a class in a file of its own and a line in `METHODS`. Flags, TOML keys, help texts and checks of its
    parameters follow from there. Names of parameters are unique over all methods.

    Attributes:
        keeps_steps: the student takes as many steps as its teacher.
        needs_images: whether real images are used; if not, a batch of targets is whole paths of the student's steps.
        is_annealed: whether targets depend on how much of the training is done.
        has_fine_times: targets lie at the times of the teacher's steps, not at those of the student's alone.
        network_options: options of the student's network that its teacher's need not have. With `second_time` it takes
            the time where a step ends, which samplers give it. The method gives it too: in `TrainTarget.inputs`, and by
            name to the context's student, and to its teacher, which may be such a student.
    """

    keeps_steps: ClassVar[bool] = False
    needs_images: ClassVar[bool] = True
    is_annealed: ClassVar[bool] = False
    has_fine_times: ClassVar[bool] = False
    network_options: ClassVar[Mapping[str, Any]] = {}

    @property
    def self_ema(self) -> float | None:
        """Decay of the average of the student that the method asks; None: it asks none."""
        return None

    @classmethod
    def settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of distill.py that suit the method better than a preset's, which are for `Progressive`."""
        del preset
        return {}

    @abstractmethod
    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """The students' numbers of steps on the way from `num_steps` to `to_steps`.

        Raises:
            ValueError: there is no way.
        """

    @abstractmethod
    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """A target for images x (B, C, H, W), noise N(0, I) like them, and u (B,) uniform in [0, 1)."""

    def networks(self, student: nn.Module) -> nn.Module | None:
        """Networks of the method's own, such as a critic, that learn beside the student; None: none.

        They begin with the same weights in every process, are part of what resuming needs, and of no checkpoint.
        """
        del student
        return None

    def build_optimizer(self, networks: nn.Module, lr: float) -> torch.optim.Optimizer:
        """The optimiser of `networks`; its learning rates follow the student's, which begins with `lr`."""
        import torch

        return torch.optim.AdamW(networks.parameters(), lr=lr, weight_decay=0.0)

    def student_loss(self, networks: nn.Module, target: TrainTarget, prediction: Prediction) -> Tensor | None:
        """(B,) what the student's loss gets besides the error of x̂; `prediction` is the student's of the target."""
        del networks, target, prediction
        return None

    def network_loss(self, networks: nn.Module, target: TrainTarget, prediction: Prediction) -> Tensor:
        """(B,) the loss that `networks` learn by; no gradient reaches the student.

        Raises:
            NotImplementedError: a method with networks says none.
        """
        raise NotImplementedError(f"{type(self).__name__} has networks and no network_loss")
