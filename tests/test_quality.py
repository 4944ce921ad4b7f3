"""How good a model is by itself: the scale of reference distances in closed form, the words, and where it is kept."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch

from tests.commands import done
from tests.toy import Watcher, write_checkpoint, write_dataset
from vdiff.distributed import Processes
from vdiff.evaluation.features import Pixels, pixel_vectors
from vdiff.evaluation.measure import measure_quality
from vdiff.evaluation.metrics import Moments, frechet_distance, median_metric
from vdiff.evaluation.nearest import NearestSearch
from vdiff.evaluation.reference import DataStats, ReferenceImages, scale_of
from vdiff.evaluation.results import QUALITY, Quality, Scale, read_quality
from vdiff.models.checkpoint import weights_fingerprint
from vdiff.training.folder import RUN

SCALE = Scale(same=0.25, blurred=4.0, mean_image=16.0, noise=50.0)
CPU = Processes(torch.device("cpu"))


def stats(vectors: np.ndarray) -> DataStats:
    return DataStats(Moments.of(vectors), vectors.astype(np.float32), np.arange(len(vectors)))


# The scale


def test_the_scale_of_gaussian_data_is_that_of_gaussians():
    """‖μ_a − μ_b‖² + tr(A + B − 2 (AB)^½) with scipy's root, of covariances that are written down."""
    side, count = 4, 200_000
    generator = np.random.default_rng(0)
    mean, deviations = generator.uniform(-0.3, 0.3, side**2), generator.uniform(0.05, 0.3, side**2)
    found = scale_of(stats(mean + deviations * generator.standard_normal((count, side**2))), 100_000, Pixels(side, 1))
    smooth = np.zeros((side, side))  # (1 2 1)/4, the border repeated
    for i in range(side):
        for j, weight in ((i - 1, 0.25), (i, 0.5), (i + 1, 0.25)):
            smooth[i, min(max(j, 0), side - 1)] += weight
    blur, covariance = np.kron(smooth, smooth), np.diag(deviations**2)
    clipped = 1 - 2 * math.exp(-0.5) / math.sqrt(2 * math.pi)

    def distance(shift: np.ndarray, other: np.ndarray) -> float:
        root = scipy.linalg.sqrtm(covariance @ other).real
        return float(shift @ shift + np.trace(covariance + other - 2 * root))

    assert found.blurred == pytest.approx(distance(blur @ mean - mean, blur @ covariance @ blur.T), rel=0.02)
    assert found.mean_image == pytest.approx((deviations**2).sum(), rel=0.02)
    assert found.noise == pytest.approx(distance(mean, clipped * np.eye(side**2)), rel=0.02)
    assert 0 < found.same < 0.01 * found.blurred


@pytest.mark.parametrize(("side", "image_size"), [(4, 4), (8, 8), (8, 32)])
def test_noise_is_that_of_clipped_pixels(side, image_size):
    """Against noise that is drawn, clipped and compared as samples are."""
    data = 0.3 * np.random.default_rng(1).standard_normal((4000, side**2))
    noise = torch.randn((4000, 1, image_size, image_size), generator=torch.Generator().manual_seed(0))
    found = scale_of(stats(data), 4000, Pixels(image_size, 1)).noise
    assert found == pytest.approx(frechet_distance(pixel_vectors(noise), data), rel=0.03)


@pytest.mark.parametrize("n", [100, 400, 3000])
def test_other_images_are_as_far_as_n_new_ones(n):
    """In the mean over data sets, also where n is more than half of the data."""
    generator, count = np.random.default_rng(2), 400
    found, expected = [], []
    for _ in range(60):
        data = generator.standard_normal((count, 4))
        found.append(scale_of(stats(data), n, Pixels(2, 1)).same)
        expected.append(frechet_distance(generator.standard_normal((n, 4)), data))
    assert np.mean(found) == pytest.approx(np.mean(expected), rel=0.25)


# The words


@pytest.mark.parametrize(
    ("distance", "near", "word"),
    [
        (0.2, (), "good"),
        (1.0, (), "good"),  # √(0.25 · 4)
        (1.01, (), "usable"),
        (3.99, (0.0, 1.0), "usable"),
        (4.0, (0.0, 1.0), "not trained yet"),
        (math.nan, (), "not trained yet"),
        (0.2, (0.51, 1.0), "good"),
        (0.2, (0.49, 1.0), "memorises"),
    ],
)
def test_a_word_follows_from_the_distances(distance, near, word):
    found = Quality(distance, SCALE, *near)
    assert found.word == word
    assert found.short.startswith(f"{word}: distance to the data {distance:.3g}")
    assert str(found) == f"{found.short} (other images 0.25, blurred 4, mean image 16, noise 50)"
    assert ("half of the samples are within 0.49" in str(found)) == (word == "memorises")


