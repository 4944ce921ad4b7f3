"""vdiff: train a diffusion model, then distil it to sample in 1 to 8 network evaluations.

>>> import vdiff
>>> vdiff.__version__.count(".")
2

`vdiff.load(checkpoint)` returns a model, and its `sample` generates images. `wrap` makes a model from your own network.
`prepare`, `train` and `distill` do the same as the commands. Importing vdiff alone does not load torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vdiff.api import Model, Samples, load, wrap
    from vdiff.api_training import Training, distill, prepare, train

__version__ = "0.1.0"
__all__ = ["Model", "Samples", "Training", "distill", "load", "prepare", "train", "wrap"]
PLACES = {
    **dict.fromkeys(["Model", "Samples", "load", "wrap"], "vdiff.api"),
    **dict.fromkeys(["Training", "distill", "prepare", "train"], "vdiff.api_training"),
}
"""Names that are imported at their first use → their modules."""


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module 'vdiff' has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
