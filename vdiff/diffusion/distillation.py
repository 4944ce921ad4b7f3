"""The distillation methods: the prediction that a student should learn, so that few of its steps replace many steps of
its teacher.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

from vdiff.diffusion.ect import Ect
from vdiff.diffusion.meanflow import MeanFlow
from vdiff.diffusion.method import DenoiseWith, DistillContext, Method, TrainTarget, scaled
from vdiff.diffusion.phases import halving_plan, single_plan, two_phase_plan
from vdiff.diffusion.samplers import SAMPLERS, ddim_step, sample
from vdiff.diffusion.schedules import alpha_sigma, diffuse, grid_angles, grid_times
from vdiff.diffusion.scm import Scm
from vdiff.diffusion.targets import (
    addim_velocity,
    fine_step,
    grid_times_of,
    invert_ddim,
    progressive_target,
    segment_target,
)
from vdiff.errors import OptionError
from vdiff.settings import parameters, setting

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["METHODS", "DenoiseWith", "DistillContext", "Method", "TrainTarget", "build_method", "shortening"]


@dataclass(frozen=True)
class Progressive(Method):
    """One step of the student replaces k DDIM steps of the teacher; by default k = 2, and each stage halves the steps.

    t = i/N with i uniform in 1 … N, x* by `progressive_target`. Source: Salimans & Ho 2022, algorithm 2.
    """

    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """`halving_plan`."""
        return halving_plan(num_steps, to_steps)

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Noisy images on the student's grid."""
        t = grid_times_of(u, context.num_steps)
        z = diffuse(x, noise, context.schedule.angle(t))
        ratio = context.teacher_steps // context.num_steps
        target = progressive_target(
            context.teacher, context.schedule, z=z, t=t, num_steps=context.num_steps, ratio=ratio
        )
        return TrainTarget(z, t, target.x)


@dataclass(frozen=True)
class Tract(Method):
    """Transitive closure: one step of the teacher, then a jump of the student's own EMA to the end of the segment.

    t = k/n on the teacher's grid with k uniform in 1 … n, x* by `segment_target`. Few stages are enough, each with a
    large ratio of steps: the student learns the end of a segment first, and its beginning from its own jumps.
    Source: Berthelot et al. 2023, *TRACT: Denoising Diffusion Models with Transitive Closure Time-Distillation*.

    Args:
        self_ema: decay of the self-teacher, the bias-corrected average of the student's weights.
    """

    self_ema: float = setting(
        "Decay of the student's EMA from which tract computes targets.", default=0.5, low=0, high=0.9999
    )
    has_fine_times: ClassVar[bool] = True

    @classmethod
    def settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """The paper's, with 10/3 of the preset's learning rate (on CIFAR-10 it has 4 times that of `Progressive`)."""
        inference = {"lr_schedule": "constant", "ema_remainder": 1e-3}
        return {"lr": scaled(preset["lr"], 10 / 3), **inference, "last_factor": 1.0}

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """Four times the learning rate of `Progressive`."""
        return {**cls.settings(preset), "lr": scaled(preset["lr"], 4), "self_ema": 0.5}

    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """`two_phase_plan`."""
        return two_phase_plan(num_steps, to_steps)

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Noisy images on the teacher's grid."""
        assert context.average is not None

        times = fine_step(u, context.num_steps, context.teacher_steps)
        z = diffuse(x, noise, context.schedule.angle(times["t"]))
        target = segment_target(
            lambda z, t, *_: context.teacher(z, t).v, context.average, context.schedule, z=z, **times
        )
        return TrainTarget(z, times["t"], target.x)


