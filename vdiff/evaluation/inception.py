"""Inception's features by the field's own protocol: torch-fidelity's network, resizing and weights."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vdiff.errors import VdiffError
from vdiff.evaluation.features import INCEPTION, Features
from vdiff.files import check_regular
from vdiff.models.codec import to_uint8

NAME = "inception-v3-compat"
DIM = 2048
MAX_BATCH = 32
"""Images in a forward pass: each takes 20 MB of activations."""
DOWNLOAD = "leave --weights out to download them, or give torch-fidelity's weights-inception-….pth"


class InceptionFeatures(Features):
    """The 2048 features of torch-fidelity's Inception v3, and its logits without their bias.

    Images become uint8 as when they are saved, grey ones three equal channels, and are resized to 299 × 299 as
    TensorFlow 1 did. torch-fidelity computes FID and KID on the same features and its Inception score on the same
    logits; for precision and recall its default is VGG-16.

    Args:
        state: torch-fidelity's weights by name.
        fingerprint: of the weights.

    Raises:
        VdiffError: `state` is of another network, or torch-fidelity is not installed.
    """

    name = INCEPTION
    dim = DIM

    def __init__(self, state: Mapping[str, Tensor], fingerprint: str, device: str | torch.device = "cpu") -> None:
        self.fingerprint = f"{NAME} {fingerprint}"
        self.device = torch.device(device)
        self.network = _network(state).to(self.device)

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
    """Inception with the weights in a local file, or with those that torch-fidelity downloads and keeps.

    The file is read by `torch.load(weights_only=True)`: no pickled code is run.

    Raises:
        VdiffError: torch-fidelity is not installed, the file is not its Inception's weights, or no download.
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
        raise VdiffError(f"{path} is no file of weights ({kind}: it cannot be read safely)", DOWNLOAD) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise VdiffError(f"{path} is no file of weights: it holds no tensors by name", DOWNLOAD)
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
    """The file that torch-fidelity itself downloads, where it keeps it; downloaded unless it is there."""
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


def _network(state: Mapping[str, Tensor]) -> nn.Module:
    """torch-fidelity's Inception with these weights: images → (features, logits)."""
    _require_torch_fidelity()
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Inception(FeatureExtractorInceptionV3):
        """Loads the tensors that were read safely, in place of the file that its constructor would unpickle."""

        def load_state_dict(self, *_: object, **__: object) -> None:
            """Load `state`, if it is that of this network."""
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
    network: nn.Module = Inception(NAME, [str(DIM), "logits_unbiased"], feature_extractor_weights_path=nothing)
    return network
