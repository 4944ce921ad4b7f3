"""Objectives: from a batch to noisy images, their times, and the images that the network should predict.

All random numbers are arguments.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

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
    """The inputs of an update: images (B, C, H, W), noise N(0, I) like them, u (B,) uniform in [0, 1), the condition of
    the trained network, and noise of its input that the loss ignores (None: no such noise)."""

    images: Tensor
    noise: Tensor
    u: Tensor
    condition: Condition = NOTHING
    perturbation: Tensor | None = None

    def __getitem__(self, rows: slice | Tensor) -> TrainBatch:
        """Some of the rows."""
        more = None if self.perturbation is None else self.perturbation[rows]
        return TrainBatch(self.images[rows], self.noise[rows], self.u[rows], self.condition[rows], more)


@dataclass(frozen=True)
class StudentState:
    """The trained network: its current weights, their moving average (or the network itself), the finished fraction of
    its updates, and the networks of the method, if it has any."""

    now: Denoiser
    average: Denoiser
    progress: float
    networks: nn.Module | None = None


Objective = Callable[[TrainBatch, StudentState], TrainTarget]


@dataclass(frozen=True)
class DenoisingObjective:
    """Base training: the target is the image itself.

    t = 1 − u ∈ (0, 1]; for a table schedule of N levels t = (⌊u·N⌋ + 1)/N.

    Attributes:
        normal: mean and standard deviation of ln tan φ, which is then normal (`normal_angles`), clamped to the
            schedule; None: t as above.
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
    """Distillation: the target that `method` computes from a teacher.

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
    """The denoiser with the first rows of the condition, as many as z has, and further inputs by name.

    A network that is trained must not be called in `inference_mode`, whose tensors FSDP would keep.
    """

    def denoise(z: Tensor, t: Tensor, **inputs: Tensor) -> Prediction:
        with mode():
            prediction: Prediction = denoiser(z, t, condition[: len(z)].with_tensors(**inputs))
        return prediction

    return denoise


def bind_derivative(denoiser: Denoiser, condition: Condition) -> DeriveWith:
    """The denoiser's v̂ and its derivative along a direction, with the first rows of the condition.

    It is always computed in fp32, without fused attention, which has no forward derivative, and without compilation,
    whose transforms do not nest. The weights get no gradient here: the loss goes through the model that sums gradients
    over processes.

    Raises:
        VdiffError: the network has another operation without a forward derivative.
    """

    def derive(z: Tensor, t: Tensor, dz: Tensor, dt: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        rows = condition[: len(z)].with_tensors(**inputs)

        def v(z: Tensor, t: Tensor) -> Tensor:
            # without the autocast that Accelerate adds to `denoiser.forward`
            return Denoiser.forward(denoiser, z, t, rows).v

        # tensors made in inference mode have no derivative
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
    """One uniform number in each of `size` equal parts of [0, 1): (size,) float64 (float32 on devices without it).

    As images are shuffled, each number is uniform. Together they cover all times evenly, which lowers the variance of
    the loss.
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
