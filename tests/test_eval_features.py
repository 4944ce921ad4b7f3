"""Features from files: what they answer, and files that are none."""

from __future__ import annotations

import json
import warnings
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.toy import write_dataset
from vdiff.errors import OptionError, VdiffError
from vdiff.evaluation.features import FileFeatures, Pixels, as_unit, load_features
from vdiff.evaluation.nearest import NearestSearch, merged, search_vectors, thumbnails
from vdiff.evaluation.reference import ReferenceImages, random_subset
from vdiff.models.feature_network import FeatureMetadata

KIND = {"image_size": 4, "channels": 1}


class Net(nn.Module):
    """Two features of a 4 × 4 image: mean and mean square."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return torch.stack([images.mean((1, 2, 3)), images.square().mean((1, 2, 3))], 1)


def exported(path, network, channels=1, batch=None, metadata=None):
    example = torch.zeros(2, channels, 4, 4)
    shapes = ({0: torch.export.Dim("batch", min=1)},) if batch is None else None
    program = torch.export.export(network, (example,), dynamic_shapes=shapes)
    extra = {} if metadata is None else {"vdiff.json": json.dumps(metadata)}
    torch.export.save(program, path, extra_files=extra)
    return path


def scripted(path, network):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.trace(network, torch.zeros(2, 1, 4, 4)).save(path)
    return path


@pytest.mark.parametrize("write", [exported, scripted])
def test_a_network_in_a_file_is_asked_in_its_own_range(write, tmp_path):
    features = load_features(str(write(tmp_path / "net.pt2", Net())), **KIND)
    assert features.dim == 2
    pixels = torch.randint(0, 256, (5, 1, 4, 4), dtype=torch.uint8)
    found = features(pixels)
    unit = pixels.double().numpy() / 127.5 - 1
    np.testing.assert_allclose(found, np.stack([unit.mean((1, 2, 3)), (unit**2).mean((1, 2, 3))], 1), atol=1e-6)
    np.testing.assert_allclose(features(as_unit(pixels)), found, atol=1e-6)
    assert features.fingerprint != load_features(
        str(exported(tmp_path / "other.pt2", nn.Flatten())), **KIND
    ).fingerprint  # fmt: skip


def test_files_that_are_no_features_are_refused_in_one_line(tmp_path):
    (tmp_path / "text.pt2").write_text("nothing")
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "weights.pt")
    colour = exported(tmp_path / "colour.pt2", nn.Sequential(nn.Flatten(), nn.Linear(48, 2)), channels=3)
    fixed = exported(tmp_path / "fixed.pt2", nn.Sequential(nn.Flatten(), nn.Linear(16, 2)), batch=2)

    class Sum(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.sum()

    class Infinite(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.flatten(1) / 0

    class Pair(nn.Module):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return images.flatten(1), images.flatten(1)

    sums = exported(tmp_path / "sum.pt2", Sum())
    infinite, pair = exported(tmp_path / "infinite.pt2", Infinite()), exported(tmp_path / "pair.pt2", Pair())
    damaged = tmp_path / "damaged.pt2"
    data = bytearray(fixed.read_bytes())
    data[200:1200] = bytes(1000)
    damaged.write_bytes(data)
    cases = {
        tmp_path / "none.pt2": "No such file",
        tmp_path: "Is a directory|Permission denied",
        tmp_path / "text.pt2": "is not a network",
        tmp_path / "weights.pt": "only weights",
        colour: "does not accept images of 4×4 pixels and 1 channel",
        fixed: "does not accept images",
        sums: "does not accept images",
        infinite: "not finite",
        pair: "does not accept images|not a tensor",
        damaged: "cannot be loaded|is not a network|does not accept",
    }
    for path, words in cases.items():
        with pytest.raises(VdiffError, match=words) as caught:
            FileFeatures(path, **KIND)
        assert "\n" not in str(caught.value)
        assert "torch.export file" in str(caught.value)
    with pytest.raises(OptionError, match=r"--weights w\.pth is for Inception"):
        load_features("pixels", **KIND, weights=Path("w.pth"))


def test_features_made_for_other_images_say_so(tmp_path):
    told = {item.name: {"str": "x", "list[str]": []}.get(item.type, 1) for item in fields(FeatureMetadata)}
    path = exported(tmp_path / "net.pt2", Net(), metadata=told | {"image_size": 8, "channels": 3})
    with pytest.raises(VdiffError, match="takes images of 8×8 pixels and 3 channels, not 4×4 pixels and 1 channel;"):
        FileFeatures(path, **KIND)
    FileFeatures(exported(tmp_path / "fits.pt2", Net(), metadata=told | {"image_size": 4}), **KIND)


def test_pixels_are_those_of_small_images_and_means_of_large_ones():
    assert (Pixels(4, 1).dim, Pixels(8, 3).dim, Pixels(64, 3).dim) == (16, 192, 192)
    images = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    means = (images.double() / 127.5 - 1).reshape(3, 3, 8, 2, 8, 2).mean((3, 5)).flatten(1)
    np.testing.assert_allclose(Pixels(16, 3)(images), means, atol=1e-6)


def test_the_search_finds_the_nearest_in_any_batches_and_never_itself():
    rng = np.random.default_rng(0)
    data = rng.standard_normal((50, 6))
    data[31] = data[7]
    queries = np.concatenate([data[[7, 20]], rng.standard_normal((5, 6))])
    own = np.array([7, 20, -1, -1, -1, -1, -1])
    whole = NearestSearch(queries, own)
    whole.add(0, data)
    parts = []
    for start in (0, 13, 26, 39):
        part = NearestSearch(queries, own)
        part.add(start, data[start : start + 13])
        parts.append((part.distances, part.indices.numpy()))
    distances, indices = merged(parts)
    np.testing.assert_array_equal(indices, whole.indices.numpy())
    np.testing.assert_allclose(distances, whole.distances)
    assert indices[0] == 31
    assert distances[0] == 0
    twice = NearestSearch(data[7:8])
    for start in (0, 25):
        twice.add(start, data[start : start + 25])
    assert twice.indices.tolist() == [7]  # of equals the first
    far = np.sqrt(((queries[2:, None] - data) ** 2).mean(2))
    np.testing.assert_array_equal(indices[2:], far.argmin(1))
    np.testing.assert_allclose(distances[2:], far.min(1))
    alone = ((data[20] - np.delete(data, 20, 0)) ** 2).mean(1)
    assert distances[1] == pytest.approx(np.sqrt(alone.min()))


def test_large_images_are_searched_small_and_samples_lose_what_data_lose():
    images = torch.rand(2, 3, 128, 128) * 2 - 1
    assert thumbnails(images).shape == (2, 3, 64, 64)
    assert search_vectors(images).shape == (2, 3 * 32 * 32)
    np.testing.assert_array_equal(search_vectors(images), search_vectors(thumbnails(images)))


def test_some_of_many_are_chosen_evenly_and_always_the_same():
    np.testing.assert_array_equal(random_subset(5, 10), np.arange(5))
    some = random_subset(100_000, 1000)
    assert len(set(some.tolist())) == 1000
    np.testing.assert_array_equal(some, random_subset(100_000, 1000))
    assert abs(some.mean() - 50_000) < 5 * 100_000 / np.sqrt(12 * 1000)
    assert not np.array_equal(some, random_subset(100_000, 1000, 1))


def test_a_dataset_is_read_in_order_in_parts_that_make_the_whole(tmp_path):
    images = ReferenceImages(write_dataset(tmp_path / "data", count=300), 4)
    whole = torch.cat([pixels for _, pixels in images.batches(images.stretches)])
    parts = [torch.cat([pixels for _, pixels in images.batches(part)]) for part in images.parts("x")[1]]
    assert len(parts) == 2
    assert torch.equal(torch.cat(parts), whole)
    for first, pixels in images.batches(images.parts("x")[1][1]):
        assert torch.equal(pixels, whole[first : first + len(pixels)])
    indices = np.array([0, 17, 255, 256, 299])
    assert torch.equal(torch.stack(list(images.some(indices))), whole[indices])
    assert images.identity == ReferenceImages(tmp_path / "data", 4).identity
