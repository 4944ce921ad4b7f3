"""Drawing images from a denoiser: numbered images in, pixels out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import NonFiniteSampleError, Sampler, sample
from vdiff.errors import VdiffError
from vdiff.models.denoiser import Denoiser, GuidedDenoiser


def image_classes(indices: Sequence[int], choices: Sequence[int]) -> Tensor:
    """Image k is of class `choices[k mod len(choices)]`: (B,) int64."""
    return torch.tensor([choices[k % len(choices)] for k in indices])


def draw(
    denoiser: Denoiser,
    sampler: Sampler,
    *,
    indices: Sequence[int],
    image_size: int,
    num_steps: int,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    guidance: float = 0.0,
    on_step: Callable[[int], None] | None = None,
) -> Tensor:
    """Images number `indices` of `seed`: (B, C, H, W) float32 on the CPU, in [−1, 1] where the sampler clips.

    Args:
        classes: for a class-conditional network, the classes that the images take in turn; None: all of them.
        guidance: the weight w of classifier-free guidance. A network that takes it as an input is told it; another one
            is evaluated with and without the class.

    Raises:
        VdiffError: the network produced a value that is not finite.
    """
    config = denoiser.network.config
    device = next(denoiser.parameters()).device
    noise = ImageNoise(seed=seed, indices=indices, shape=(config.in_channels, image_size, image_size), device=device)
    labels = image_classes(indices, classes or range(config.num_classes)).to(device) if config.num_classes else None

    told = torch.full((len(indices),), guidance, device=device) if config.guidance_input else None
    guided = GuidedDenoiser(denoiser, guidance) if guidance and told is None else denoiser

    def denoise(z: Tensor, t: Tensor) -> Prediction:
        prediction: Prediction = guided(z, t, labels, told)
        return prediction

    was_training = denoiser.training
    denoiser.eval()
    try:
        with torch.inference_mode():
            images = sample(
                denoise, denoiser.schedule, sampler, z=noise(), num_steps=num_steps, noise=noise, on_step=on_step
            )
    except NonFiniteSampleError as error:
        raise VdiffError(
            f"the model draws no image: {error}", "use an earlier checkpoint, or train with a lower --lr"
        ) from None
    finally:
        denoiser.train(was_training)
    return images.cpu()
