"""A folder of samples: one PNG file an image, a grid, and a record of how they were drawn.

The record is written first, each image whole or not at all, so the same call goes on where an earlier one was cut, and
images drawn in different ways never mix.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vdiff.data.images import cell_scale, from_uint8, make_grid, save_png
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import Interrupted, VdiffError
from vdiff.files import make_folder, remove, write_text
from vdiff.models.checkpoint import load_checkpoint
from vdiff.models.drawing import draw
from vdiff.reporting import Reporter

RECORD, GRID = "samples.json", "grid.png"
MAX_GRID = 64


@dataclass(frozen=True)
class Order:
    """All that decides what image k looks like.

    Attributes:
        checkpoint, fingerprint: the model's folder, and the SHA-256 of its weights.
        sampler, options: the sampler's name and the parameters that differ from its defaults.
        num_steps: network evaluations an image.
        classes: numbers that the images take in turn; empty for an unconditional model.
    """

    checkpoint: str
    fingerprint: str
    sampler: str
    options: dict[str, Any]
    num_steps: int
    seed: int
    classes: list[int]


def image_path(folder: Path, index: int) -> Path:
    """`00007.png`: image `index`."""
    return folder / f"{index:05d}.png"


def draw_folder(
    order: Order,
    folder: Path,
    *,
    num: int,
    batch_size: int,
    device: torch.device,
    overwrite: bool,
    reporter: Reporter,
) -> str:
    """Draw images 0 … num − 1 that are not in `folder` yet, then the grid; answer one line about it.

    Raises:
        Interrupted: a signal came; what was drawn is kept.
        VdiffError: the folder holds something else, the model cannot be read or draws no finite image.
    """
    anew = _begins_anew(order, folder, overwrite=overwrite)
    missing = [k for k in range(num) if anew or not image_path(folder, k).exists()]
    if not missing and (folder / GRID).exists():
        return f"{folder} holds all {num} images already"
    began = time.monotonic()
    denoiser, config = load_checkpoint(Path(order.checkpoint), device)  # before anything is replaced: it may be damaged
    if anew:
        if folder.exists():
            remove(folder)
        write_text(make_folder(folder) / RECORD, json.dumps(asdict(order), indent=2) + "\n")
    remove(folder / GRID)  # one of fewer images must not pass for that of all, should this call be cut
    sampler = SAMPLERS[order.sampler](**order.options)
    done = num - len(missing)
    try:
        with reporter.progress(folder.name, num, "images", start=done) as bar:
            for first in range(0, len(missing), batch_size):
                indices = missing[first : first + batch_size]
                images = draw(
                    denoiser,
                    sampler,
                    indices=indices,
                    image_size=config.image_size,
                    num_steps=order.num_steps,
                    seed=order.seed,
                    classes=order.classes,
                    on_step=lambda step, done=done: bar.update(done, f"step {step}/{order.num_steps}"),  # type: ignore[misc]
                )
                for index, image in zip(indices, images, strict=True):
                    save_png(image, image_path(folder, index))
                    done += 1
                bar.update(done)
        save_png(_grid(folder, num), folder / GRID)
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
        held = sum(image_path(folder, k).exists() for k in range(num))
        raise Interrupted(f"stopped: {folder} holds {held} of {num} images; the same command goes on", code) from None
    seconds = max(time.monotonic() - began, 1e-9)
    evaluations = f"{order.num_steps} evaluation{'s' if order.num_steps > 1 else ''}"
    return (
        f"{len(missing)} images in {seconds:.1f} s ({len(missing) / seconds:.3g}/s), "
        f"{order.sampler}, {evaluations} each, to {folder}"
    )


def _begins_anew(order: Order, folder: Path, *, overwrite: bool) -> bool:
    """Whether the folder is to be made or replaced; one that is to be filled up was drawn the same way.

    Raises:
        VdiffError: it holds something else.
    """
    record = folder / RECORD
    if folder.exists() and not folder.is_dir():
        raise VdiffError(f"{folder} is a file, not a folder", "choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        if not record.is_file():
            raise VdiffError(f"{folder} is not empty and holds no {RECORD}", "choose another --out")
        if not overwrite:
            _check_same(order, record)
            return False
    return True


def _check_same(order: Order, record: Path) -> None:
    """Refuse to add images to others that were drawn in another way."""
    try:
        before = json.loads(record.read_text(encoding="utf-8"))
        differing = [key for key, value in asdict(order).items() if key != "checkpoint" and before[key] != value]
    except (ValueError, KeyError, TypeError):
        raise VdiffError(f"{record} cannot be read", "give --overwrite, or another --out") from None
    if differing:
        key = differing[0]
        shown = "other weights" if key == "fingerprint" else f"{key} {before[key]}, not {asdict(order)[key]}"
        raise VdiffError(f"{record.parent} holds images drawn with {shown}", "give --overwrite, or another --out")


def _grid(folder: Path, num: int) -> Tensor:
    """The first images, as many as fit a square of 8 × 8, from their files."""
    count = min(num, MAX_GRID)
    pictures = []
    for k in range(count):
        try:
            with PIL.Image.open(image_path(folder, k)) as picture:
                array = np.array(picture)
        except (OSError, SyntaxError):  # Pillow's word for a broken PNG is SyntaxError
            raise VdiffError(
                f"{image_path(folder, k)} is damaged", "delete it, then give the same command again"
            ) from None
        pictures.append(from_uint8(torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))))
    images = torch.stack(pictures)
    return make_grid(images, columns=math.ceil(math.sqrt(count)), scale=cell_scale(images))
