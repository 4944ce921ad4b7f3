"""Images as bytes: PNG files, plain pixels."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vdiff.data.images import from_uint8, to_pil, to_uint8


def png(image: Tensor) -> bytes:
    """An image in [−1, 1] as a PNG file."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, format="PNG")
    return buffer.getvalue()


def from_png(data: bytes) -> Tensor:
    """The inverse of `png`: (C, H, W) in [−1, 1]."""
    with PIL.Image.open(io.BytesIO(data)) as picture:
        array = np.array(picture)
    return from_uint8(torch.from_numpy(array[None] if array.ndim == 2 else array.transpose(2, 0, 1).copy()))


def pixels(image: Tensor) -> np.ndarray:
    """An image in [−1, 1] as (H, W, C) uint8."""
    return to_uint8(image).permute(1, 2, 0).contiguous().numpy()
