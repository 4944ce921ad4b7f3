"""Feature vectors for comparing images: small pictures, or the output of a network in a file or of Inception."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import warnings
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.errors import OptionError, VdiffError
from vdiff.evaluation.metrics import Moments, frechet_distance
from vdiff.evaluation.sounds import BANDS, FLOOR_DB, PARTS, floor_of, log_mel_vectors
from vdiff.files import check_regular, sha256_of
from vdiff.models.codec import PIXEL_CODEC, to_uint8
from vdiff.models.feature_network import parse_metadata
from vdiff.models.program import METADATA
from vdiff.text import plural

PIXELS, INCEPTION, LOG_MEL = "pixels", "inception", "log_mel"
SIDE = 8
INCEPTION_NAME, INCEPTION_DIM = "inception-v3-compat", 2048
NOISES = 256
MAX_BATCH = 32
"""Images per forward pass of Inception; each needs 20 MB of activations."""
DOWNLOAD = "leave --weights out to download them, or give torch-fidelity's weights-inception-….pth"
MAKE_ONE = "give a torch.export file (vdiff features makes one), a TorchScript file, pixels or inception"


class Features(ABC):
    """A function from images to vectors.

    Attributes:
        name: its name in results.
        dim: d.
        fingerprint: differs if the vectors differ; it is the key of cached results.
        noun: what is compared.
    """

    name: str
    dim: int
    fingerprint: str
    noun = "image"

    @abstractmethod
    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, H, W), uint8 or floating-point in [−1, 1], on any device, to (n, d)."""

    def with_logits(self, images: Tensor) -> tuple[NDArray[np.floating], NDArray[np.floating] | None]:
        """Vectors (n, d), and a classifier's logits (n, c), of the same images."""
        return self(images), None


class ScaledFeatures(Features):
    """Features whose distances have a `Scale`.

    Attributes:
        grid: the shape (n, rows, columns) of a vector, whose neighbours are alike.
    """

    grid: tuple[int, int, int]

    @abstractmethod
    def noise(self) -> Moments:
        """The moments of vectors of pure noise, N(0, 1) clipped to ±1."""


class FeatureDistance:
    """The Fréchet distance of samples to a reference, both as vectors of `features`.

    Args:
        reference: real samples (n, C, …) in [−1, 1], n at least 2.
    """

    def __init__(self, features: Features, reference: Tensor) -> None:
        self.features, self.reference = features, features(reference)

    def __call__(self, samples: Tensor) -> float:
        """The distance of `samples` (n, C, …)."""
        return frechet_distance(self.features(samples), self.reference)


def as_unit(images: Tensor) -> Tensor:
    """Images or sounds as float32 in [−1, 1], from stored or floating-point numbers."""
    return PIXEL_CODEC.clip(PIXEL_CODEC.encode(images).float())


def mean_colours(images: Tensor, side: int) -> Tensor:
    """The mean colours of `side` × `side` equal parts of each image; smaller images are not changed."""
    return F.adaptive_avg_pool2d(images, side) if max(images.shape[-2:]) > side else images


def pixel_vectors(images: Tensor) -> NDArray[np.float64]:
    """The `mean_colours` of 8 × 8 parts of each image, clipped to [−1, 1]: (n, C, H, W) → (n, C·64) or fewer."""
    images = mean_colours(PIXEL_CODEC.clip(images).double(), SIDE)
    vectors: NDArray[np.float64] = images.flatten(1).cpu().numpy()
    return vectors


class Pixels(ScaledFeatures):
    """`pixel_vectors` as features."""

    name = PIXELS

    def __init__(self, image_size: int, channels: int) -> None:
        self.image_size, side = image_size, min(image_size, SIDE)
        self.grid = channels, side, side
        self.dim = math.prod(self.grid)
        self.fingerprint = f"pixels {SIDE}"

    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, H, W) → (n, C·64), in [−1, 1]."""
        return pixel_vectors(PIXEL_CODEC.encode(images))

    def noise(self) -> Moments:
        """From the variance 1 − 2 φ(1) of clipped noise, φ the normal density; the mean of p pixels has 1/p of it."""
        variance = (1 - math.sqrt(2 / (math.pi * math.e))) / max(self.image_size / SIDE, 1) ** 2
        return Moments(2, np.zeros(self.dim), variance * np.eye(self.dim))


class LogMel(ScaledFeatures):
    """`log_mel_vectors` as features.

    Args:
        shape: (C, L) of the sounds.
        floor: lower levels are raised to this one, in dB.
    """

    name, dim, noun, grid = LOG_MEL, BANDS * PARTS, "sound", (1, BANDS, PARTS)

    def __init__(self, rate: int, shape: Sequence[int], floor: float = FLOOR_DB) -> None:
        self.rate, self.shape, self.floor = rate, shape, floor
        self.fingerprint = f"{LOG_MEL} {rate} {BANDS} {PARTS} {floor:g}"

    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, L), int16 or in [−1, 1] → (n, 80)."""
        return log_mel_vectors(images, self.rate, self.floor)

    def noise(self) -> Moments:
        """From sounds of noise that are drawn, the same in every call."""
        generator = torch.Generator().manual_seed(0)
        return Moments.of(self(torch.randn((NOISES, *self.shape), generator=generator)))


