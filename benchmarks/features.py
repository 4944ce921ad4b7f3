"""What feature networks see: the Fréchet distance of half of the digits to the other half, changed in many ways.

    python benchmarks/features.py     # two minutes on a CPU core; data/digits_8 by `python prepare_data.py`

Both kinds of `vdiff features` are trained with its defaults on all images, one after the other.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from torch import Tensor
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.cli.console import Console
from vdiff.data.datasets import open_at_size
from vdiff.evaluation.metrics import frechet_distance
from vdiff.models.codec import from_uint8
from vdiff.training.feature_training import FeatureTraining, in_order, train_features

SEED, REFERENCE = 0, 900


def blurred(images: Tensor) -> Tensor:
    """Each pixel with its neighbours, 1 2 1 over 4 in both directions."""
    taps = torch.tensor([1.0, 2.0, 1.0]) / 4
    kernel = (taps[:, None] * taps).expand(images.shape[1], 1, 3, 3)
    return F.conv2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), kernel, groups=images.shape[1])


def changes(images: Tensor, classes: Tensor) -> dict[str, Tensor]:
    """Images as they are, and spoiled: less and less like the data from row to row of a kind."""
    generator = torch.Generator().manual_seed(SEED)
    found = {"as they are": images}
    for deviation in (0.1, 0.2, 0.4, 0.8):
        noise = deviation * torch.randn(images.shape, generator=generator)
        found[f"noise of deviation {deviation}"] = (images + noise).clamp(-1, 1)
    blur = images
    for times in ("once", "twice", "three times"):
        blur = blurred(blur)
        found[f"blurred {times}"] = blur
    last, names = classes.max(), classes.unique()
    found["without the last class"] = images[classes != last]
    found["one image for each class, repeated"] = torch.stack([images[classes == name][0] for name in names])[
        torch.searchsorted(names, classes)
    ]
    found["the mean image, repeated"] = images.mean(0, keepdim=True).expand_as(images)
    return found


@click.command()
@click.option("--data", default="data/digits_8", show_default=True, help="A dataset with classes.")
def main(data: str) -> None:
    """Print the table and write it to benchmarks/results/features.md."""
    store, size = open_at_size(data, None)
    batches = list(in_order(store, image_size=size, batch_size=256))
    images = torch.cat([from_uint8(batch.images) for batch in batches])
    classes = torch.cat([batch.classes for batch in batches if batch.classes is not None])
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(SEED))
    reference, others = order[:REFERENCE], order[REFERENCE:]
    given = changes(images[others], classes[others])
    columns: dict[str, list[float]] = {}
    for kind in ("classifier", "autoencoder"):
        features, about = train_features(store, size, FeatureTraining(kind=kind), reporter=Console())
        known = features(images[reference]).numpy()
        distances = [frechet_distance(known, features(spoiled).numpy()) for spoiled in given.values()]
        told = f"{about.held_out:.1%}" if about.metric == "accuracy" else f"{about.held_out:.1f} dB"
        columns[f"{kind}, held-out {about.metric} {told}"] = distances
    rows = [[name, *(f"{column[k]:.3g}" for column in columns.values())] for k, name in enumerate(given)]
    title = f"Fréchet distance of {len(others)} images of {data}, changed, to {REFERENCE} others"
    write_report("features", title, ["", *columns], rows, machine())


if __name__ == "__main__":
    main()
