"""`vdiff features`: train a feature network on the user's images, for distances."""

from __future__ import annotations

import json as jsonlib
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vdiff.cli.console import Console
from vdiff.cli.options import Command, OneOf, option, project_option, switch
from vdiff.cli.sample import DEVICES
from vdiff.errors import OptionError, shell
from vdiff.projects import Project
from vdiff.text import plural

if TYPE_CHECKING:
    from vdiff.models.feature_network import FeatureMetadata

KINDS = ["auto", "classifier", "autoencoder"]
LITTLE = 0.1
"""A network that removes less than this fraction of its baseline's errors has learned little."""


@click.command(
    cls=Command,
    examples=[
        "vdiff features --data data/digits_8 --out features.pt2",
        "vdiff features --data data/photos_64 --out features.pt2 --dim 128",
        "vdiff evaluate checkpoints/base_5 --data data/digits_8 --features features.pt2",
    ],
)
@project_option()
@option(
    "--data", group="Data", metavar="DATASET", show_default="the only dataset under data/",
    help="A dataset that prepare_data.py wrote.",
)  # fmt: skip
@option(
    "--image_size", group="Data", type=click.IntRange(1), metavar="PIXELS",
    show_default="the dataset's, if it has one size",
    help="Which of the dataset's sizes, 8 to 256.",
)  # fmt: skip
@option(
    "--kind", group="Network", type=OneOf(KINDS), default="auto",
    help="Classifier (needs classes), autoencoder (reconstructs images), or auto: a classifier if there are classes.",
)  # fmt: skip
@option(
    "--dim", group="Network", type=click.IntRange(2, 2048), default=64, metavar="NUMBERS",
    help="Length of a feature vector; a Fréchet distance needs more images than that.",
)  # fmt: skip
@option(
    "--num_iters", group="Training", type=click.IntRange(1), default=1000, metavar="UPDATES",
    help="Optimiser updates.",
)  # fmt: skip
@option(
    "--batch_size", group="Training", type=click.IntRange(1), default=64, metavar="IMAGES", help="Images in an update."
)
@option(
    "--seed", group="Training", type=click.IntRange(0, 2**63 - 1), default=0, metavar="NUMBER",
    help="Seed of the initial weights, the order of images and the held-out tenth.",
)  # fmt: skip
@option(
    "--device", group="Machine", type=OneOf(DEVICES), default="auto",
    help="Device; auto takes the fastest one.",
)  # fmt: skip
@option(
    "--num_workers", group="Machine", type=click.IntRange(0), default=2, metavar="PROCESSES",
    help="Processes that decode images until all are in memory, or throughout if they do not fit.",
)  # fmt: skip
@option("--out", group="Output", required=True, type=click.Path(path_type=Path), metavar="FILE.pt2", help="The output.")
@switch("--overwrite", group="Output", help="Replace FILE.pt2.")
@switch("--json", group="Output", help="Print the file's description as one JSON object.")
def command(
    project: Project,
    data: str | None,
    image_size: int | None,
    device: str,
    out: Path,
    overwrite: bool,
    json: bool,
    **training: Any,
) -> None:
    """Train a small network on a dataset, and save the part that turns an image into a feature vector.

    Fréchet and kernel distances on such features are meaningful for images unlike Inception's training data:
    `vdiff evaluate --features FILE.pt2`. A tenth of the images is held out to measure how much was learned. The file
    is a torch.export program: any program with torch can run it.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise OptionError("vdiff features trains in one process", "start it without a launcher")

    from vdiff.data.datasets import open_at_size
    from vdiff.distributed import pick_device
    from vdiff.models.feature_network import check_out, write_features
    from vdiff.replacing import locked
    from vdiff.training.feature_training import FeatureTraining, network_config, train_features

    console = Console()
    store, size = open_at_size(data or project.dataset(), image_size)
    settings = FeatureTraining(**training)
    config = network_config(store, size, settings)
    where = pick_device(device).type
    with locked(out):
        check_out(out, overwrite=overwrite)
        classes = f" of {len(store.meta.class_names)} classes" if config.num_classes else ""
        console.line(f"{plural(len(store), 'image')} of {size} × {size} pixels: {config.kind}{classes}, on {where}")
        network, metadata = train_features(store, size, settings, device=where, reporter=console)
        write_features(network, metadata, out)
    if learned(metadata) < LITTLE:
        console.line(
            f"warning: {held_out_text(metadata)}: distances on these features are not reliable; give more --num_iters"
        )
    if json:
        console.result(jsonlib.dumps({"path": out.as_posix(), **asdict(metadata)}, ensure_ascii=False), is_json=True)
        return
    console.result(f"written    {out}: {settings.dim} features of {size} × {size} images")
    console.result(f"held out   {held_out_text(metadata)}")
    console.result(f"next       vdiff evaluate CHECKPOINT {shell('--data', store.path, '--features', out)}")


def held_out_text(metadata: FeatureMetadata) -> str:
    """The quality on held-out images, as text."""
    images = plural(metadata.num_held_out, "image")
    if metadata.metric == "accuracy":
        return f"accuracy {metadata.held_out:.1%} on {images} (guessing the most common class: {metadata.baseline:.1%})"
    return f"PSNR {metadata.held_out:.1f} dB on {images} (guessing the mean image: {metadata.baseline:.1f} dB)"


def learned(metadata: FeatureMetadata) -> float:
    """The fraction of the baseline's error (wrong classes, or squared error) that the network removes, at most 1."""
    if metadata.metric == "accuracy":
        return 1 - (1 - metadata.held_out) / max(1 - metadata.baseline, 1e-9)
    ratio: float = 10 ** ((metadata.baseline - metadata.held_out) / 10)
    return 1 - ratio