@dataclass(frozen=True)
class Consistency(Method):
    """Multistep consistency distillation: as `Tract`, but the student itself jumps, and the grid becomes finer.

    The number n of teacher steps grows from `first_steps` to the teacher's own over the updates of the stage, evenly in
    log n. Each step is an adjusted DDIM step (`addim_velocity`). With one segment this is consistency distillation
    (Song et al. 2023).
    Source: Heek et al. 2024, *Multistep Consistency Models*, algorithms 1 and 3.

    Args:
        first_steps: n at the first update; 0: an eighth of the teacher's, at most the paper's 64.
        addim: η of the teacher's steps; 0: DDIM.
    """

    first_steps: int = setting(
        "Teacher steps at the first update of consistency.",
        default=0, low=0, unit="STEPS", shown="an eighth of them, at most 64",
    )  # fmt: skip
    addim: float = setting(
        "Variance correction of the teacher's steps in consistency (aDDIM); 0 = DDIM.", default=0.0, low=0, high=2
    )
    is_annealed: ClassVar[bool] = True
    has_fine_times: ClassVar[bool] = True
    knows_teachers_times: ClassVar[bool] = True

    @classmethod
    def settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """An EMA for inference, and 20/3 times the learning rate.

        Three settings differ from the paper, whose values were no better on digits of 8×8: the learning rate falls to
        0, errors are squared, and the teacher takes DDIM steps.
        """
        return {"lr": scaled(preset["lr"], 20 / 3), "ema_remainder": 1e-3, "last_factor": 1.0}

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """A constant learning rate, the Huber loss and aDDIM."""
        own = {"loss": "huber", "first_steps": 64, "addim": 0.75}
        return {**cls.settings(preset), "lr": preset["lr"], "lr_schedule": "constant", **own}

    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """`single_plan`."""
        return single_plan(num_steps, to_steps)

    def steps_at(self, context: DistillContext) -> int:
        """n at the progress p: first^(1 − p) · last^p, rounded to a number that the grids allow."""
        last = context.teacher_steps
        begin = min(self.first_steps or min(64, last / 8), last)
        return context.fine_steps(begin ** (1 - context.progress) * last**context.progress)

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Noisy images on the current grid."""
        assert context.student is not None

        def first(z: Tensor, t: Tensor, angle_t: Tensor, angle_s: Tensor) -> Tensor:
            prediction = context.teacher(z, t)
            return addim_velocity(z, prediction, x, angle_t, angle_s, self.addim) if self.addim else prediction.v

        times = fine_step(u, context.num_steps, self.steps_at(context))
        z = diffuse(x, noise, context.schedule.angle(times["t"]))
        target = segment_target(first, context.student, context.schedule, z=z, **times)
        return TrainTarget(z, times["t"], target.x)


@dataclass(frozen=True)
class Match(Method):
    """The student learns the predictions of its teacher, at the same number of steps.

    It is for students with another network: one that predicts v instead of ε, a smaller one, or one that takes guidance
    as an input. If the teacher predicts ε, x* = α² x̂ + σ² x. At low signal x̂ = (z − σ ε̂)/α magnifies the error of ε̂,
    so the image x replaces it there: the mean of x given z is the perfect x̂. The factor of the error of ε̂ in x* is α σ,
    at most 1/2.
    """

    keeps_steps: ClassVar[bool] = True

    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """One stage of as many steps."""
        if to_steps != num_steps:
            raise ValueError(f"this method keeps the {num_steps} steps of the teacher and cannot reach {to_steps}")
        return [num_steps]

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Noisy images at all times that the teacher was trained for, from the first level of a table on."""
        if context.levels is None:
            t = (1 - u).clamp(min=1 / (context.schedule.num_levels or math.inf))
        else:
            t = grid_times_of(u, context.levels)
        angle = context.schedule.angle(t)
        z = diffuse(x, noise, angle)
        if not context.predicts_noise:
            return TrainTarget(z, t, context.teacher(z, t).x)
        # α² x̂ = α (z − σ ε̂): nothing is divided, and α may be 0
        alpha, sigma = alpha_sigma(angle, z)
        return TrainTarget(z, t, alpha * (z - sigma * context.teacher(z, t).eps) + sigma**2 * x)


