"""The feature network: what its features tell apart, what it is trained on, and that equal seeds give equal ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.digits import SIDE, write_digits
from tests.oracles import randn
from tests.toy import Watcher, write_dataset
from vdiff.data.batches import Batch, open_batches
from vdiff.data.shards import ShardStore, ShardWriter
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError
from vdiff.evaluation.metrics import frechet_distance
from vdiff.models.codec import from_uint8
from vdiff.models.feature_network import (
    FeatureAutoencoder,
    FeatureClassifier,
    FeatureMetadata,
    FeatureNet,
    FeatureNetConfig,
)
from vdiff.reporting import Silent
from vdiff.training.config import LoopConfig
from vdiff.training.engine import build_engine
from vdiff.training.feature_training import (
    FeatureStep,
    FeatureTraining,
    in_order,
    loss_of,
    measure,
    network_config,
    split,
    train_features,
)

KINDS = ["classifier", "autoencoder"]
both_kinds = pytest.mark.parametrize("kind", KINDS)
ITERS = {"classifier": 150, "autoencoder": 100}


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> ImageStore:
    return ImageStore(write_digits(tmp_path_factory.mktemp("digits") / "data"))


@pytest.fixture(scope="module")
def trained(digits: ImageStore) -> dict[str, tuple[FeatureNet, FeatureMetadata]]:
    """One of each kind, after a few seconds."""
    return {
        kind: train_features(
            digits, SIDE, FeatureTraining(kind, dim=32, num_iters=num_iters, seed=1), reporter=Silent()
        )
        for kind, num_iters in ITERS.items()
    }


def all_of(store: Any) -> tuple[Tensor, Tensor]:
    """Images in [−1, 1], and classes."""
    batches = list(in_order(store, image_size=SIDE, batch_size=512))
    return from_uint8(torch.cat([batch.images for batch in batches])), torch.cat([b.classes for b in batches])


@pytest.fixture(scope="module")
def held_out(digits: ImageStore) -> tuple[Tensor, Tensor]:
    """What the seed of `trained` holds out."""
    return all_of(split(digits, 1)[1])


def test_classes_lie_apart(trained, digits, held_out):
    """By the nearest mean of a class, unseen digits are told apart; by an untrained network's features they are not."""
    images, classes = all_of(split(digits, 1)[0])
    unseen, due = held_out
    found = []
    for network in (trained["classifier"][0], FeatureNet(trained["classifier"][0].config)):
        vectors = network(images)
        means = torch.stack([vectors[classes == k].mean(0) for k in range(10)])
        found.append(float((torch.cdist(network(unseen), means).argmin(1) == due).float().mean()))
    assert found[0] > 0.95
    assert found[0] > found[1] + 0.1


@both_kinds
def test_the_distance_grows_with_the_corruption(kind, trained, digits):
    images, _ = all_of(digits)
    features, order = trained[kind][0], torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    reference, others = images[order[:900]], images[order[900:]]
    noise = randn(*others.shape, seed=3, dtype=torch.float32)
    noisy = [(others + deviation * noise).clamp(-1, 1) for deviation in (0, 0.3, 0.6, 1.2)]
    blurred = [others]
    for _ in range(3):
        blurred.append(F.avg_pool2d(F.pad(blurred[-1], (1, 1, 1, 1), mode="replicate"), 3, stride=1))
    for series in (noisy, blurred):
        distances = [frechet_distance(*(features(x).numpy() for x in (some, reference))) for some in series]
        assert all(b > 1.1 * a for a, b in pairwise(distances)), distances


@both_kinds
def test_features_lie_around_zero_with_a_variance_of_one(kind, trained, digits):
    """So the distance of the data to its mean vector repeated is the number of features."""
    vectors = trained[kind][0](all_of(split(digits, 1)[0])[0]).double().numpy()
    assert np.abs(vectors.mean(0)).max() < 0.1
    assert vectors.var(0).sum() == pytest.approx(32, rel=0.03)
    constant = np.repeat(vectors.mean(0)[None], 2, 0)
    assert frechet_distance(vectors, constant) == pytest.approx(32, rel=0.03)


def test_the_held_out_figures_are_of_unseen_images(trained, held_out):
    counts = held_out[1].bincount()
    accuracy, psnr = trained["classifier"][1], trained["autoencoder"][1]
    assert accuracy.metric == "accuracy"
    assert accuracy.num_held_out == psnr.num_held_out == len(held_out[0]) == 179
    assert accuracy.baseline == int(counts.max()) / int(counts.sum())
    assert accuracy.held_out > 0.9
    pixels = held_out[0].double().numpy()
    assert psnr.metric == "psnr"
    assert psnr.baseline == pytest.approx(10 * math.log10(4 / pixels.var(0).mean()), abs=1e-6)
    assert psnr.held_out > psnr.baseline + 2


class Off(nn.Module):
    """Answers every image with `error` added."""

    def __init__(self, error: float) -> None:
        super().__init__()
        self.error = error

    def forward(self, images: Tensor) -> Tensor:
        return images + self.error


