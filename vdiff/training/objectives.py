"""What the network is to learn from a batch: noisy images, their times, and the image it should see in each.

An objective is given all its randomness.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from vdiff.diffusion.method import DenoiseWith, DeriveWith, DistillContext, Method, TrainTarget
from vdiff.diffusion.parameterisation import normal_angles
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import Schedule, coefficient, diffuse
from vdiff.diffusion.targets import grid_times_of
from vdiff.diffusion.weighting import LOSSES
from vdiff.errors import VdiffError
from vdiff.models.backbone import without_autocast
from vdiff.models.condition import Condition
from vdiff.models.denoiser import NOTHING, Denoiser


@dataclass(frozen=True)
class TrainBatch:
    """What an update is given: images (B, C, H, W), noise N(0, I) like them, u (B,) uniform in [0, 1), and the
    condition of the network that learns."""

    images: Tensor
    noise: Tensor
    u: Tensor
    condition: Condition = NOTHING

    def __getitem__(self, rows: slice | Tensor) -> TrainBatch:
        """Some of the rows."""
        return TrainBatch(self.images[rows], self.noise[rows], self.u[rows], self.condition[rows])


@dataclass(frozen=True)
class StudentState:
    """Who learns: the network as it is now, its moving average (itself where there is none), the part of its updates
    that is done, and the networks of the method, where it has some."""

    now: Denoiser
    average: Denoiser
    progress: float
    networks: nn.Module | None = None


Objective = Callable[[TrainBatch, StudentState], TrainTarget]


@dataclass(frozen=True)
class DenoisingObjective:
    """Base training: the target is the image itself.

    t = 1 − u ∈ (0, 1], every time; for a schedule that is a table of N levels t = (⌊u·N⌋ + 1)/N.

    Attributes:
        normal: mean and standard deviation of ln tan φ, whose distribution is normal (`normal_angles`) but for what
            lies outside the schedule; None: t as above.
    """

    schedule: Schedule
    normal: tuple[float, float] | None = None

    def __call__(self, batch: TrainBatch, student: StudentState) -> TrainTarget:
        del student
        levels = self.schedule.num_levels
        t = 1 - batch.u if levels is None else grid_times_of(batch.u, levels)
        if self.normal is not None:
            t = self.schedule.time(normal_angles(batch.u, *self.normal)).clamp(1 / self.schedule.label_scale, 1)
            t = t if levels is None else (t * levels).round() / levels
        return TrainTarget(diffuse(batch.images, batch.noise, self.schedule.angle(t)), t, batch.images)


@dataclass(frozen=True)
class DistillationObjective:
    """What `method` makes of a teacher.

    Attributes:
        num_steps, teacher_steps, levels: see `DistillContext`.
    """

    teacher: Denoiser
    method: Method
    num_steps: int
    teacher_steps: int
    levels: int | None = None

    def __call__(self, batch: TrainBatch, student: StudentState) -> TrainTarget:
        training = student.now.training
        context = DistillContext(
            teacher=bind_condition(self.teacher, batch.condition, torch.inference_mode),
            schedule=self.teacher.schedule,
            num_steps=self.num_steps,
            teacher_steps=self.teacher_steps,
            levels=self.levels,
            student=bind_condition(student.now, batch.condition),
            average=bind_condition(student.average, batch.condition),
            derivative=bind_derivative(student.now, batch.condition),
            progress=student.progress,
            networks=student.networks,
            predicts_noise=self.teacher.parameterisation.predicts_noise,
        )
        with torch.no_grad():
            student.now.eval()
            try:
                return self.method(context, batch.images, batch.noise, batch.u)
            finally:
                student.now.train(training)


def bind_condition(
    denoiser: Denoiser, condition: Condition, mode: Callable[[], AbstractContextManager[object]] = torch.no_grad
) -> DenoiseWith:
    """The denoiser with the first rows of the condition, as many as z has, and what a method adds to them by name.

    Weights that are still to be trained must not be seen under `inference_mode`, which FSDP would not forget.
    """

    def denoise(z: Tensor, t: Tensor, **inputs: Tensor) -> Prediction:
        with mode():
            prediction: Prediction = denoiser(z, t, condition[: len(z)].with_tensors(**inputs))
        return prediction

    return denoise


def bind_derivative(denoiser: Denoiser, condition: Condition) -> DeriveWith:
    """The denoiser's v̂ and its derivative along a direction, with the first rows of the condition.

    Computed in fp32 whatever the precision of training, by attention that has a forward derivative (fused attention has
    none), and without the compiled program of the network, whose transforms do not nest. Weights get no gradient: what
    a student learns from goes through the model that sums gradients over processes.

    Raises:
        VdiffError: the network has another operation without a forward derivative.
    """

    def derive(z: Tensor, t: Tensor, dz: Tensor, dt: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        told = condition[: len(z)].with_tensors(**inputs)
        # past the autocast that Accelerate puts into `forward`; FSDP's hooks bring the weights
        call = denoiser if isinstance(denoiser, FSDPModule) else partial(Denoiser.forward, denoiser)

        def v(z: Tensor, t: Tensor) -> Tensor:
            prediction: Prediction = call(z, t, told)
            return prediction.v

        # what a teacher answered in inference mode has no derivative
        direction = tuple(each.clone() if each.is_inference() else each for each in (dz, dt))
        with (
            torch.no_grad(),
            without_autocast(z.device),
            torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
            torch.compiler.set_stance("force_eager"),
            warnings.catch_warnings(),
        ):
            for kind in (FutureWarning, DeprecationWarning):  # torch's own use of torch.jit.script, by version
                warnings.simplefilter("ignore", kind)
            try:
                value, derivative = torch.func.jvp(v, (z, t), direction)[:2]
            except RuntimeError as error:  # and torch 2.13 fails in the group norm of UNet2DModel
                if not isinstance(error, NotImplementedError) and "view size" not in str(error):
                    raise
                reason = str(error).partition(" that does not")[0]
                raise VdiffError(
                    f"the network cannot be differentiated along the flow: {reason}", "give --method ect"
                ) from None
        return value, derivative

    return derive


def stratified(size: int, device: torch.device | str = "cpu") -> Tensor:
    """One uniform number in each of `size` equal parts of [0, 1): (size,) float64 (float32 where a GPU has no more).

    Each is uniform once images are shuffled, and together they cover all times evenly: a loss of lower variance.
    """
    dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
    return in_strata(torch.rand(size, dtype=dtype, device=device), range(size), size)


def in_strata(u: Tensor, rows: range, size: int) -> Tensor:
    """(k + u)/size for the rows k of a batch of `size`, u (len(rows),) uniform in [0, 1)."""
    places = torch.arange(rows.start, rows.stop, device=u.device)
    return ((places + u) / size).clamp(max=1 - torch.finfo(u.dtype).eps / 2)  # the last one might be rounded up to 1


def weighted_losses(
    prediction: Prediction,
    example: TrainTarget,
    logsnr: Tensor,
    weighting: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor], Tensor] = LOSSES["l2"],
) -> Tensor:
    """The loss of √w(λ_t) (x − x̂), times the weight of each: (B,); for l2 w(λ_t) ‖x − x̂‖², the mean over pixels.

    `logsnr` (B,) = λ_t.
    """
    error = example.x - prediction.x
    losses = loss(coefficient(weighting(logsnr).sqrt(), error) * error)
    return losses if example.weight is None else losses * example.weight.to(losses)
