"""What a run shows while it goes on: scalars for TensorBoard, and grids of samples from fixed noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from vdiff.data.images import cell_scale, make_grid, save_png, to_uint8
from vdiff.diffusion.multistep import Dpmpp2m
from vdiff.diffusion.samplers import Ddim
from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser
from vdiff.records import LOG_FOLDER, SAMPLES_FOLDER
from vdiff.reporting import Reporter
from vdiff.text import cause_of

MAX_PREVIEW_STEPS = 32


class Records(Protocol):
    """Where a run's scalars and pictures go."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""

    def pictures(self, images: Tensor, step: int) -> None:
        """Keep (B, C, H, W) images in [−1, 1] as a square grid."""

    def close(self) -> None:
        """Write out what is pending."""


class Pictures:
    """Pictures in `samples/` alone; the scalars are not kept."""

    def __init__(self, folder: Path) -> None:
        self.samples = make_folder(folder / SAMPLES_FOLDER)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Nothing."""

    def pictures(self, images: Tensor, step: int) -> None:
        """Write the grid as a PNG file."""
        save_png(_square(images), self.samples / f"{step:07d}.png")

    def close(self) -> None:
        """Nothing."""


class Tracked(Pictures):
    """Pictures in `samples/`, and everything to a tracker of Accelerate's: TensorBoard (in `log/`), wandb or mlflow.

    TensorBoard drops what lies there beyond `step` when a run is resumed; the others go on with the run of that name.
    A tracker that fails later than at its start is not used any more, and the run goes on.
    """

    def __init__(self, folder: Path, tracker: Any, reporter: Reporter) -> None:
        super().__init__(folder)
        self.tracker, self.reporter = tracker, reporter
        self.tracker.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self._tell("log", dict(values), step=step)

    def pictures(self, images: Tensor, step: int) -> None:
        """Write the grid as a PNG file, and log it where the tracker takes pictures."""
        super().pictures(images, step)
        if hasattr(self.tracker, "log_images"):
            pixels = to_uint8(_square(images)).permute(1, 2, 0)[None]
            layout = {"dataformats": "NHWC"} if self.tracker.name == "tensorboard" else {}
            self._tell("log_images", {"samples": pixels.expand(-1, -1, -1, 3).numpy()}, step=step, **layout)

    def close(self) -> None:
        """Write out what is pending."""
        self._tell("finish")

    def _tell(self, what: str, *args: Any, **options: Any) -> None:
        if self.tracker is None:
            return
        try:
            getattr(self.tracker, what)(*args, **options)
        except Exception as error:  # whatever a server or a package raises
            self.tracker = None
            self.reporter.line(f"nothing more is logged: the tracker failed ({cause_of(error)})")


def open_records(tracker: str, folder: Path, *, step: int, reporter: Reporter) -> Records:
    """The records of a run that begins at `step` (0, unless it is resumed); `tracker` is one of TRACKERS.

    Raises:
        OptionError: the tracker's package is not installed, or it does not start.
    """
    try:
        return _open_records(tracker, folder, step, reporter)
    except VdiffError:
        raise
    except Exception as error:
        raise OptionError(f"--tracker {tracker}: {cause_of(error)}", "mend that, or give --tracker none") from None


def _open_records(tracker: str, folder: Path, step: int, reporter: Reporter) -> Records:
    from accelerate import tracking

    if tracker == "none":
        return Pictures(folder)
    if tracker == "tensorboard":
        make_folder(folder / LOG_FOLDER)
        return Tracked(
            folder, tracking.TensorBoardTracker(LOG_FOLDER, logging_dir=folder, purge_step=step + 1), reporter
        )
    name = folder.resolve().name
    available = {"wandb": tracking.is_wandb_available, "mlflow": tracking.is_mlflow_available}
    if not available[tracker]():
        raise OptionError(f"--tracker {tracker}: the package is not installed", f"pip install {tracker}")
    if tracker == "wandb":
        return Tracked(folder, tracking.WandBTracker("vdiff", name=name, id=name, resume="allow"), reporter)
    return Tracked(folder, tracking.MLflowTracker("vdiff", run_name=name), reporter)


def _square(images: Tensor) -> Tensor:
    """(B, C, H, W) images as one square grid, enlarged for people to see."""
    return make_grid(images, columns=round(len(images) ** 0.5), scale=cell_scale(images))


def preview(
    denoiser: Denoiser, description: CheckpointConfig, *, seed: int, on_step: Callable[[int], None] | None = None
) -> Tensor:
    """Images (B, C, H, W) from the same noise every time, in at most `MAX_PREVIEW_STEPS` network evaluations each.

    A student of few steps takes its own, by DDIM; every other model takes `preview_steps` of DPM-Solver++ (2M).

    Args:
        on_step: told after each step how many are done.
    """
    from vdiff.models.drawing import draw

    is_few_step_student = description.is_distilled and description.num_timesteps <= MAX_PREVIEW_STEPS
    return draw(
        denoiser,
        Ddim() if is_few_step_student else Dpmpp2m(),
        indices=range(64 if description.image_size <= 32 else 16),
        image_size=description.image_size,
        num_steps=preview_steps(description),
        seed=seed,
        on_step=on_step,
    )


def preview_steps(description: CheckpointConfig) -> int:
    """The largest number of steps up to `MAX_PREVIEW_STEPS` that the model can take, at most its own."""
    own = description.num_timesteps
    steps = range(min(own, MAX_PREVIEW_STEPS), 0, -1)
    return next(n for n in steps if description.takes_any_num_steps or own % n == 0)
