"""What a run shows while it runs: scalars for a tracker, and grids of samples from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from vdiff.data.images import grid_picture, num_shown, save_png
from vdiff.diffusion.multistep import Dpmpp2m
from vdiff.diffusion.samplers import Ddim
from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser
from vdiff.records import LOG_FOLDER, SAMPLES_FOLDER
from vdiff.reporting import Reporter
from vdiff.text import cause_of, plural

MAX_PREVIEW_STEPS = 32


class RunLog:
    """Grids of samples in `samples/`; both they and scalars go to a tracker (TensorBoard in `log/`, wandb, mlflow).

    A tracker that fails later than at its start is not used any more, and the run continues.

    Args:
        tracker: one of TRACKERS.
        step: the update that the run begins at. TensorBoard drops what lies beyond it; the others continue with the run
            of that name.

    Raises:
        OptionError: the tracker's package is not installed, or it does not start.
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
        """Keep a picture of samples, and log it where the tracker takes pictures."""
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
            self.reporter.line(f"nothing more is logged: the tracker failed ({cause_of(error)})")


def _tracker_of(tracker: str, folder: Path, step: int) -> Any:
    """A tracker of Accelerate's; None for `none`."""
    from accelerate import tracking

    if tracker == "none":
        return None
    if tracker == "tensorboard":
        make_folder(folder / LOG_FOLDER)
        return tracking.TensorBoardTracker(LOG_FOLDER, logging_dir=folder, purge_step=step + 1)
    name = folder.resolve().name
    available = {"wandb": tracking.is_wandb_available, "mlflow": tracking.is_mlflow_available}
    if not available[tracker]():
        raise OptionError(f"--tracker {tracker}: the package is not installed", f"pip install {tracker}")
    if tracker == "wandb":
        return tracking.WandBTracker("vdiff", name=name, id=name, resume="allow")
    return tracking.MLflowTracker("vdiff", run_name=name)


def preview(
    denoiser: Denoiser, description: CheckpointConfig, *, seed: int, title: str, on_step: Callable[[int], None]
) -> PIL.Image.Image:
    """A grid of samples from the same noise every time, in at most `MAX_PREVIEW_STEPS` network evaluations each.

    A student of few steps takes its own, by DDIM; every other model takes `preview_steps` of DPM-Solver++ (2M).

    Args:
        title: what the picture says before steps and seed.
        on_step: told after each step how many are done.
    """
    from vdiff.models.drawing import draw

    names, steps = description.class_names, preview_steps(description)
    is_few_step_student = description.is_distilled and description.num_timesteps <= MAX_PREVIEW_STEPS
    indices = range(num_shown(64 if description.image_size <= 32 else 16, len(names)))
    images = draw(
        denoiser,
        Ddim() if is_few_step_student else Dpmpp2m(),
        indices=indices,
        image_size=description.shape[1:],
        num_steps=steps,
        seed=seed,
        on_step=on_step,
    )
    shown = [names[k % len(names)] for k in indices] if names else []
    return grid_picture(images, shown, len(names), title=f"{title} · {plural(steps, 'step')} · seed {seed}")


def preview_steps(description: CheckpointConfig) -> int:
    """The largest number of steps up to `MAX_PREVIEW_STEPS` that the model can take, at most its own."""
    own = description.num_timesteps
    steps = range(min(own, MAX_PREVIEW_STEPS), 0, -1)
    return next(n for n in steps if description.takes_any_num_steps or own % n == 0)
