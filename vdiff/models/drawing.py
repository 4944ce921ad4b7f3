"""Sampling of numbered images from a denoiser."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vdiff.diffusion.grids import grid_of
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import NonFiniteSampleError, Sampler, sample
from vdiff.errors import VdiffError
from vdiff.models.codec import Codec
from vdiff.models.condition import SECOND_TIME, TOKENS, Condition, Signature
from vdiff.models.denoiser import NOTHING, Denoiser, GuidedDenoiser, device_of

EVERYWHERE = (0.0, 1.0)
OnStep = Callable[[int], object]
Conditions = Callable[[Denoiser, Sequence[int]], Condition]
"""(denoiser, numbers of images) → the condition of these images."""
OnState = Callable[[int, Tensor, Prediction], None]


def classes_in_turn(denoiser: Denoiser, indices: Sequence[int], choices: Sequence[int] | None = None) -> Condition:
    """The condition that assigns the classes `choices` to images in turn (None: all), if the network takes classes."""
    choices = choices or range(denoiser.network.signature.num_classes)
    return denoiser.condition(classes=image_classes(indices, choices) if choices else None)


def image_classes(indices: Sequence[int], choices: Sequence[int]) -> Tensor:
    """Image k has class `choices[k mod len(choices)]`: (B,) int64."""
    return torch.tensor([choices[k % len(choices)] for k in indices])


def squared_errors(images: Tensor, theirs: Tensor, codec: Codec) -> Tensor:
    """(n,) float64: the mean squared difference of each sample, with pixels clipped to [−1, 1].

    Images are paired by their number, as far as both have them.
    """
    count = min(len(images), len(theirs))
    a, b = (codec.clip(each[:count].double()) for each in (images, theirs))
    return (a - b).square().flatten(1).mean(1)


def rmse(images: Tensor, theirs: Tensor, codec: Codec) -> float:
    """√ of the mean of `squared_errors`: the "RMSE" in ladders, reports and evaluations."""
    return float(squared_errors(images, theirs, codec).mean().sqrt())


def draw(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    indices: Sequence[int],
    image_size: int | Sequence[int],
    seed: int = 0,
    conditions: Conditions = classes_in_turn,
    **options: Any,
) -> Tensor:
    """Samples `indices` of `seed`: (B, C, …) float32 on the CPU, in [−1, 1] if the sampler clips.

    Args:
        image_size: pixels per side, or the sizes after the channels: (H, W), (L,), ….
        conditions: by default the classes of a class-conditional network, assigned to the images in turn.
        options: of `draw_from`, such as `num_steps` and `guidance`.

    Raises:
        VdiffError: the network produced a value that is not finite.
        ValueError: no such grid on the schedule, or no such guidance.
    """
    device = device_of(denoiser)
    sizes = (image_size, image_size) if isinstance(image_size, int) else image_size
    shape = (denoiser.network.signature.channels, *sizes)
    return draw_from(
        denoiser,
        sampler,
        noise=ImageNoise(seed=seed, indices=indices, shape=shape, device=device),
        condition=conditions(denoiser, indices),
        **options,
    )


def images_at_once(takes: Signature, shape: Sequence[int]) -> int:
    """How many images to sample at once: 64, or fewer for a large text-to-image model (4 × 128 × 128: four)."""
    return max(1, min(64, 2**18 // math.prod(shape))) if TOKENS in takes.names else 64


def draw_in_batches(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    count: int,
    at_once: int,
    num_steps: int,
    on_step: OnStep | None = None,
    **options: Any,
) -> Tensor:
    """Samples 0 … `count` − 1 by `draw`, `at_once` in a batch; `on_step` gets the finished steps of all batches."""
    parts: list[Tensor] = []
    for first in range(0, count, at_once):
        done = len(parts) * num_steps
        parts.append(
            draw(
                denoiser,
                sampler,
                indices=range(first, min(first + at_once, count)),
                num_steps=num_steps,
                on_step=on_step and (lambda step, done=done: on_step(done + step)),  # type: ignore[misc]
                **options,
            )
        )
    return torch.cat(parts)


def draw_from(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    noise: Callable[[], Tensor],
    num_steps: int,
    start: Tensor | None = None,
    condition: Condition = NOTHING,
    guidance: float = 0.0,
    guidance_interval: tuple[float, float] = EVERYWHERE,
    grid: str = "uniform",
    on_step: OnStep | None = None,
    on_state: OnState | None = None,
) -> Tensor:
    """Images from noise (B, C, H, W): float32 on the CPU, in [−1, 1] if the sampler clips.

    Args:
        noise: its first result is z at t = 1; a stochastic sampler adds the later ones.
        start: z at t = 1 instead of that first result, which is skipped.
        condition: of B rows, on any device.
        guidance: the weight w of classifier-free guidance. A network may take it as an input; otherwise it is evaluated
            with the condition and with its null.
        guidance_interval: the times, ends included, with guidance by two evaluations; elsewhere there is one.
        grid: the name of the grid of `num_steps` steps, see `vdiff.diffusion.grids`.
        on_step, on_state: see `vdiff.diffusion.samplers.sample`.

    Raises:
        VdiffError: the network produced a value that is not finite.
        ValueError: no such grid on the schedule, or no such guidance.
    """
    dtype = next((weight.dtype for weight in denoiser.parameters()), torch.float32)
    z = noise()
    z = z if start is None else start.to(z)
    condition, takes_guidance = condition.to(z.device), denoiser.network.signature.takes_guidance
    if takes_guidance:
        condition = condition.with_tensors(guidance=torch.full((len(z),), guidance, device=z.device))
    is_plain = takes_guidance or not guidance
    guided = denoiser if is_plain else GuidedDenoiser(denoiser, guidance, guidance_interval)

    times = grid_of(grid, denoiser.schedule, num_steps)

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        inputs = condition
        if SECOND_TIME in denoiser.network.signature.names:  # the end of the step from t
            end = (torch.searchsorted(times, t.to(times).contiguous()) - 1).clamp(min=0)
            inputs = condition.with_tensors(second_time=times[end] * (not sampler.jumps_to_image))
        prediction: Prediction = guided(z, t, inputs)
        return prediction

    was_training = denoiser.training
    denoiser.eval()
    try:
        with torch.inference_mode():
            condition = denoiser.network.encode(condition)
            images = sample(
                denoise,
                denoiser.schedule,
                sampler,
                z=z,
                num_steps=num_steps,
                noise=noise,
                times=times,
                on_step=on_step,
                on_state=on_state,
            )
    except NonFiniteSampleError as error:
        remedy = "use an earlier checkpoint, or train with a lower --lr"
        if dtype.itemsize < 4:
            error, remedy = NonFiniteSampleError(f"{error}, the network in {dtype}"), "give --precision fp32"
        raise VdiffError(f"the model draws no sample: {error}", remedy) from None
    finally:
        denoiser.train(was_training)
    # outside of inference mode, so that the caller may compute gradients with it
    return images.to("cpu", copy=True)
