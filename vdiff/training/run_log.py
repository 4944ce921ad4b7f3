"""The log of a run: scalars for a tracker, and grids of samples from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from vdiff.data.images import grid_picture, num_shown, prompt_picture, save_png
from vdiff.diffusion.noise import ImageNoise
from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.checks import build_sampler, default_guidance, without_limits
from vdiff.models.condition import IMAGE
from vdiff.models.denoiser import Denoiser, device_of
from vdiff.models.drawing import Conditions, classes_in_turn, draw, draw_from
from vdiff.records import LOG_FOLDER, SAMPLES_FOLDER
from vdiff.reporting import Reporter
from vdiff.text import cause_of, plural
from vdiff.training.config import EVALUATIONS, LoopConfig
from vdiff.training.sample_prompts import SamplePrompts

MAX_PREVIEW_STEPS = 32
FEWEST_SAMPLES, FEWEST_STEPS = 4, 8
PICTURE_SHARE = 10
PROMPTS_AT_ONCE = 4


class RunLog:
    """Logs scalars and grids of samples to a tracker (TensorBoard in `log/`, wandb, mlflow), and grids to `samples/`.

    If a tracker fails after its start, the run continues without it.

    Args:
        tracker: one of TRACKERS.
        step: the first update. TensorBoard drops values after it; the other trackers continue the run of that name.

    Raises:
        OptionError: the tracker does not start.
    """

    def __init__(self, folder: Path, tracker: str, *, step: int, reporter: Reporter) -> None:
        self.samples, self.reporter = make_folder(folder / SAMPLES_FOLDER), reporter
        try:
            self.tracker = _tracker_of(tracker, folder, step)
            if self.tracker is not None:
                self.tracker.start()
        except VdiffError:
            raise
        except Exception as error:  # whatever a server or a package raises
            raise OptionError(f"--tracker {tracker}: {cause_of(error)}", "correct it, or give --tracker none") from None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self._call("log", dict(values), step=step)

    def picture(self, picture: PIL.Image.Image, step: int) -> None:
        """Save a picture of samples, and log it if the tracker accepts pictures."""
        save_png(picture, self.samples / f"{step:07d}.png")
        if hasattr(self.tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
            pixels = np.asarray(picture.convert("RGB"))[None]
            self._call("log_images", {"samples": pixels}, step=step, **layout)

    def close(self) -> None:
        """Write out what is pending."""
        self._call("finish")

    def _call(self, name: str, *args: Any, **options: Any) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, name)(*args, **options)
        except Exception as error:  # whatever a server or a package raises
            self.tracker = None
            self.reporter.line(f"the tracker failed, so nothing more is logged ({cause_of(error)})")


def _tracker_of(tracker: str, folder: Path, step: int) -> Any:
    """A tracker of Accelerate; None for `none`."""
    from accelerate import tracking

    if tracker == "none":
        return None
    if tracker == "tensorboard":
        make_folder(folder / LOG_FOLDER)
        return tracking.TensorBoardTracker(LOG_FOLDER, logging_dir=folder, purge_step=step + 1)
    name = folder.resolve().name
    if tracker == "wandb":
        return tracking.WandBTracker("vdiff", name=name, id=name, resume="allow")
    return tracking.MLflowTracker("vdiff", run_name=name)


def preview(
    denoiser: Denoiser,
    description: CheckpointConfig,
    prompts: SamplePrompts | None = None,
    *,
    conditions: Conditions = classes_in_turn,
    num: int,
    steps: int,
    seed: int,
    title: str,
    on_step: Callable[[int], None],
) -> PIL.Image.Image:
    """A grid of samples, always from the same noise: DDIM for a few-step student, else DPM-Solver++ (2M).

    Args:
        prompts: of a text-to-image model, whose samples have its usual guidance.
        conditions: of any other model; a condition image is shown on the left of its sample.
        num, steps: the samples, and the network evaluations for each of them; see `preview_size`.
        title: the beginning of the picture's title, before steps and seed.
        on_step: called after each step with the number of finished steps.
    """
    names = description.class_names
    name = "ddim" if _is_few_step_student(description) else "dpmpp_2m"
    sampler = build_sampler(name, without_limits(description, name, {}))  # latents are not clipped
    title = f"{title} · {plural(steps, 'step')} · seed {seed}"
    if prompts is None or not prompts.texts:
        size = description.shape[1:]
        images = draw(
            denoiser, sampler, indices=range(num), image_size=size, num_steps=steps, seed=seed, on_step=on_step,
            conditions=conditions,
        )  # fmt: skip
        if (given := conditions(denoiser, range(num)).tensors.get(IMAGE)) is not None:
            images = torch.cat([given, images], dim=-1)
        images = prompts.decode(images) if prompts else images
        shown = [names[k % len(names)] for k in range(num)] if names else []
        return grid_picture(description.space.pictures(images), shown, len(names), title=title)
    texts, prompting, takes = prompts.texts[:num], prompts.prompting, denoiser.network.signature.names
    guidance, pictures = default_guidance(description), []
    for first in range(0, len(texts), PROMPTS_AT_ONCE):
        some = texts[first : first + PROMPTS_AT_ONCE]
        indices, device = range(first, first + len(some)), device_of(denoiser)
        noise = ImageNoise(seed=seed, indices=indices, shape=description.shape, device=device)
        latents = draw_from(
            denoiser, sampler, noise=noise, num_steps=steps, condition=prompting.condition(takes, some),
            guidance=guidance, on_step=on_step,
        )  # fmt: skip
        pictures.append(prompting.decode(latents, check=False))
    title += f" · guidance {guidance:g}" if guidance else ""
    return prompt_picture(torch.cat(pictures), texts, title)


def preview_size(
    config: LoopConfig, description: CheckpointConfig, prompts: SamplePrompts | None = None
) -> tuple[int, int, bool]:
    """The samples of a grid and the steps of each; and whether a short run made them fewer than usual.

    All grids of a run take at most 1/`PICTURE_SHARE` of its network evaluations, down to `FEWEST_SAMPLES` and
    `FEWEST_STEPS`. A few-step student uses its own steps, every other model `preview_steps`. Prompts of a file all get
    a sample.
    """
    num = usual = num_shown(64 if max(description.shape[1:], default=0) <= 32 else 16, len(description.class_names))
    steps = usual_steps = preview_steps(description)
    pictures = config.num_iters // config.sample_interval + 2  # the first one and the last one, too
    budget = config.num_iters * config.batch_size * EVALUATIONS / PICTURE_SHARE / pictures
    if prompts is not None and prompts.texts:
        num = usual = len(prompts.texts)
        budget /= 2 if default_guidance(description) else 1
    is_fixed = bool(config.sample_prompts)
    while num * steps > budget and num > FEWEST_SAMPLES and not is_fixed:
        num = max(FEWEST_SAMPLES, num // 2)
    while num * steps > budget and steps > FEWEST_STEPS and not _is_few_step_student(description):
        steps = preview_steps(description, max(FEWEST_STEPS, steps // 2))
    return num, steps, (num, steps) != (usual, usual_steps)


def preview_steps(description: CheckpointConfig, most: int = MAX_PREVIEW_STEPS) -> int:
    """The largest number of steps up to `most` that the model can take, at most its own."""
    own = description.num_timesteps
    return next(n for n in range(min(own, most), 0, -1) if description.takes_any_num_steps or own % n == 0)


def _is_few_step_student(description: CheckpointConfig) -> bool:
    return description.is_distilled and description.num_timesteps <= MAX_PREVIEW_STEPS
