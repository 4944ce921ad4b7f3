"""Reading safetensors of somebody who may not be trusted: sizes and shapes are looked at first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open

from vdiff.errors import VdiffError
from vdiff.files import check_regular

MAX_WEIGHTS_BYTES = 64 * 2**30


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
    check_regular(path)
    try:
        yield
    except FileNotFoundError:
        raise VdiffError(f"{path} is missing", advice) from None
    except (SafetensorError, OSError, RuntimeError) as error:  # torch's refusal to map a file is the last
        raise VdiffError(f"{path} cannot be read ({error}): truncated or damaged", advice) from None