@dataclass(frozen=True)
class Guided(Match):
    """A student that takes the weight w of classifier-free guidance as an input, so one evaluation replaces two:
    x̂_w = (1 + w) x̂_c − w x̂_∅, with w uniform in `guidance_range`.

    A second method then reduces its steps; w remains an input. The teacher in the context is the guided one.
    Source: Meng et al. 2023, *On Distillation of Guided Diffusion Models*, algorithm 1.

    Args:
        then: the second method.
        guidance_range: the least and the largest w, "0,4".

    Raises:
        OptionError: no range.
    """

    network_options: ClassVar[Mapping[str, Any]] = {"guidance_input": True}
    then: str = setting(
        "Method that reduces the steps after the stage of --method guided.",
        default="progressive", choices=lambda: shortening(),
    )  # fmt: skip
    guidance_range: str = setting("Guidance weights that --method guided distils.", default="0,4", unit="LOW,HIGH")

    def __post_init__(self) -> None:
        self.weights()

    def weights(self) -> tuple[float, float]:
        """`guidance_range` as two numbers."""
        try:
            low, high = (float(word) for word in self.guidance_range.split(","))
        except ValueError:
            low, high = math.nan, math.nan
        if not (-1 <= low < high < math.inf):
            raise OptionError(
                f"--guidance_range {self.guidance_range}: not a range of weights", "give two increasing numbers: 0,4"
            )
        return low, high