class FileFeatures(Features):
    """A feature network in a file: a `torch.export` program, or TorchScript. Such a file is code: use trusted ones.

    It is called with (n, C, H, W), or sounds (n, C, L), float32 in [−1, 1] for any n and returns (n, d); more axes are
    flattened. Loading runs it once.

    Raises:
        VdiffError: the file is missing, is not a network, or its network does not accept such images.
    """

    def __init__(
        self, path: Path, *, image_size: int, channels: int, rate: int = 0, device: torch.device | str = "cpu"
    ) -> None:
        self.name, self.device = path.as_posix(), torch.device(device)
        try:
            self.fingerprint = sha256_of(path)
        except OSError as error:
            raise VdiffError(f"--features {path}: {error.strerror}", MAKE_ONE) from None
        self.network, description = _load(path, self.device)
        known = parse_metadata(description)
        if known and (known.image_size, known.channels) != (image_size, channels):
            raise VdiffError(
                f"{path} takes images of {_kind(known.image_size, known.channels)}, not {_kind(image_size, channels)}",
                "train one on images such as yours: vdiff features",
            )
        shape = (channels, image_size) if rate else (channels, image_size, image_size)
        noise = torch.rand((3, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
        what = f"sounds of shape {shape}" if rate else f"images of {_kind(image_size, channels)}"
        with _one_line_errors(path, f"it does not accept {what}"):
            three, one = self(noise), self(noise[:1])
        if three.ndim != 2 or len(three) != 3 or one.shape != three[:1].shape or not three.shape[1]:
            raise VdiffError(f"{path} returns shape {three.shape} for 3 images; need (3, d)", MAKE_ONE)
        if not np.isfinite(three).all():
            raise VdiffError(f"{path} returns values that are not finite", MAKE_ONE)
        self.dim = three.shape[1]

    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, H, W) → (n, d)."""
        with torch.no_grad():
            answer = self.network(as_unit(images.to(self.device)))
        if not isinstance(answer, Tensor):
            raise TypeError(f"it returns {type(answer).__name__}, not a tensor")
        vectors: NDArray[np.floating] = answer.flatten(1).double().cpu().numpy()
        return vectors


def load_features(
    wanted: str,
    *,
    image_size: int,
    channels: int,
    rate: int = 0,
    loudness: str = "",
    device: torch.device | str = "cpu",
    weights: Path | None = None,
) -> Features:
    """The features `pixels`, `inception` (with weights from a local file, if given) or those of a network's file.

    Args:
        image_size, rate: of sounds the samples, and those per second; their `pixels` are `LogMel`.
        loudness: of sounds, as in `DatasetMeta`.

    Raises:
        OptionError: weights are given for features without weights.
        VdiffError: a file cannot be used, or a package is not installed.
    """
    if weights is not None and wanted != INCEPTION:
        raise OptionError(f"--weights {weights} is for Inception", "give --features inception, or leave it out")
    if rate and wanted in (PIXELS, LOG_MEL):
        return LogMel(rate, (channels, image_size), floor_of(loudness))
    if (wanted == INCEPTION and rate) or wanted == LOG_MEL:
        raise OptionError(
            f"--features {wanted} is for {'images' if rate else 'sounds'}", "leave it out, or give a FILE"
        )
    if wanted == PIXELS:
        return Pixels(image_size, channels)
    if wanted == INCEPTION:
        return inception_features(weights, device)
    return FileFeatures(Path(wanted), image_size=image_size, channels=channels, rate=rate, device=device)


def _kind(image_size: int, channels: int) -> str:
    return f"{image_size}×{image_size} pixels and {plural(channels, 'channel')}"


def _load(path: Path, device: torch.device) -> tuple[Callable[[Tensor], Any], str]:
    """The network in a file, and the text of its metadata, if any."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.partition("/")[2] for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        raise VdiffError(f"{path} is not a network", MAKE_ONE) from None
    extra = {METADATA: ""}
    with _one_line_errors(path, "it cannot be loaded"), _quiet():
        if "archive_format" in names or "serialized_exported_program.json" in names:
            with open(path, "rb") as file:
                program = torch.export.load(file, extra_files=extra)
            return program.module().to(device), str(extra[METADATA])
        if any(name.startswith("code/") for name in names):
            return torch.jit.load(path, map_location=device).eval(), ""
    raise VdiffError(f"{path} does not hold a network, perhaps only weights", MAKE_ONE)


@contextmanager
def _one_line_errors(path: Path, problem: str) -> Iterator[None]:
    """Turn any torch error from a network's file into one line."""
    try:
        yield
    except VdiffError:
        raise
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise VdiffError(f"{path}: {problem} ({reason})", MAKE_ONE) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress torch's output about the file: tracebacks, and the deprecation warning of TorchScript."""
    logger = logging.getLogger("torch.export")
    before, logger.disabled = logger.disabled, True
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.disabled = before


# Inception


class InceptionFeatures(Features):
    """The 2048 features of torch-fidelity's Inception v3, and its logits without the bias.

    Images are converted to uint8 as when saving, grey ones to three equal channels, and resized to 299 × 299 as in
    TensorFlow 1. torch-fidelity computes FID and KID on the same features, and its Inception score on the same logits;
    for precision and recall its default is VGG-16.

    Args:
        state: torch-fidelity's weights by name.
        fingerprint: of the weights.

    Raises:
        VdiffError: `state` belongs to another network, or torch-fidelity is not installed.
    """

    name = INCEPTION
    dim = INCEPTION_DIM

    def __init__(self, state: Mapping[str, Tensor], fingerprint: str, device: str | torch.device = "cpu") -> None:
        self.fingerprint = f"{INCEPTION_NAME} {fingerprint}"
        self.device = torch.device(device)
        self.network = _inception(state).to(self.device)

    def __call__(self, images: Tensor) -> NDArray[np.floating]:
        """(n, C, H, W), C = 1 or 3, uint8 or in [−1, 1] → (n, 2048) float32."""
        return self.with_logits(images)[0]

    def with_logits(self, images: Tensor) -> tuple[NDArray[np.floating], NDArray[np.floating]]:
        """The features (n, 2048) and the logits (n, 1008) of the same images."""
        pixels = images if images.dtype == torch.uint8 else to_uint8(images)
        pixels = pixels.to(self.device).expand(-1, 3, -1, -1)
        exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
        with torch.no_grad(), exact:
            parts = [self.network(some) for some in pixels.split(MAX_BATCH)]
        vectors, logits = (torch.cat(some).cpu().numpy() for some in zip(*parts, strict=True))
        return vectors, logits


def inception_features(weights: Path | None, device: str | torch.device = "cpu") -> InceptionFeatures:
    """Inception with weights from a local file, or with those that torch-fidelity downloads and caches.

    The file is read by `torch.load(weights_only=True)`, which runs no pickled code.

    Raises:
        VdiffError: torch-fidelity is not installed, the file is not its Inception's weights, or the download failed.
    """
    _require_torch_fidelity()
    path = weights or _download()
    check_regular(path)
    try:
        contents = path.read_bytes()
    except OSError as error:
        raise VdiffError(f"--weights {path}: {error.strerror or error}", DOWNLOAD) from None
    try:
        state: Any = torch.load(io.BytesIO(contents), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types for damaged files
        kind = type(error).__name__
        raise VdiffError(f"{path} is not a file of weights ({kind}: it cannot be read safely)", DOWNLOAD) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VdiffError(f"{path} is not a file of weights: it holds no tensors by name", DOWNLOAD)
    try:
        return InceptionFeatures(state, hashlib.sha256(contents).hexdigest(), device)
    except VdiffError as error:
        raise VdiffError(f"{path}: {error.cause}", error.hint) from None


def _require_torch_fidelity() -> None:
    try:
        import torch_fidelity  # noqa: F401
    except ImportError as error:
        raise VdiffError(
            f"Inception's features need torch-fidelity: {error}",
            "pip install 'vdiff[fidelity]', or give --features pixels or a file of vdiff features",
        ) from None


def _download() -> Path:
    """torch-fidelity's file, in its cache; downloaded if it is missing."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    url = str(URL_INCEPTION_V3)
    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir(), "checkpoints", name)
    if not path.exists():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            prefix = name.removesuffix(".pth").rpartition("-")[2]
            torch.hub.download_url_to_file(url, str(path), hash_prefix=prefix)
        except (OSError, RuntimeError) as error:  # RuntimeError: another checksum
            raise VdiffError(
                f"Inception's weights cannot be downloaded from {url}: {error}",
                f"put them at {path}, or give --weights FILE",
            ) from None
    return path


def _inception(state: Mapping[str, Tensor]) -> nn.Module:
    """torch-fidelity's Inception with these weights: images → (features, logits)."""
    _require_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Inception(FeatureExtractorInceptionV3):
        """Loads tensors that were read safely, instead of the file that torch-fidelity's constructor would unpickle."""

        def load_state_dict(self, *_: object, **__: object) -> None:
            """Load `state`, if it belongs to this network."""
            due, given = {k: v.shape for k, v in self.state_dict().items()}, {k: v.shape for k, v in state.items()}
            if due != given:
                lacking, unknown = sorted(due.keys() - given.keys()), sorted(given.keys() - due.keys())
                unlike = sorted(name for name in due.keys() & given.keys() if due[name] != given[name])
                parts = ((lacking, "missing"), (unknown, "unknown"), (unlike, "of another shape"))
                differences = ", ".join(f"{len(some)} tensors {what} ({some[0]})" for some, what in parts if some)
                raise VdiffError(f"these are not torch-fidelity's weights of Inception: {differences}", DOWNLOAD)
            super().load_state_dict(dict(state))

    torch.save({}, nothing := io.BytesIO())
    nothing.seek(0)
    network: nn.Module = Inception(
        INCEPTION_NAME, [str(INCEPTION_DIM), "logits_unbiased"], feature_extractor_weights_path=nothing
    )
    return network