@pytest.mark.parametrize(("share", "word"), [(0.4, "memorises"), (0.6, "good")])
def test_copies_are_told_from_new_images(share, word):
    """Data on a lattice of spacing 1, samples off it by a share of half the spacing: both medians are known."""
    lattice = np.stack(np.meshgrid(*[np.arange(6.0)] * 3), -1).reshape(-1, 3)
    shift = np.array([share, 0, 0])

    def median(queries: np.ndarray, own: np.ndarray | None = None) -> float:
        search = NearestSearch(queries, own)
        search.add(0, lattice)
        return median_metric(search.distances).value

    near, data = median(lattice + shift), median(lattice, np.arange(len(lattice)))
    assert (near, data) == pytest.approx((min(share, 1 - share) / 3**0.5, 1 / 3**0.5))
    assert Quality(0.2, SCALE, median(lattice + shift * (share < 0.5) + 0.5 * (share > 0.5)), data).word == word


# Where it is kept


@pytest.fixture
def model(tmp_path: Path) -> Path:
    write_checkpoint(tmp_path / "model", num_timesteps=4)
    write_dataset(tmp_path / "data", count=40)
    return tmp_path / "model"


def measured(model: Path, budget: int = 400, reporter: Watcher | None = None) -> Quality | None:
    data = model.with_name("data")
    return measure_quality(model, data, budget, processes=CPU, reporter=reporter or Watcher())


def test_it_is_measured_once_for_the_same_weights(model, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert measured(model, budget=60) is None, "15 samples are fewer than there are dimensions"
    assert not (model / QUALITY).exists()
    found = measured(model)
    assert found is not None
    assert found == read_quality(model, weights_fingerprint(model))
    assert found.nearest is not None
    (row,) = json.loads((model / QUALITY).read_text())["rows"]
    assert (row["sampler"], row["num_steps"], row["n"]) == ("dpmpp_2m", 4, 100)
    before = (model / QUALITY).stat().st_mtime_ns
    assert measured(model, budget=0) == found
    assert (model / QUALITY).stat().st_mtime_ns == before
    write_checkpoint(model, seed=5, num_timesteps=4)
    assert read_quality(model, weights_fingerprint(model)) is None
    assert measured(model) != found
    without_rows = json.dumps({**json.loads((model / QUALITY).read_text()), "rows": []})
    for text in ("", "{}", '{"format": 1}', without_rows):
        (model / QUALITY).write_text(text)
        assert read_quality(model, weights_fingerprint(model)) is None


def test_it_belongs_to_the_run(model):
    """`train.py --overwrite` may remove it, also what a kill left."""
    for name in (QUALITY, "quality-nearest.png", f".{QUALITY}.lock", f".{QUALITY}.work/row-000-piece-0000.npz"):
        assert re.fullmatch(RUN.files(model), name)


def test_of_much_data_a_part_is_read(tmp_path):
    """Spread over the whole; numbers and pictures belong together, and a part is another reference than the whole."""
    data = write_dataset(tmp_path / "data", count=600)
    whole, part = ReferenceImages(data, 4), ReferenceImages(data, 4, most=100)
    assert (len(whole), len(part)) == (600, 101)
    assert part.numbers.max() > 500
    assert part.identity != whole.identity == ReferenceImages(data, 4, most=600).identity
    for number, (start, images) in zip((0, 256, 512), part.batches(part.stretches), strict=True):
        assert start == number
        assert torch.equal(images[3], whole.image(number + 3))


@pytest.mark.usefixtures("model")
def test_commands_tell_it(monkeypatch, tmp_path):
    """`train.py` at its end, `distill.py` of its teacher before it begins, and `vdiff inspect`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    common = "--data data --preset toy --batch_size 16 --device cpu --num_workers 0 --tracker none"
    result = done(f"train.py {common} --num_iters 100 --num_timesteps 8 --out model --overwrite")
    verdict = next(line for line in result.stdout.splitlines() if line.startswith("verdict"))
    found = read_quality(Path("model"), weights_fingerprint(Path("model")))
    assert verdict == f"verdict    {found.short}"
    assert f"scale      {found.scale}\n" in result.stdout
    assert str(found) in done("vdiff inspect model").stdout
    assert json.loads(done("vdiff inspect model --json").stdout)["verdict"]["word"] == found.word
    result = done(f"distill.py {common} --base model --num_iters 2 --report False")
    assert f"model is {found.short}\nscale      {found.scale}\n" in result.stderr
    assert ("cannot be better than its teacher" in result.stderr) == (found.word == "not trained yet")
    write_checkpoint(tmp_path / "noise", num_timesteps=8, dataset="data")
    result = done(f"distill.py {common} --base noise --num_iters 60 --out student --report False --check_images 8")
    assert "noise is not trained yet: distance to the data" in result.stderr
    assert "a student cannot be better than its teacher" in result.stderr
