"""What a run shows while it goes on: scalars for TensorBoard, and grids of samples from fixed noise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vdiff.data.images import cell_scale, make_grid, save_png, to_uint8
from vdiff.diffusion.samplers import Ddim
from vdiff.files import make_folder
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser

MAX_PREVIEW_STEPS = 64


class Records:
    """TensorBoard scalars in `log/`, pictures in `samples/`; what lies there beyond `step` is dropped on resuming."""

    def __init__(self, folder: Path, *, step: int) -> None:
        from accelerate.tracking import TensorBoardTracker

        self.samples = make_folder(folder / "samples")
        make_folder(folder / "log")
        self.tracker = TensorBoardTracker("log", logging_dir=folder, purge_step=step + 1)
        self.tracker.start()

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log numbers."""
        self.tracker.log(dict(values), step=step)

    def pictures(self, images: Tensor, step: int) -> None:
        """Keep (B, C, H, W) images in [−1, 1] as a square grid."""
        grid = make_grid(images, columns=round(len(images) ** 0.5), scale=cell_scale(images))
        save_png(grid, self.samples / f"{step:07d}.png")
        self.tracker.writer.add_image("samples", to_uint8(grid), step)

    def close(self) -> None:
        """Write out what is pending."""
        self.tracker.finish()


def preview(denoiser: Denoiser, description: CheckpointConfig, *, seed: int) -> Tensor:
    """Images from the same noise every time, by DDIM in at most 64 of the model's steps."""
    from vdiff.models.drawing import draw

    count = 64 if description.image_size <= 32 else 16
    return draw(
        denoiser,
        Ddim(),
        indices=range(count),
        image_size=description.image_size,
        num_steps=preview_steps(description.num_timesteps),
        seed=seed,
    )


def preview_steps(num_timesteps: int) -> int:
    """The largest number of steps up to 64 that divides `num_timesteps`."""
    return next(steps for steps in range(MAX_PREVIEW_STEPS, 0, -1) if num_timesteps % steps == 0)
