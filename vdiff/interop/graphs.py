"""Graphs for export and their metadata, the check of exported graphs against vdiff, and torch.export.

Times and coefficients of a sampler are constants of its graph, computed in float64. The check compares with `denoiser`
and `draw`, not with the exported modules, which might be wrong themselves.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

import vdiff
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.parameterisation import Parameterisation, Vp
from vdiff.diffusion.prediction import MIN_SIGNAL, Prediction, from_v, from_x
from vdiff.diffusion.samplers import Ddim, ddim_step
from vdiff.diffusion.schedules import alpha_sigma, coefficient, grid_angles, grid_times
from vdiff.errors import VdiffError
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import PIXEL_CODEC
from vdiff.models.condition import CLASSES, GUIDANCE, TEXT, Condition
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import classes_in_turn, draw
from vdiff.models.program import write_program
from vdiff.models.text import TextBackbone

MAX_STEPS, MAX_GRID = 64, 1024
"""Most steps of a sampler's graph, where each is a copy of the network, and of a grid in the metadata."""
TOLERANCE = 1e-4
ROUNDED = 1.0
"""The limit for weights of fewer bits, half the range of an image: single pixels may move far."""
BATCHES = (range(3), range(3, 4))
"""The images that a check draws: two batches of different sizes, to find graphs that fix the batch size."""


@dataclass(frozen=True)
class GraphOptions:
    """The options of a graph.

    Attributes:
        sampler: noise → images; off: one evaluation, (z, label) → `output`.
        output: "v", "x" or "eps".
        num_steps: of the sampler, or of the grid in an evaluation's metadata.
        clipping_value: predicted images are clipped to ± this value in each step of the sampler; None: no clip.
        guided: the sampler evaluates the network with and without the class, and takes the guidance weight.
        precision: of the stored weights, "fp32", "fp16" or "int8"; other than fp32 only in ONNX.
    """

    sampler: bool
    output: str
    num_steps: int
    clipping_value: float | None = 1.0
    guided: bool = False
    precision: str = "fp32"

    @property
    def results(self) -> str:
        """The output's name."""
        return "images" if self.sampler else self.output


class NetworkCall(nn.Module):
    """(z, label [, classes][, guidance]) → v̂, x̂ or ε̂, as `output` says.

    z (B, C, H, W), label (B,) = the network's timestep, classes (B,) int64, guidance (B,).
    """

    def __init__(self, denoiser: Denoiser, output: str) -> None:
        super().__init__()
        self.network = denoiser.network
        self.schedule = denoiser.schedule
        self.parameterisation = denoiser.parameterisation
        self.output = output

    def forward(
        self, z: Tensor, label: Tensor, classes: Tensor | None = None, guidance: Tensor | None = None
    ) -> Tensor:
        condition = Condition().with_tensors(classes=classes, guidance=guidance)
        angle = self.parameterisation.angle_of_timestep(self.schedule, label)
        output: Tensor = self.network(self.parameterisation.state(z, angle), label, **condition.tensors)
        if self.parameterisation.prediction == self.output:
            return output
        prediction = _read(self.parameterisation, z, output, angle)
        return {"v": prediction.v, "x": prediction.x, "eps": prediction.eps}[self.output]


class Step(nn.Module):
    """(z, label, φ_t, φ_s [, classes][, guidance][, text]) → z_s, a DDIM step: label, angles (1,) of the whole batch.

    With `guided`, v̂ = (1 + w) v̂_c − w v̂_∅ of one batch of twice the size, as in `GuidedDenoiser`.
    """

    def __init__(self, denoiser: Denoiser, options: GraphOptions) -> None:
        super().__init__()
        self.network = denoiser.network
        self.parameterisation = denoiser.parameterisation
        self.clipping_value = options.clipping_value
        self.guided = options.guided

    def forward(
        self,
        z: Tensor,
        label: Tensor,
        angle_t: Tensor,
        angle_s: Tensor,
        classes: Tensor | None = None,
        guidance: Tensor | None = None,
        text: Tensor | None = None,
    ) -> Tensor:
        if self.guided:
            prediction = self._guided(z, label, angle_t, classes, guidance)
        else:
            condition = Condition().with_tensors(classes=classes, guidance=guidance, text=text)
            output = self.network(self.parameterisation.state(z, angle_t), label, **condition.tensors)
            prediction = _read(self.parameterisation, z, output, angle_t)
        if self.clipping_value is not None:
            prediction = prediction.clip(z, angle_t, self.clipping_value)
        return ddim_step(z, prediction.v, angle_t, angle_s)

    def _guided(
        self, z: Tensor, label: Tensor, angle: Tensor, classes: Tensor | None, guidance: Tensor | None
    ) -> Prediction:
        """Classifier-free guidance with a weight for each image."""
        assert classes is not None
        assert guidance is not None
        condition = self.network.signature.condition(classes=classes)
        twice = torch.cat([z, z])
        state = self.parameterisation.state(twice, angle)
        output = self.network(state, label, **condition.cat(condition.drop()).tensors)
        both = _read(self.parameterisation, twice, output, angle).v
        v, v_none = both[: z.shape[0]], both[z.shape[0] :]  # `chunk` would fix the batch size
        w = coefficient(guidance, z)
        return from_v(z, (1 + w) * v - w * v_none, angle)


