"""Whether an exported graph computes what vdiff computes, from the same inputs.

Its answers are compared with those of `denoiser` and `draw`, not with those of the modules that were exported, which
might be wrong themselves.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.prediction import MIN_SIGNAL
from vdiff.diffusion.samplers import Ddim
from vdiff.errors import VdiffError
from vdiff.interop.graphs import GraphOptions, grid
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import draw

TOLERANCE = 1e-4
BATCHES = (range(3), range(3, 4))
"""The numbers of the images that a check draws: two batches, since exported graphs are easily fixed to one size."""


def check_exportable(denoiser: Denoiser) -> None:
    """Refuse an ε-prediction whose schedule ends at zero signal.

    Raises:
        VdiffError: it does.
    """
    last = denoiser.schedule.angle(torch.ones(1, dtype=torch.float64))
    if denoiser.prediction_type == "eps" and float(last.cos()) < MIN_SIGNAL:
        raise VdiffError(
            "this model predicts eps and its schedule ends at zero signal, where that says nothing about the image",
            "export a model that predicts v, x or both",
        )


def inputs(denoiser: Denoiser, options: GraphOptions, config: CheckpointConfig, images: range) -> dict[str, Tensor]:
    """Inputs of the graph by name: the noise of images `images` of seed 0, at times or of classes all over their range.

    What guidance is given stands in `_told_guidance`.
    """
    unet = denoiser.network.config
    count = len(images)
    noise = ImageNoise(seed=0, indices=images, shape=(unet.in_channels, config.image_size, config.image_size))()
    values = {"noise": noise} if options.sampler else {"z": noise, "label": _labels(denoiser, options, count)}
    if unet.num_classes:
        values["classes"] = torch.tensor([k % unet.num_classes for k in images])
    if unet.guidance_input or options.guided:
        values["guidance"] = torch.full((count,), _told_guidance(config))
    return values


def _labels(denoiser: Denoiser, options: GraphOptions, count: int) -> Tensor:
    """Labels of `count` times of the grid, from t = 1 downwards."""
    told = grid(denoiser, options.num_steps)
    return torch.cat([told[k * len(told) // count]["label"] for k in range(count)])


def _told_guidance(config: CheckpointConfig) -> float:
    """A weight of guidance to check with: the middle of those that the network knows, or 1.5."""
    return sum(config.guidance_range) / 2 if config.guidance_range else 1.5


def expected(denoiser: Denoiser, options: GraphOptions, config: CheckpointConfig, images: range) -> Tensor:
    """What vdiff itself answers to `inputs`."""
    told = inputs(denoiser, options, config, images)
    if options.sampler:
        drawn = draw(
            denoiser,
            Ddim(clipping_value=options.clipping_value),
            indices=images,
            image_size=config.image_size,
            num_steps=options.num_steps,
            guidance=_told_guidance(config) if "guidance" in told else 0.0,
        )
        return drawn.clamp(-1, 1)
    t = (told["label"].double() + 1) / denoiser.schedule.label_scale
    with torch.inference_mode():
        prediction = denoiser(told["z"], t, told.get("classes"), told.get("guidance"))
    return {"v": prediction.v, "x": prediction.x, "eps": prediction.eps}[options.output].clone()


def check(
    answer: Callable[[dict[str, Tensor]], Tensor], denoiser: Denoiser, options: GraphOptions, config: CheckpointConfig
) -> float:
    """The largest difference between what an exported graph and vdiff answer, in units of the images (or of the
    largest value, where that is above 1).

    Args:
        answer: runs the exported graph on named inputs.

    Raises:
        VdiffError: it is above `TOLERANCE`.
    """
    differences = []
    for images in BATCHES:
        due = expected(denoiser, options, config, images)
        found = answer(inputs(denoiser, options, config, images))
        if found.shape != due.shape:
            raise VdiffError(
                f"the exported graph answers {tuple(found.shape)} where {tuple(due.shape)} is due",
                "nothing was written; please report this with the checkpoint's config.json",
            )
        scale = due.abs().max().clamp(min=1).double()
        differences.append((found.double() - due.double()).abs().max() / scale)
    worst = float(torch.stack(differences).max())
    if not worst <= TOLERANCE:  # NaN is no agreement either
        raise VdiffError(
            f"the exported graph differs from vdiff by {worst:.1e}, more than {TOLERANCE:g}",
            "nothing was written; please report this with the checkpoint's config.json",
        )
    return worst