@dataclass(frozen=True)
class Trajectory(Method):
    """The student samples a path from noise, and each of its steps learns to end at the teacher's state of that time.

    The teacher takes n steps from the same noise; z̃_i are its states at the student's times. The student takes its N
    steps, with states z_i, without a gradient through the path. x* of step i inverts the step from z_i to z̃_{i−1}. The
    method needs no images, and few updates.
    Source: Zhou et al. 2024, *Simple and Fast Distillation of Diffusion Models* (SFD).

    Args:
        path_steps: n, or 2N where that is more.
        path_threshold: quantile of the dynamic thresholding of the teacher's x̂ (see `Limits.threshold`), for a guided
            teacher, whose images exceed [−1, 1]; None: no limits.
        path_sampler: the teacher's sampler. "auto" is the paper's DPM-Solver++ (3M), or DDIM if the teacher is itself a
            student: its predictions are made for its own steps, so a solver may not interpolate them.
    """

    path_steps: int = setting("Steps of the teacher's path in trajectory.", default=16, low=2, unit="STEPS")
    path_sampler: str = setting(
        "Sampler of the teacher in trajectory; auto is ddim if the teacher is a student itself, else dpmpp_3m.",
        default="auto", choices=("auto", *(name for name, kind in SAMPLERS.items() if kind.solves_ode)),
    )  # fmt: skip
    path_threshold: float | None = setting(
        "Dynamic thresholding of the teacher's path in trajectory, a quantile as in --dynamic_threshold.",
        default=None, low=0, high=1, open_low=True, unit="QUANTILE",
    )  # fmt: skip
    needs_images: ClassVar[bool] = False

    @classmethod
    def settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """Absolute errors, 10/3 times the learning rate, and at most 200 updates for each halving.

        From 1024 steps to one these are 2,000 updates; the paper's code computes about 1,600 paths of 128 images. It
        differs in four settings: 4 teacher steps for each step of the student, an update after each step of the path,
        unweighted errors of the state, and a learning rate that falls to a tenth half-way.
        """
        updates = min(preset["num_iters"], 200)
        return {"lr": scaled(preset["lr"], 10 / 3), "num_iters": updates, "loss": "l1", "last_factor": 1.0}

    @classmethod
    def paper_settings(cls, preset: Mapping[str, Any]) -> dict[str, Any]:
        """A teacher of 4 steps for a student of one."""
        return {**cls.settings(preset), "path_steps": 4, "path_sampler": "auto"}

    def plan(self, num_steps: int, to_steps: int) -> list[int]:
        """`single_plan`."""
        return single_plan(num_steps, to_steps)

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """One state per image, from whole paths; the paths start from the first rows of the noise."""
        import torch

        del x
        assert context.student is not None
        steps, size = context.num_steps, len(noise)
        z = noise[: -(-size // steps)]
        # states in float64, where the device has it: x* divides their difference by the sine of the step
        z = z if z.device.type == "mps" else z.double()
        teacher, student = context.teacher, context.student
        context = replace(context, teacher=lambda z, t, **inputs: teacher(z.to(noise), t, **inputs))
        times = grid_times(steps)
        angles = grid_angles(context.schedule, times)
        ends = self.walk(context, z)
        states: Any = []
        targets: Any = []
        for i in range(steps, 0, -1):
            t, angle_t, angle_s = (values.expand(len(z)) for values in (times[i], angles[i], angles[i - 1]))
            states.append(z.to(noise))
            targets.append(invert_ddim(z, ends[i - 1], angle_t, angle_s).x.to(noise))
            if i > 1:
                z = ddim_step(z, student(z.to(noise), t, **self.step_end(t, steps)).v, angle_t, angle_s)
        # One noise after the other. If N does not divide the batch, the omitted steps are chosen at random by the later
        # digits of u; its first digits are not random, as u is stratified.
        first = ((u[0] * 2**20) % 1 * steps).floor().long()
        order = (torch.arange(steps, device=u.device) + first) % steps
        rows = torch.arange(len(noise[: -(-size // steps)]), device=u.device).repeat_interleave(steps)[:size]
        which = order.repeat(-(-size // steps))[:size]
        t = times.flip(0).to(u)[which]
        states, targets = torch.stack(states)[which, rows], torch.stack(targets)[which, rows]
        return TrainTarget(states, t, targets, rows, inputs=self.step_end(t, steps))

    def step_end(self, t: Tensor, num_steps: int) -> dict[str, Tensor]:
        """The end of the step of 1/N from t, for a network that takes a second time."""
        return {"second_time": (t - 1 / num_steps).clamp(min=0)} if self.network_options else {}

    def walk(self, context: DistillContext, z: Tensor) -> list[Tensor]:
        """The teacher's states z̃_0 … z̃_N at the student's times, from z at t = 1."""
        fine = context.fine_steps(max(self.path_steps, 2 * context.num_steps))
        own = "ddim" if context.teacher_is_distilled else "dpmpp_3m"
        sampler: Any = SAMPLERS[own if self.path_sampler == "auto" else self.path_sampler]
        states: list[Tensor] = []
        end = sample(
            lambda z, t: context.teacher(z, t, **self.step_end(t, fine)),
            context.schedule,
            sampler(clipping_value=1.0 if self.path_threshold else None, threshold=self.path_threshold),
            z=z,
            num_steps=fine,
            noise=_no_noise,
            on_state=lambda _, state, __: states.append(state),
            check=False,  # an update must not wait for the device; one that is not finite changes nothing
        )
        return [*states, end][:: -(fine // context.num_steps)]


@dataclass(frozen=True)
class VariableTrajectory(Trajectory):
    """One student for N steps and for every number that divides N; the end of each step is an input of its network.

    An update has paths of each number of steps, in equal parts of the batch. Source: Zhou et al. 2024, SFD-v, where the
    number of steps is the input; the end of the step contains the same information for any grid.
    """

    network_options: ClassVar[Mapping[str, Any]] = {"second_time": True}

    def __call__(self, context: DistillContext, x: Tensor, noise: Tensor, u: Tensor) -> TrainTarget:
        """Paths of every number of steps; each number takes the classes of the first images."""
        import torch

        counts = [n for n in range(context.num_steps, 0, -1) if context.num_steps % n == 0]
        parts = zip(counts, noise.tensor_split(len(counts)), u.tensor_split(len(counts)), strict=True)
        found = [
            super(VariableTrajectory, self).__call__(replace(context, num_steps=n), x, part, some)
            for n, part, some in parts
            if len(part)
        ]
        z, t, image, rows, end = (
            torch.cat(each)
            for each in zip(*((f.z, f.t, f.x, f.rows, f.inputs["second_time"]) for f in found), strict=True)
        )
        return TrainTarget(z, t, image, rows, inputs={"second_time": end})


def _no_noise() -> Tensor:
    raise ValueError("the teacher's path must be deterministic, but its sampler draws noise")


METHODS: dict[str, type[Method]] = {
    "progressive": Progressive,
    "tract": Tract,
    "consistency": Consistency,
    "guided": Guided,
    "trajectory": Trajectory,
    "trajectory_v": VariableTrajectory,
    "match": Match,
    "scm": Scm,
    "ect": Ect,
    "meanflow": MeanFlow,
}


def build_method(name: str, settings: Mapping[str, Any]) -> Method:
    """The method `name`, with its parameters from `settings`.

    Raises:
        OptionError: one of them has a value that the method cannot use.
    """
    kind: Any = METHODS[name]
    return kind(**{key: settings[key] for key in parameters(kind) if key in settings})


def shortening() -> list[str]:
    """The methods that reduce the number of steps."""
    return [name for name, method in METHODS.items() if not method.keeps_steps]