class FewSteps(nn.Module):
    """(noise [, classes][, guidance]) → images in [−1, 1], by `num_steps` steps of DDIM."""

    def __init__(self, denoiser: Denoiser, options: GraphOptions) -> None:
        super().__init__()
        self.step = Step(denoiser, options)
        steps = grid(denoiser, options.num_steps)
        for name in steps[0]:
            self.register_buffer(name, torch.stack([values[name] for values in steps]))

    def forward(self, noise: Tensor, classes: Tensor | None = None, guidance: Tensor | None = None) -> Tensor:
        z = noise
        label, angle_t, angle_s = (self.get_buffer(name) for name in ("label", "angle_t", "angle_s"))
        for i in range(len(label)):
            z = self.step(z, label[i], angle_t[i], angle_s[i], classes, guidance)
        return PIXEL_CODEC.clip(z)


def grid(denoiser: Denoiser, num_steps: int) -> list[dict[str, Tensor]]:
    """The constants of the steps t = 1, (N−1)/N, …: label (1,) float32, angle_t and angle_s (1,) float64."""
    times = grid_times(num_steps)
    angles = grid_angles(denoiser.schedule, times)
    labels = denoiser.parameterisation.timestep(denoiser.schedule, times).float()
    return [
        {"label": labels[i : i + 1], "angle_t": angles[i : i + 1], "angle_s": angles[i - 1 : i]}
        for i in range(num_steps, 0, -1)
    ]


def _read(parameterisation: Parameterisation, z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
    """The prediction in the network's output, without reading values, which do not exist during tracing.

    `from_eps` would read α to refuse zero signal; `check_exportable` does this beforehand.
    """
    if parameterisation != Vp("eps"):
        return parameterisation.read(z, output, angle)
    alpha, sigma = alpha_sigma(angle, z)
    return from_x(z, (z - sigma * output) / alpha, angle)


def metadata(denoiser: Denoiser, options: GraphOptions, config: CheckpointConfig, fingerprint: str) -> dict[str, str]:
    """The metadata of a file, as strings; other values are JSON.

    `grid` holds what a sampling loop in any language needs for each step, from t = 1 down: the label, and α and σ at
    both ends of the step. It is omitted above `MAX_GRID` steps.
    """
    takes = denoiser.network.signature
    schedule = denoiser.schedule
    values: dict[str, Any] = {
        "format": "vdiff sampler" if options.sampler else "vdiff evaluation",
        "vdiff_version": vdiff.__version__,
        "fingerprint": fingerprint,
        "num_steps": options.num_steps,
        "schedule": schedule.to_dict(),
        "label": denoiser.parameterisation.describe(schedule),
        "prediction": config.prediction,
        "method": config.method,
        "image_size": config.image_size,
        "channels": takes.channels,
        "class_names": config.class_names,
        "num_classes": takes.num_classes,
        "no_class": takes.null.get(CLASSES),
        "guidance_range": config.guidance_range,
    }
    if options.sampler:
        values |= {"sampler": "ddim", "clipping_value": options.clipping_value, "guided": options.guided}
    elif options.num_steps <= MAX_GRID:
        coefficients = (("alpha", torch.cos), ("sigma", torch.sin))
        values["grid"] = [
            {
                "label": float(step["label"]),
                **{f"{name}_{end}": float(of(step[f"angle_{end}"])) for end in "ts" for name, of in coefficients},
            }
            for step in grid(denoiser, options.num_steps)
        ]
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False) for key, value in values.items()
    }


# Checks


def check_exportable(denoiser: Denoiser, takes: Collection[str] = (CLASSES, GUIDANCE)) -> None:
    """Refuse an ε-prediction with zero signal at t = 1, and a network with inputs that graphs lack.

    Args:
        takes: the conditions that graphs have as inputs.

    Raises:
        VdiffError: the model is one of these.
    """
    if others := [name for name in denoiser.network.signature.names if name not in takes]:
        raise VdiffError(
            f"graphs have no input for this network's {', '.join(others).replace('_', ' ')}",
            "draw with vdiff.load in Python",
        )
    last = denoiser.schedule.angle(torch.ones(1, dtype=torch.float64))
    if denoiser.parameterisation.predicts_noise and float(last.cos()) < MIN_SIGNAL:
        raise VdiffError(
            "this model predicts eps, which carries no information about the image at this schedule's zero signal",
            "export a model that predicts v, x or both",
        )


