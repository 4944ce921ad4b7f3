"""Inception's features and the figures on them against torch-fidelity's own run on the same images and weights."""

from __future__ import annotations

import hashlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from tests.commands import error
from tests.toy import contents, write_checkpoint, write_dataset
from vdiff.errors import VdiffError
from vdiff.evaluation import features as feature_module
from vdiff.evaluation.features import InceptionFeatures, inception_features
from vdiff.evaluation.metrics import ClassStats, KernelDistance, Manifold, frechet_distance, precision_recall
from vdiff.models.codec import from_uint8

fidelity = pytest.importorskip(
    "torch_fidelity", reason="torch-fidelity is not installed: pip install 'vdiff[fidelity]'"
)

COUNT, SIDE, SPLITS = 12, 12, 3


def random_state() -> dict[str, Tensor]:
    """Weights of the right names and shapes that keep an image's variance from layer to layer."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Untrained(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_: object, **__: object) -> None:
            """Nothing."""

    torch.save({}, empty := io.BytesIO())
    empty.seek(0)
    network = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            inputs = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / inputs) ** 0.5
    network.fc.weight.data *= 4  # else every image has nearly the same classes
    network.fc.bias.data = torch.randn(1008, generator=generator)  # the score must leave it out
    state: dict[str, Tensor] = nn.Module.state_dict(network)
    return state


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file as torch-fidelity reads it."""
    path: Path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(random_state(), path)
    return path


class Pictures(Dataset[Tensor]):
    """Bytes of images, as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def pictures(seed: int, spread: float) -> Tensor:
    """(COUNT, 3, SIDE, SIDE) bytes: a colour for each image, and noise."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (COUNT, 3, 1, 1), generator=generator).float()
    noise = spread * torch.randn((COUNT, 3, SIDE, SIDE), generator=generator)
    return (colours + noise).clamp(0, 255).to(torch.uint8)


@pytest.fixture(scope="module")
def both(weights: Path) -> dict[str, Any]:
    """What torch-fidelity answers to two sets of images, and what vdiff's features of them are."""
    samples, data = pictures(1, 30.0), pictures(2, 20.0)
    theirs = fidelity.calculate_metrics(
        input1=Pictures(samples), input2=Pictures(data), cuda=False, batch_size=COUNT, verbose=False, cache=False,
        save_cpu_ram=True, isc=True, kid=True, prc=True, feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights), isc_splits=SPLITS, kid_subsets=1, kid_subset_size=COUNT,
    )  # fmt: skip
    features = inception_features(weights)
    vectors, logits = features.with_logits(from_uint8(samples))
    return {
        "theirs": theirs, "features": features, "samples": samples,
        "x": vectors, "logits": logits, "y": features(data),
    }  # fmt: skip


def test_it_answers_the_layers_that_the_field_uses(both):
    assert both["x"].shape == both["y"].shape == (COUNT, 2048)
    assert both["logits"].shape == (COUNT, 1008)
    assert isinstance(both["features"], InceptionFeatures)
    assert (both["features"].name, both["features"].dim) == ("inception", 2048)


def test_the_kernel_distance_is_torch_fidelitys(both):
    found = KernelDistance(both["y"])(both["x"]).value
    assert found == pytest.approx(both["theirs"]["kernel_inception_distance_mean"], abs=1e-5)


def test_precision_and_recall_are_torch_fidelitys(both):
    precision, recall = precision_recall(both["x"], Manifold(both["y"]))
    assert precision.value == pytest.approx(both["theirs"]["precision"], abs=1e-6)
    assert recall.value == pytest.approx(both["theirs"]["recall"], abs=1e-6)
    assert precision.value != recall.value


def test_the_inception_score_is_torch_fidelitys(both):
    """It shuffles with its own seed before it splits."""
    logits = both["logits"][np.random.RandomState(2020).permutation(COUNT)]
    scores = [ClassStats.of(part).score for part in np.split(logits, SPLITS)]
    assert np.mean(scores) == pytest.approx(both["theirs"]["inception_score_mean"], rel=1e-5)
    assert np.std(scores) == pytest.approx(both["theirs"]["inception_score_std"], rel=1e-3)
    assert both["theirs"]["inception_score_mean"] > 1.01