class Always(FeatureClassifier):
    """Answers one class."""

    def forward(self, images: Tensor) -> Tensor:
        return F.one_hot(torch.full((len(images),), 2), 4).float()


def test_accuracy_and_psnr_by_their_definitions():
    images = torch.arange(5 * SIDE**2).reshape(5, 1, SIDE, SIDE).remainder(256).to(torch.uint8)
    classes = torch.tensor([2, 0, 3, 2, 3])
    batches = [Batch(images[:2], classes[:2]), Batch(images[2:], classes[2:])]
    assert measure(Off(0.1), iter(batches))[1] == pytest.approx(10 * math.log10(4 / 0.01), abs=1e-4)
    one = Always(FeatureNetConfig("classifier", SIDE, 1, num_classes=4))
    assert measure(one, iter(batches)) == ("accuracy", 0.4, 0.4, 5)


def test_an_autoencoder_is_given_noise_and_asked_for_the_clean_image():
    """One that answers what it is given errs by the noise: E σ² = 0.3²/3 for σ from 0 to 0.3."""
    batch = Batch(torch.full((4000, 1, 4, 4), 77, dtype=torch.uint8), None)
    first, again, second = (float(loss_of(Off(0.0), batch, seed=0, step=step, device="cpu")) for step in (0, 0, 1))
    assert first == pytest.approx(0.03, rel=0.05)
    assert first == again != second


# What is trained on