def inputs(denoiser: Denoiser, options: GraphOptions, config: CheckpointConfig, images: range) -> dict[str, Tensor]:
    """Inputs of the graph by name: noise of images `images` of seed 0, with times and classes over their whole range.

    The guidance weight is that of `_test_guidance`.
    """
    takes = denoiser.network.signature
    count = len(images)
    noise = ImageNoise(seed=0, indices=images, shape=config.shape)()
    steps = [] if options.sampler else grid(denoiser, options.num_steps)
    labels = [steps[k * len(steps) // count]["label"] for k in range(count if steps else 0)]
    values = {"noise": noise} if options.sampler else {"z": noise, "label": torch.cat(labels)}
    if takes.num_classes:
        values["classes"] = torch.tensor([k % takes.num_classes for k in images])
    if takes.takes_guidance or options.guided:
        values["guidance"] = torch.full((count,), _test_guidance(config))
    if isinstance(denoiser.network, TextBackbone):
        values["text"] = _test_text(denoiser.network, images)
    return values


def _test_text(network: TextBackbone, images: range) -> Tensor:
    """Embeddings of some tokens for the check, other ones for each image."""
    config: Any = network.text_encoders[0].config
    length = len(network.empty_tokens)
    with torch.no_grad():
        return network.embed(torch.tensor([[(7 * k + i) % config.vocab_size for i in range(length)] for k in images]))[
            TEXT
        ]


def _test_guidance(config: CheckpointConfig) -> float:
    """A guidance weight for the check: the middle of the network's range, or 1.5."""
    return sum(config.guidance_range) / 2 if config.guidance_range else 1.5


def expected(denoiser: Denoiser, options: GraphOptions, config: CheckpointConfig, images: range) -> Tensor:
    """vdiff's own result for `inputs`."""
    given = inputs(denoiser, options, config, images)
    if options.sampler:
        drawn = draw(
            denoiser,
            Ddim(clipping_value=options.clipping_value),
            indices=images,
            image_size=config.shape[1:],
            num_steps=options.num_steps,
            guidance=_test_guidance(config) if "guidance" in given else 0.0,
            conditions=(lambda *_: denoiser.condition(text=given["text"])) if "text" in given else classes_in_turn,
        )
        return config.space.clip(drawn)
    t = denoiser.schedule.time(denoiser.parameterisation.angle_of_timestep(denoiser.schedule, given["label"]))
    with torch.inference_mode():
        prediction = denoiser(given["z"], t, denoiser.condition(**given))
    return {"v": prediction.v, "x": prediction.x, "eps": prediction.eps}[options.output].clone()


def check(
    answer: Callable[[dict[str, Tensor]], Tensor], denoiser: Denoiser, options: GraphOptions, config: CheckpointConfig
) -> float:
    """The largest difference between the results of an exported graph and vdiff, in units of the images (or of the
    largest value, if that is above 1).

    Args:
        answer: runs the exported graph on named inputs.

    Raises:
        VdiffError: it is above `TOLERANCE` (`ROUNDED` for weights of fewer bits).
    """
    pairs = (
        (inputs(denoiser, options, config, images), expected(denoiser, options, config, images)) for images in BATCHES
    )
    return largest_difference(answer, pairs, options.precision)


def largest_difference(
    answer: Callable[[dict[str, Tensor]], Tensor], pairs: Iterable[tuple[dict[str, Tensor], Tensor]], precision: str
) -> float:
    """The largest difference between results of a graph and those of `pairs` (inputs, results), as in `check`.

    Raises:
        VdiffError: it is above `TOLERANCE` (`ROUNDED` for weights of fewer bits).
    """
    differences = []
    for given, due in pairs:
        found = answer(given)
        if found.shape != due.shape:
            raise VdiffError(
                f"the exported graph returns shape {tuple(found.shape)}, not {tuple(due.shape)}",
                "nothing was written; please report this with the checkpoint's config.json",
            )
        scale = due.abs().max().clamp(min=1).double()
        differences.append((found.double() - due.double()).abs().max() / scale)
    worst = float(torch.stack(differences).max())
    limit = TOLERANCE if precision == "fp32" else ROUNDED
    if not worst <= limit:  # also true for NaN
        raise VdiffError(
            f"the exported graph differs from vdiff by {worst:.1e}, more than {limit:g}",
            "nothing was written; please report this with the checkpoint's config.json",
        )
    return worst


def export_torch(
    denoiser: Denoiser, config: CheckpointConfig, options: GraphOptions, path: Path, *, fingerprint: str
) -> float:
    """Write the program to `path`, whole or not at all; returns the difference of the reloaded program to vdiff.

    The inputs are those of `NetworkCall` and `FewSteps`, by keyword, for any batch size; `metadata` becomes the extra
    file `vdiff.json`.

    Raises:
        VdiffError: the results differ, or the file system refuses.
    """
    module = FewSteps(denoiser, options) if options.sampler else NetworkCall(denoiser, options.output)
    example = inputs(denoiser, options, config, range(2))

    def compare(program: nn.Module) -> float:
        return check(lambda named: cast(Tensor, program(**named)), denoiser, options, config)

    return write_program(module, example, metadata(denoiser, options, config, fingerprint), path, compare)
