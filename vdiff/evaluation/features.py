"""What images are compared by: a vector for each, from their pixels, from a file with a network, or from Inception."""

from __future__ import annotations

import hashlib
import logging
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.data.images import from_uint8
from vdiff.errors import OptionError, VdiffError
from vdiff.evaluation.feature_network_file import parse_metadata
from vdiff.evaluation.pixels import SIDE, pixel_vectors
from vdiff.files import check_regular
from vdiff.models.program import METADATA

PIXELS, INCEPTION = "pixels", "inception"
MAKE_ONE = "give a torch.export file (vdiff features makes one), a TorchScript file, pixels or inception"


class Features(Protocol):
    """Images in, vectors out.

    Attributes:
        name: how results call it.
        dim: d.
        fingerprint: differs where the vectors do: results are kept under it.
    """

    name: str
    dim: int
    fingerprint: str

    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, H, W), uint8 or floating-point in [−1, 1], on any device, to (n, d)."""


@runtime_checkable
class Classifier(Protocol):
    """Features that answer classes too."""

    def with_logits(self, images: Tensor) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """Vectors (n, d), and the logits (n, c) of the same images."""


def as_unit(images: Tensor) -> Tensor:
    """Images as float32 in [−1, 1], whether they are bytes or numbers already."""
    return from_uint8(images) if images.dtype == torch.uint8 else images.float().clamp(-1, 1)


class Pixels:
    """The mean colours of 8 × 8 equal parts of an image (its pixels, where it has no more)."""

    name = PIXELS

    def __init__(self, image_size: int, channels: int) -> None:
        self.dim = channels * min(image_size, SIDE) ** 2
        self.fingerprint = f"pixels {SIDE}"

    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, H, W) → (n, C·64), in [−1, 1]."""
        return pixel_vectors(as_unit(images))


class FileFeatures:
    """A feature network in a file: a `torch.export` program, or TorchScript.

    It is called with (n, C, H, W) float32 in [−1, 1] for any n and answers (n, d); more axes are flattened. It is tried
    at once. Such a file is code: take it from those whom you would take a program from.

    Raises:
        VdiffError: no such file, not a network, or one that such images cannot be given to.
    """

    def __init__(self, path: Path, *, image_size: int, channels: int, device: torch.device | str = "cpu") -> None:
        self.name = path.as_posix()
        self.path, self.device = path, torch.device(device)
        self.fingerprint = _digest(path)
        self.network, told = _load(path, self.device)
        known = parse_metadata(told)
        if known and (known.image_size, known.channels) != (image_size, channels):
            raise VdiffError(
                f"{path} takes images of {_kind(known.image_size, known.channels)}, not {_kind(image_size, channels)}",
                "train one on images such as yours: vdiff features",
            )
        noise = torch.rand((3, channels, image_size, image_size), generator=torch.Generator().manual_seed(0)) * 2 - 1
        with _said(path, f"it cannot be given images of {_kind(image_size, channels)}"):
            both = self(noise)
            one = self(noise[:1])
        if both.ndim != 2 or len(both) != 3 or one.shape != both[:1].shape or not both.shape[1]:
            raise VdiffError(f"{path} answers {both.shape} for 3 images; need (3, d)", MAKE_ONE)
        if not np.isfinite(both).all():
            raise VdiffError(f"{path} answers numbers that are not finite", MAKE_ONE)
        self.dim = both.shape[1]

    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, H, W) → (n, d)."""
        with torch.no_grad():
            answer = self.network(as_unit(images.to(self.device)))
        if not isinstance(answer, Tensor):
            raise TypeError(f"it answers {type(answer).__name__}, not a tensor")
        vectors: NDArray[np.floating] = answer.flatten(1).double().cpu().numpy()
        return vectors


def load_features(
    wanted: str, *, image_size: int, channels: int, device: torch.device | str = "cpu", weights: Path | None = None
) -> Features:
    """The features `pixels`, `inception` or those of a file.

    Args:
        weights: a local file with Inception's weights.

    Raises:
        OptionError: weights for features that have none.
        VdiffError: a file that cannot be used, or a package that is not installed.
    """
    if weights is not None and wanted != INCEPTION:
        raise OptionError(f"--weights {weights}: they are for Inception", "give --features inception, or leave it out")
    if wanted == PIXELS:
        return Pixels(image_size, channels)
    if wanted == INCEPTION:
        from vdiff.evaluation.inception import inception_features

        found: Features = inception_features(weights, device)
        return found
    return FileFeatures(Path(wanted), image_size=image_size, channels=channels, device=device)


def _kind(image_size: int, channels: int) -> str:
    return f"{image_size}×{image_size} pixels and {channels} channel{'s' if channels > 1 else ''}"


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    check_regular(path)
    try:
        with open(path, "rb") as file:
            while block := file.read(2**20):
                digest.update(block)
    except OSError as error:
        raise VdiffError(f"--features {path}: {error.strerror}", MAKE_ONE) from None
    return digest.hexdigest()


def _load(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Any], str]:
    """The network in a file, and the metadata in it, if any."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        raise VdiffError(f"{path} is not a network", MAKE_ONE) from None
    extra = {METADATA: ""}
    with _said(path, "it cannot be loaded"), _quiet():
        if "archive_format" in names or "serialized_exported_program.json" in names:
            with open(path, "rb") as file:
                program = torch.export.load(file, extra_files=extra)
            network: Callable[[Tensor], Any] = program.module().to(device)
            return network, str(extra[METADATA])
        if any(name.startswith("code/") for name in names):
            script: Callable[[Tensor], Any] = torch.jit.load(path, map_location=device).eval()
            return script, ""
    raise VdiffError(f"{path} holds no network, perhaps weights alone", MAKE_ONE)


@contextmanager
def _said(path: Path, what: str) -> Iterator[None]:
    """One line for whatever a network in a file makes torch stumble over."""
    try:
        yield
    except VdiffError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise VdiffError(f"{path}: {what} ({reason})", MAKE_ONE) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remarks on the file: they are a traceback, or that TorchScript is old."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before
