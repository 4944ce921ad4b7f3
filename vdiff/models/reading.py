"""Reading JSON and safetensors of somebody who may not be trusted: sizes and shapes are looked at first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from vdiff.errors import VdiffError

MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES = 64 * 2**20, 64 * 2**30
MAX_DEPTH = 200
"""Objects within objects in a config; a teacher takes one, and no ladder has so many stages."""


def read_json(path: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file of somebody who may not be trusted.

    Raises:
        VdiffError: it is too large, no JSON object, or objects lie too deep in objects; `advice` says what to do.
    """
    try:
        size = path.stat().st_size
        if size > MAX_CONFIG_BYTES:
            raise ValueError(f"{size / 2**20:,.0f} MiB, more than the {MAX_CONFIG_BYTES // 2**20} that may be")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("it is no JSON object")
        if _depth(values) > MAX_DEPTH:
            raise RecursionError
    except RecursionError:
        raise VdiffError(f"{path} cannot be read: it is nested too deep", advice) from None
    except (ValueError, OSError) as error:
        raise VdiffError(f"{path} cannot be read: {error}", advice) from None
    return values


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """The names and shapes in a safetensors file; no number of its tensors is read.

    Raises:
        VdiffError: the file is missing, truncated, of another format or larger than weights are.
    """
    with reading(path):
        size = path.stat().st_size
        if size > MAX_WEIGHTS_BYTES:
            raise VdiffError(f"{path} has {size / 2**30:,.0f} GiB: no weights of ours do", "restore the file")
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Say in one line what keeps the safetensors file from being read."""
    advice = "restore the file, or train again"
    try:
        yield
    except FileNotFoundError:
        raise VdiffError(f"{path} is missing", advice) from None
    except (SafetensorError, OSError, RuntimeError) as error:  # torch's refusal to map a file is the last
        raise VdiffError(f"{path} cannot be read ({error}): truncated or damaged", advice) from None


def _depth(values: Any) -> int:
    """How deep lists and objects lie in each other, counted without recursion."""
    level, depth = [values], 0
    while level:
        depth += 1
        inner = [item.values() if isinstance(item, dict) else item for item in level if isinstance(item, dict | list)]
        level = [item for items in inner for item in items]
    return depth
