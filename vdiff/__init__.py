"""vdiff: train a diffusion model, then distil it until 1 to 8 network evaluations draw an image.

>>> import vdiff
>>> vdiff.__version__.count(".")
2

`vdiff.load(checkpoint)` gives a model whose `sample` draws images; importing vdiff alone loads no torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from vdiff.api import Model

__version__ = "0.1.0"


def load(checkpoint: str | Path, *, device: str = "auto", precision: str = "auto", compiled: bool = False) -> Model:
    """The model in the folder `checkpoint`, ready to draw; see `vdiff.api.load`."""
    from vdiff.api import load

    return load(checkpoint, device=device, precision=precision, compiled=compiled)
