"""`vdiff.load`: a checkpoint as an object that draws and denoises, for use in Python."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import Sampler
from vdiff.distributed import memory_errors_named, pick_device
from vdiff.models import checks
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint
from vdiff.models.denoiser import Denoiser, GuidedDenoiser
from vdiff.models.drawing import EVERYWHERE, classes_in_turn, draw_from
from vdiff.models.speed import ready_to_draw


def load(checkpoint: str | Path, *, device: str = "auto", precision: str = "auto", compiled: bool = False) -> Model:
    """The model in the folder `checkpoint`, ready to draw.

    Args:
        device: auto (a GPU where there is one), cpu, cuda or mps.
        precision: auto (fp32, on CUDA with products in TF32), fp32, bf16 or fp16.
        compiled: whether the network is compiled at its first evaluation of each shape.

    Raises:
        VdiffError: no such checkpoint, a damaged one, or a device or precision that this machine has not.
    """
    denoiser, config = load_checkpoint(checkpoint, pick_device(device))
    return Model(ready_to_draw(denoiser, precision=precision, compiled=compiled), config)


class Model:
    """A denoiser and what its checkpoint says of it.

    Attributes:
        denoiser: the network, its schedule and what it predicts.
        config: the checkpoint's description: `num_timesteps`, `image_size`, `class_names`, `method`, `teacher`, ….
    """

    def __init__(self, denoiser: Denoiser, config: CheckpointConfig) -> None:
        self.denoiser, self.config = denoiser, config

    def __repr__(self) -> str:
        config = self.config
        return f"<vdiff model: {config.method}, {config.num_timesteps} steps, {self.shape}, on {self.device}>"

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.denoiser.parameters()).device

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return (self.denoiser.network.signature.channels, self.config.image_size, self.config.image_size)

    def sample(
        self,
        num: int | None = None,
        *,
        steps: int | None = None,
        seed: int = 0,
        sampler: str | Sampler = "ddim",
        grid: str = checks.UNIFORM,
        classes: Sequence[str | int] | None = None,
        guidance: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        noise: Tensor | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> Tensor:
        """Draw images: (num, C, H, W) float32 on the CPU, clamped to [−1, 1].

        Args:
            num: how many; without it as many as `noise` has, else 16.
            steps: sampling steps; by default the model's own.
            seed: image k of a seed is the one that `sample.py` draws.
            sampler: a name of `vdiff.diffusion.samplers.SAMPLERS`, or one of those objects.
            grid: a name of `vdiff.diffusion.grids.GRIDS`; a distilled model has learned `uniform` alone.
            classes: names or numbers that the images take in turn; by default all.
            guidance, guidance_interval: the weight w of classifier-free guidance, and the times that it is for.
            noise: (num, C, H, W), z at t = 1 instead of the seed's; what a stochastic sampler adds is still the seed's.
            batch_size: images drawn at once; they do not depend on it.
            options: of the named sampler: `clipping_value`, `threshold`, `eta`.

        Raises:
            VdiffError: something that this model or sampler cannot do, or an image that is not finite.
            ValueError: noise of another shape, or numbers of images that make no sense.
        """
        num = num if num is not None else 16 if noise is None else len(noise)
        if num < 1 or batch_size < 1:
            raise ValueError(f"need at least one image, and one in a batch, got {num} and {batch_size}")
        if noise is not None and noise.shape != (num, *self.shape):
            raise ValueError(f"noise of shape {tuple(noise.shape)}; need {(num, *self.shape)}")
        steps = self.config.num_timesteps if steps is None else steps
        rule = self._sampler(sampler, options)
        checks.check_grid(self.config, grid, steps)
        checks.check_guidance(self.config, guidance)
        checks.check_interval(self.config, guidance, guidance_interval)
        numbers = checks.class_numbers(self.config, classes)
        drawn = []
        for first in range(0, num, batch_size):
            indices = range(first, min(first + batch_size, num))
            with memory_errors_named():
                images = draw_from(
                    self.denoiser,
                    rule,
                    noise=ImageNoise(seed=seed, indices=indices, shape=self.shape, device=self.device),
                    start=None if noise is None else noise[first : first + batch_size],
                    condition=classes_in_turn(self.denoiser, indices, numbers),
                    num_steps=steps,
                    guidance=guidance,
                    guidance_interval=guidance_interval or EVERYWHERE,
                    grid=grid,
                )
            drawn.append(images)
        return torch.cat(drawn).clamp_(-1, 1)

    def denoise(
        self, z: Tensor, t: Tensor | float, *, classes: Sequence[str | int] | None = None, guidance: float = 0.0
    ) -> Prediction:
        """What the model says of noisy images: x̂, ε̂ and v̂ of z = α x + σ ε, on the device of the model.

        Args:
            z: (B, C, H, W).
            t: the time in (0, 1], one number or (B,); 1 is noise alone.
            classes: names or numbers, for the images in turn; by default all.
            guidance: the weight w of classifier-free guidance.

        Raises:
            VdiffError: classes or guidance that this model does not know.
            ValueError: z or t of another shape, or times outside (0, 1].
        """
        if z.ndim != 4 or tuple(z.shape[1:]) != self.shape:
            raise ValueError(f"z of shape {tuple(z.shape)}; need (B, {', '.join(map(str, self.shape))})")
        times = torch.as_tensor(t, dtype=torch.float64).cpu()
        if times.ndim > 1 or (times.ndim == 1 and len(times) != len(z)):
            raise ValueError(f"t of shape {tuple(times.shape)}; need one number or {len(z)}")
        if not ((times > 0) & (times <= 1)).all():
            raise ValueError(f"times lie in (0, 1], got {t}")
        checks.check_guidance(self.config, guidance)
        numbers = checks.class_numbers(self.config, classes)
        condition = classes_in_turn(self.denoiser, range(len(z)), numbers)
        takes_guidance = self.denoiser.network.signature.takes_guidance
        if takes_guidance:
            condition = condition.with_tensors(guidance=torch.full((len(z),), guidance))
        denoiser = GuidedDenoiser(self.denoiser, guidance) if guidance and not takes_guidance else self.denoiser
        with torch.no_grad(), memory_errors_named():
            prediction: Prediction = denoiser(z.to(self.device), times.expand(len(z)), condition)
        return prediction

    def _sampler(self, sampler: str | Sampler, options: Mapping[str, Any]) -> Sampler:
        if not isinstance(sampler, str):
            if options:
                raise ValueError(f"{', '.join(options)}: set it in the sampler that is given, {sampler}")
            return sampler
        checks.check_limits(self.config, options)
        return checks.build_sampler(sampler, options)
