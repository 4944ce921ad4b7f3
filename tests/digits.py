"""scikit-learn's digits as a dataset, for tests that need pictures of something."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import PIL.Image
from sklearn.datasets import load_digits

from vdiff.data.store import DatasetMeta, StoreWriter

SIDE = 8


def write_digits(folder: Path, *, count: int = 1797, classes: Sequence[str] = tuple("0123456789")) -> Path:
    """The first `count` digits, 8 × 8 and grey; without `classes` nobody says which is which."""
    folder.mkdir(parents=True)
    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)
    meta = DatasetMeta("digits", (SIDE,), 1, class_names=tuple(classes))
    writer = StoreWriter(folder, meta)
    for image, label in zip(pixels[:count], digits.target[:count], strict=True):
        PIL.Image.fromarray(image).save(buffer := io.BytesIO(), format="PNG")
        writer.add({SIDE: buffer.getvalue()}, int(label) if classes else None)
    writer.finish({"images": count})
    return folder