def keys(store: Any) -> list[bytes]:
    """The images of a dataset or a part of one, as they are encoded."""
    if isinstance(store, ImageStore):
        return [store.encoded(store.meta.sizes[0], k) for k in range(len(store))]
    return [images[4] for shard in range(len(store.shards)) for _, images, *_ in store.samples(shard, (4,))]


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same images in LMDB and in three tars."""
    root: Path = tmp_path_factory.mktemp("stores")
    lmdb = ImageStore(write_dataset(root / "lmdb", count=60, classes=["a", "b", "c"]))
    meta = replace(lmdb.meta, image_format="png")
    with ShardWriter(root / "tars", meta, name="x", images_per_shard=25) as writer:
        for _, images, label, *_ in lmdb.stretch(0, 60):
            writer.add(images, label)
            if writer.is_due:
                writer.commit()
        writer.finish({"images": 60})
    return {"lmdb": lmdb, "tars": ShardStore(root / "tars")}


@pytest.mark.parametrize("name", ["lmdb", "tars"])
def test_a_tenth_is_held_out_by_the_seed(name, stores):
    store = stores[name]
    every = keys(store)
    assert len(set(every)) == len(every) == 60
    parts = split(store, 0)
    train, held = map(keys, parts)
    assert 4 <= len(held) <= 6
    assert [len(part) for part in parts] == [len(train), len(held)]
    assert sorted(train + held) == sorted(every)
    assert train == [key for key in every if key in set(train)]
    assert keys(split(store, 0)[1]) == held != keys(split(store, 1)[1])
    for shard in range(len(getattr(parts[0], "shards", ()))):
        whole = list(parts[0].samples(shard, (4,)))
        for skip in (1, len(whole) - 1, len(whole)):
            assert list(parts[0].samples(shard, (4,), skip)) == whole[skip:]


@pytest.mark.parametrize("name", ["lmdb", "tars"])
def test_batches_show_the_training_part_alone_with_the_right_classes(name, stores):
    train, held = split(stores[name], 0)
    due = {}
    for part in (train, held):
        for batch in in_order(part, image_size=4, batch_size=7):
            due |= {
                (part is train, i.numpy().tobytes()): int(c) for i, c in zip(batch.images, batch.classes, strict=True)
            }
    assert sum(is_train for is_train, _ in due) == len(train)
    stream = open_batches(train, image_size=4, batch_size=11, seed=0, flip=False, num_workers=0).start_at(0)
    seen = set()
    for batch in islice(stream, 200):
        for image, label in zip(batch.images, batch.classes, strict=True):
            assert due[True, image.numpy().tobytes()] == int(label)
            seen.add(image.numpy().tobytes())
    stream.close()
    assert len(seen) == len(train)


@pytest.mark.parametrize("name", ["lmdb", "tars"])
def test_a_limit_spreads_over_the_part(name, stores):
    every = [batch.images for batch in in_order(stores[name], image_size=4, batch_size=8)]
    some = [batch.images for batch in in_order(stores[name], image_size=4, batch_size=8, limit=6)]
    assert sum(map(len, every)) == 60
    assert sum(map(len, some)) == 6
    assert (torch.cat(every) == torch.cat(some)[-1]).flatten(1).all(1).nonzero()[0] >= 40


def test_too_few_images_are_refused(tmp_path):
    store = ImageStore(write_dataset(tmp_path / "data", count=9))
    with pytest.raises(VdiffError, match="holds 9 images, too few"):
        split(store, 0)


# The network


def test_equal_seeds_give_equal_networks_and_touch_no_other_numbers(tmp_path):
    digits = ImageStore(write_digits(tmp_path / "data", count=100))

    def run(seed: int, kind: str) -> dict[str, Tensor]:
        training = FeatureTraining(kind, dim=4, num_iters=3, batch_size=8, seed=seed)
        return train_features(digits, SIDE, training, reporter=Silent())[0].state_dict()

    for kind in KINDS:
        torch.manual_seed(5)
        first = run(0, kind)
        following = torch.rand(1)
        second, other = run(0, kind), run(1, kind)
        torch.manual_seed(5)
        assert torch.rand(1) == following
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not all(torch.equal(first[name], other[name]) for name in first)


@both_kinds
def test_a_gradient_that_is_not_finite_changes_nothing(kind, monkeypatch):
    shape = FeatureNetConfig(kind, 8, 1, dim=4, num_classes=2 if kind == "classifier" else 0, width=8, max_width=8)
    network = FeatureClassifier(shape) if kind == "classifier" else FeatureAutoencoder(shape)
    config = LoopConfig(num_iters=4, batch_size=2, lr=1e-2, device="cpu", precision="fp32")
    step = FeatureStep(network, config, build_engine(config))
    batch = Batch(torch.arange(128, dtype=torch.uint8).reshape(2, 1, 8, 8), torch.tensor([0, 1]))
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr("vdiff.training.feature_training.loss_of", lambda *a, **b: loss_of(*a, **b) * math.inf)
        assert step(0, batch).is_bad
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())
    assert not step.has_learned
    result = step(1, batch)
    assert not result.is_bad
    assert result.losses.shape == (2,)
    assert step.has_learned
    assert not any(torch.equal(tensor, before[name]) for name, tensor in network.named_parameters())


def test_progress_is_told(digits):
    watcher = Watcher()
    train_features(digits, SIDE, FeatureTraining(dim=4, num_iters=5, batch_size=8), reporter=watcher)
    assert watcher.bars == [("features", 5, 0)]
    assert watcher.seen == [("features", k) for k in range(1, 6)]


@both_kinds
@pytest.mark.parametrize("size", [8, 9, 28, 33, 64, 65, 100, 128, 129, 250, 256])
def test_images_of_every_size_become_vectors_and_every_pixel_counts(kind, size):
    config = FeatureNetConfig(kind, size, 3, dim=5, num_classes=2 if kind == "classifier" else 0, width=8, max_width=16)
    torch.manual_seed(0)
    network = FeatureClassifier(config) if kind == "classifier" else FeatureAutoencoder(config)
    assert 3 <= config.sides[-1] <= 4
    images = (0.3 * randn(2, 3, size, size, dtype=torch.float32)).clamp(-0.9, 0.9).requires_grad_()
    answer = network(images)
    assert answer.shape == ((2, 2) if kind == "classifier" else images.shape)
    vectors = network.features(images)
    assert vectors.shape == (2, 5)
    (slope,) = torch.autograd.grad(vectors.square().sum(), images)
    assert (slope != 0).all()
    with torch.no_grad():
        torch.testing.assert_close(network.features(images[1:]), vectors[1:].detach(), rtol=1e-4, atol=1e-5)
        far = torch.full_like(images, 3.0)
        assert torch.equal(network.features(far), network.features(far.clamp(-1, 1)))


BAD = [
    {"kind": "classifier", "num_classes": 1},
    {"kind": "autoencoder", "num_classes": 2},
    {"kind": "diffusion"},
    {"image_size": 7},
    {"image_size": 257},
    {"dim": 0},
    {"width": 12},
]


@pytest.mark.parametrize("values", BAD)
def test_networks_that_cannot_be_are_refused(values):
    with pytest.raises(ValueError, match=r"need|channels"):
        FeatureNetConfig(**{"kind": "autoencoder", "image_size": 8, "channels": 1} | values)


def test_a_classifier_where_there_are_classes(tmp_path):
    for count, due in ((0, "autoencoder"), (1, "autoencoder"), (2, "classifier")):
        store = ImageStore(write_dataset(tmp_path / str(count), classes=["a", "b"][:count]))
        assert network_config(store, SIDE, FeatureTraining()).kind == due
        assert network_config(store, SIDE, FeatureTraining("autoencoder")).kind == "autoencoder"


def test_images_that_are_all_alike_are_refused(digits, monkeypatch):
    class Alike:
        def start_at(self, _: int) -> Iterator[Batch]:
            while True:
                yield Batch(torch.full((8, 1, SIDE, SIDE), 9, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64))

    monkeypatch.setattr("vdiff.training.feature_training.open_batches", lambda *_, **__: Alike())
    with pytest.raises(VdiffError, match="the features of all images are equal"):
        train_features(digits, SIDE, FeatureTraining(dim=4, num_iters=1, batch_size=8), reporter=Silent())
