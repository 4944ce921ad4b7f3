"""The file of a feature network: a `torch.export` program that runs wherever torch is, and what it says of itself."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import vdiff
from vdiff.data.datasets import AnyStore
from vdiff.errors import OptionError, VdiffError
from vdiff.evaluation.feature_network import FeatureNet
from vdiff.evaluation.feature_network_training import FeatureTraining, HeldOut
from vdiff.files import parse
from vdiff.models.program import PROGRAM, write_program
from vdiff.replacing import check_free

SUFFIX = ".pt2"
FORMAT = 1
TOLERANCE = 1e-5


@dataclass(frozen=True)
class FeatureMetadata:
    """What the file says of itself, as JSON in its extra file `vdiff.json`.

    Attributes:
        features: the format's version; that the key is there says that the program answers features.
        kind: "classifier" or "autoencoder".
        image_size, channels: of the images (n, channels, image_size, image_size) in [−1, 1] that it takes.
        dim: numbers in each vector of features.
        dataset, dataset_fingerprint, class_names: what it was trained on.
        num_iters, batch_size, seed: how.
        metric, held_out, baseline, num_held_out: "accuracy" or "psnr" on images that it was not trained on, the same
            figure for the commonest class or the mean image, and how many images that were.
    """

    features: int
    kind: str
    image_size: int
    channels: int
    dim: int
    dataset: str
    dataset_fingerprint: str
    class_names: list[str]
    num_iters: int
    batch_size: int
    seed: int
    metric: str
    held_out: float
    baseline: float
    num_held_out: int
    vdiff_version: str


def describe(network: FeatureNet, store: AnyStore, training: FeatureTraining, found: HeldOut) -> FeatureMetadata:
    """The metadata of a network that was trained on `store`."""
    config = network.config
    return FeatureMetadata(
        features=FORMAT,
        kind=config.kind,
        image_size=config.image_size,
        channels=config.channels,
        dim=config.dim,
        dataset=store.meta.name,
        dataset_fingerprint=store.meta.fingerprint,
        class_names=list(store.meta.class_names) if config.num_classes else [],
        num_iters=training.num_iters,
        batch_size=training.batch_size,
        seed=training.seed,
        metric=found.metric,
        held_out=found.value,
        baseline=found.baseline,
        num_held_out=found.num_images,
        vdiff_version=vdiff.__version__,
    )


def check_out(path: Path, *, overwrite: bool) -> None:
    """Find out before the work whether the file may be written at its end.

    Raises:
        OptionError: the name does not end with .pt2, or is that of a folder.
        VdiffError: the file exists, and `overwrite` is off or vdiff did not write it.
    """
    if path.suffix != SUFFIX:
        raise OptionError(f"--out {path}: the file is a torch.export program", f"give FILE{SUFFIX}")
    if path.is_dir():
        raise OptionError(f"--out {path} is a folder", f"give FILE{SUFFIX}")
    check_free(path, PROGRAM, overwrite=overwrite)


def write_features(network: FeatureNet, metadata: FeatureMetadata, path: Path) -> float:
    """Write the program, whole or not at all, and answer how far its features are from the network's once reloaded.

    It takes images (n, C, S, S), float32 in [−1, 1], for any n.

    Raises:
        VdiffError: the features differ, or the file system refuses.
    """

    def compare(program: nn.Module) -> float:
        difference = 0.0
        for count in (3, 1):
            images = _probe(network, count)
            due, found = network(images), program(images)
            scale = due.abs().max().clamp(min=1)
            difference = max(difference, float((found - due).abs().max() / scale))
        if not difference <= TOLERANCE:
            raise VdiffError(
                f"the exported features differ by {difference:.1e}, more than {TOLERANCE:g}",
                "nothing was written; please report this",
            )
        return difference

    return write_program(network, (_probe(network, 2),), asdict(metadata), path, compare)


def _probe(network: FeatureNet, count: int) -> Tensor:
    """Images of noise, the same in every call."""
    size, channels = network.config.image_size, network.config.channels
    return torch.rand((count, channels, size, size), generator=torch.Generator().manual_seed(count)) * 2 - 1


def parse_metadata(text: str | bytes) -> FeatureMetadata | None:
    """The metadata in the extra file of a program; None if it is empty or not that of features."""
    try:
        values: Any = parse(text or "null")
    except ValueError:
        return None
    if not isinstance(values, dict) or values.get("features") != FORMAT:
        return None
    names = {item.name for item in fields(FeatureMetadata)}
    return FeatureMetadata(**values) if values.keys() == names else None
