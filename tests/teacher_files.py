"""Models of other repositories: outputs of their own code, for weights and inputs that a formula gives.

`teachers/*.json` was written outside of this project, by the model code of the repository that each file names. A file
holds the names and shapes of its weights, as a tree by the parts of their names, and what its model answers, so no
weights are stored.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(__file__).parent / "teachers"


def recorded(name: str) -> dict[str, Any]:
    """What `teachers/NAME.json` holds, with its `shapes` as name → shape."""
    values: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return {**values, "shapes": dict(_leaves(values["shapes"], ""))}


def _leaves(tree: dict[str, Any], before: str) -> Iterator[tuple[str, list[int]]]:
    """{"enc.": {"conv.": {"weight": [8]}}} → ("enc.conv.weight", [8])."""
    for part, below in tree.items():
        if isinstance(below, dict):
            yield from _leaves(below, before + part)
        else:
            yield before + part, below


def numbers(name: str, shape: Sequence[int]) -> np.ndarray:
    """Uniform in [−1, 1], float32, by the name alone."""
    return np.random.RandomState(zlib.crc32(name.encode())).uniform(-1, 1, shape).astype(np.float32)


def weight(name: str, shape: Sequence[int], *, inputs: int | None = None) -> np.ndarray:
    """A tensor of a size that keeps features near 1.

    Args:
        inputs: numbers that each output sums up; None: those of a matrix (out, in, …).
    """
    found = numbers(name, shape)
    if len(shape) > 1:
        return found * np.float32(math.sqrt(3 / (inputs or math.prod(shape[1:]))))
    return np.asarray(0.2 * found + np.float32(name.endswith(("weight", "scale", "gain"))), np.float32)


def weights_of(shapes: dict[str, list[int]]) -> dict[str, Tensor]:
    """A state dict."""
    return {name: torch.from_numpy(weight(name, shape)) for name, shape in shapes.items()}


def decoded(call: dict[str, Any]) -> Tensor:
    """The output of a call, float32."""
    raw = np.frombuffer(base64.b64decode(call["output"]), "<f4").reshape(call["shape"])
    return torch.from_numpy(raw.copy())