def test_the_frechet_distance_is_torch_fidelitys(both):
    """In the space that the vectors span, where no distance differs: in all dimensions it takes minutes."""
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = both["x"].astype(np.float64), both["y"].astype(np.float64)
    basis = np.linalg.qr(np.concatenate([x, y]).T)[0]
    stats = [fid_features_to_statistics(torch.from_numpy(vectors @ basis)) for vectors in (x, y)]
    due = fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert due > 1
    assert frechet_distance(x @ basis, y @ basis) == pytest.approx(due, rel=1e-4)


def test_bytes_and_numbers_and_batches_are_all_the_same(both, monkeypatch):
    features, few = both["features"], both["samples"][:3]
    np.testing.assert_allclose(features(few), both["x"][:3], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(feature_module, "MAX_BATCH", 2)
    np.testing.assert_allclose(features(from_uint8(few)), both["x"][:3], rtol=1e-4, atol=1e-5)


def test_grey_images_are_three_equal_channels(both):
    grey = both["samples"][:2, :1]
    np.testing.assert_array_equal(both["features"](grey), both["features"](grey.repeat(1, 3, 1, 1)))


def test_the_fingerprint_is_that_of_the_weights(both, weights):
    assert both["features"].fingerprint.split() == [
        "inception-v3-compat", hashlib.sha256(weights.read_bytes()).hexdigest(),
    ]  # fmt: skip


class Evil:
    """An object that runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (exec, ("import pathlib; pathlib.Path('owned').touch()",))


def bad_weights(folder: Path) -> dict[str, str]:
    """Files that are not Inception's weights → what is said of them."""
    (folder / "text.pth").write_text("weights, they said")
    (folder / "empty.pth").touch()
    torch.save([torch.zeros(2)], folder / "list.pth")
    torch.save({"fc.weight": torch.zeros(1000, 2048), "x": torch.zeros(1)}, folder / "other.pth")
    torch.save({"fc.weight": Evil()}, folder / "evil.pth")
    (folder / "folder.pth").mkdir()
    return {
        "text": "is not a file of weights",
        "empty": "is not a file of weights",
        "list": "it holds no tensors by name",
        "other": "not torch-fidelity's weights of Inception",
        "evil": "is not a file of weights",
        "folder": "Is a directory",
        "none": "No such file",
    }


def test_files_that_are_not_its_weights_get_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, message in bad_weights(tmp_path).items():
        with pytest.raises(VdiffError) as caught:
            inception_features(tmp_path / f"{name}.pth")
        text = str(caught.value)
        assert message in text
        assert f"{name}.pth" in text
        assert "\n" not in text
        assert caught.value.hint
    assert not Path("owned").exists()


def test_the_command_says_it_in_one_line(tmp_path):
    write_dataset(tmp_path / "data", channels=3)
    write_checkpoint(tmp_path / "model", channels=3)
    (tmp_path / "text.pth").write_text("weights, they said")
    before = contents(tmp_path)
    line = f"vdiff evaluate {tmp_path / 'model'} --data {tmp_path / 'data'} --features inception --num 5"
    assert "text.pth is not a file of weights" in error(f"{line} --weights {tmp_path / 'text.pth'} --metrics kid", 1)
    assert contents(tmp_path) == before


def test_without_torch_fidelity_the_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(VdiffError, match=r"need torch-fidelity.*pip install 'vdiff\[fidelity\]'"):
        inception_features(None)


def test_weights_are_downloaded_to_where_torch_fidelity_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    asked: list[tuple[str, str]] = []

    def download(url: str, place: str, hash_prefix: str) -> None:
        asked.append((url, hash_prefix))
        Path(place).write_bytes(b"downloaded")

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    path = feature_module._download()
    assert path.read_bytes() == b"downloaded"
    assert path.parent == tmp_path / "checkpoints"
    assert feature_module._download() == path
    ((url, prefix),) = asked
    assert url.startswith("https://github.com/toshas/torch-fidelity/releases/")
    assert url.endswith(f"-{prefix}.pth")
    assert len(prefix) == 8


def test_a_failed_download_says_where_to_put_the_file(tmp_path, monkeypatch):
    def refused(*_: object, **__: object) -> None:
        raise OSError("<urlopen error no network>")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refused)
    with pytest.raises(VdiffError, match=r"cannot be downloaded from https://.*no network>; put them at .*--weights"):
        inception_features(None)
    assert [path for path in contents(tmp_path) if path.endswith(".pth")] == []
