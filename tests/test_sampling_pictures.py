"""What people look at: the way between two images, the way of x̂, grids with the names of classes."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests.drawing import image_path, run, spec
from tests.oracles import condition, randn
from tests.toy import SIZE, contents, write_checkpoint
from vdiff.data.images import full_columns, grid_picture, labelled_grid, num_shown
from vdiff.diffusion.noise import ImageNoise
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.models.checkpoint import load_checkpoint
from vdiff.models.codec import to_uint8
from vdiff.sampling.outputs import ANIMATION, GRID, STRIP
from vdiff.sampling.pictures import TrajectoryRecorder, spread
from vdiff.sampling.spec import PathNoise, nearer_end, slerp

SHAPE = (3, 4, 4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "base_0"
    write_checkpoint(folder, channels=3, classes=2, class_names=["cat", "dog"])
    return folder


def pixels(path: Path) -> np.ndarray:
    with PIL.Image.open(path) as picture:
        return np.array(picture)


# From one image to another


def test_slerp_turns_evenly_in_the_plane_of_both():
    """Against a rotation written out: e₁ cos(uθ) + e₂ sin(uθ), for unit vectors; ends are exact, lengths are kept."""
    a, b = randn(48, seed=1), randn(48, seed=2)
    a, b = a / a.norm(), b / b.norm()
    theta = math.acos(float(a @ b))
    across = (b - (a @ b) * a) / (b - (a @ b) * a).norm()
    for u in (0.0, 0.1, 0.5, 0.75, 1.0):
        expected = math.cos(u * theta) * a + math.sin(u * theta) * across
        torch.testing.assert_close(slerp(a, b, torch.tensor([u], dtype=torch.float64))[0], expected, rtol=0, atol=1e-12)
    a, b = randn(*SHAPE, seed=3, dtype=torch.float32), 2 * randn(*SHAPE, seed=4, dtype=torch.float32)
    found = slerp(a, b, torch.linspace(0, 1, 7))
    assert (found.shape, found.dtype) == ((7, *SHAPE), torch.float32)
    assert torch.equal(found[0], a)
    assert torch.equal(found[-1], b)
    mixed = slerp(a, b, torch.tensor([0.3]))
    torch.testing.assert_close(mixed, slerp(b, a, torch.tensor([0.7])))
    for same in (a, -a):
        with pytest.raises(ValueError, match="no unique shortest path"):
            slerp(a, same, torch.tensor([0.5]))


def test_noise_on_the_way_is_noise_at_every_draw():
    """Ends draw what the images draw, call after call; in between the variance stays 1, which a mean would halve."""
    shape = (1, 300, 300)
    noise = PathNoise(seed=5, ends=(7, 2), positions=[0, 0.5, 1], shape=shape)
    ends = ImageNoise(seed=5, indices=[7, 2], shape=shape)
    for _ in range(3):
        first, half, last = noise()
        assert torch.equal(torch.stack([first, last]), ends())
        assert float(half.var()) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_the_ends_of_a_path_are_the_two_images(model, tmp_path, sampler):
    """Bit for bit, with their classes, also where noise is added; each image between is drawn from noise between."""
    run(spec(model, sampler=sampler), tmp_path / "images", num=8)
    run(spec(model, sampler=sampler, path=[6, 3, 5]), tmp_path / "way", num=5)
    for k, image in ((0, 6), (4, 3)):
        assert (image_path(tmp_path / "way", k)).read_bytes() == image_path(tmp_path / "images", image).read_bytes()
    shown = [pixels(image_path(tmp_path / "way", k)).astype(int) for k in range(5)]
    assert all(np.abs(a - b).max() > 3 for a, b in itertools.pairwise(shown))
    if sampler == "ddim":
        denoiser, _ = load_checkpoint(model)
        z = slerp(*ImageNoise(seed=3, indices=[6, 3], shape=(3, SIZE, SIZE))(), torch.tensor([0.75]))
        for i in range(4, 0, -1):  # four steps of DDIM written out: x̂ clipped, ε̂ derived again; class of image 3
            angle, after = (CosineSchedule().angle(torch.tensor(j / 4)) * (j > 0) for j in (i, i - 1))
            with torch.no_grad():
                x = denoiser(z, torch.tensor([i / 4], dtype=torch.float64), condition(torch.tensor([1]))).x.clamp(-1, 1)
            z = after.cos() * x + after.sin() * (z - angle.cos() * x) / angle.sin()
        assert np.abs((z[0].permute(1, 2, 0).numpy() + 1) * 127.5 - shown[3]).max() <= 0.51


def test_an_image_on_the_way_has_the_class_of_the_nearer_end():
    assert [nearer_end(u, 4, 9) for u in (0, 0.3, 0.5, 0.51, 1)] == [4, 4, 4, 9, 9]


# From noise to the image


@pytest.mark.parametrize("sampler", sorted(SAMPLERS))
def test_the_trajectory_ends_in_the_image(model, tmp_path, sampler):
    """Its last column and its last frame are the images; the others are x̂ as the network predicts it on the way."""
    run(spec(model, sampler=sampler), tmp_path / "out", num=3, trajectory=True)
    assert (tmp_path / f"out.{STRIP}").exists()
    images = [pixels(image_path(tmp_path / "out", k)) for k in range(3)]
    with PIL.Image.open(tmp_path / f"out.{ANIMATION}") as animation:
        assert (animation.format, animation.n_frames, animation.info["loop"]) == ("WEBP", 4, 0)
        animation.seek(3)
        last = np.array(animation.convert("RGB"))
    scale, side = 18, 72
    for k, image in enumerate(images):
        top, left = 2, 2 + k * (side + 2)
        assert np.array_equal(last[top : top + side : scale, left : left + side : scale], image)
    strip = pixels(tmp_path / f"out.{STRIP}")
    found = [strip[-16 - (3 - k) * 76 + 4 :][:72:18, -16 - 72 :][:, :72:18] for k in range(3)]
    assert all(np.array_equal(a, b) for a, b in zip(found, images, strict=True))


def test_frames_are_what_the_network_predicts():
    seen = TrajectoryRecorder(3)
    for step in range(3):
        x = randn(9, 3, 4, 4, seed=step)
        seen(step, x, type("P", (), {"x": x})())
    assert [frame.shape for frame in seen.frames] == [(8, 3, 4, 4)] * 3
    assert torch.equal(seen.frames[1], to_uint8(randn(9, 3, 4, 4, seed=1)[:8].clamp(-1, 1)))


@pytest.mark.parametrize(("count", "most", "expected"), [(3, 5, [0, 1, 2]), (9, 3, [0, 4, 8]), (1024, 2, [0, 1023])])
def test_steps_are_spread_evenly_with_both_ends(count, most, expected):
    assert spread(count, most) == expected


def test_long_ways_are_shown_in_at_most_64_frames():
    assert len(TrajectoryRecorder(1000).steps) == len(set(TrajectoryRecorder(1000).steps)) == 64
    assert (TrajectoryRecorder(1000).steps[0], TrajectoryRecorder(1000).steps[-1]) == (0, 999)
    assert TrajectoryRecorder(5).steps == [0, 1, 2, 3, 4]


def test_a_trajectory_may_be_asked_for_later(model, tmp_path):
    """Of a finished output: nothing else is drawn or changed, and the pictures are those of a whole run."""
    for form in ("png", "zip"):
        run(spec(model), tmp_path / "both" / f"out.{form}", form=form, trajectory=True)
        run(spec(model), tmp_path / "later" / f"out.{form}", form=form)
        assert run(spec(model), tmp_path / "later" / f"out.{form}", form=form, trajectory=True).drawn == 0
    assert contents(tmp_path / "later") == contents(tmp_path / "both")


# Grids


def test_a_grid_has_a_column_for_each_class(model, tmp_path):
    """White, the names above, and image k in column k mod 2."""
    run(spec(model), tmp_path / "out", num=5)
    grid = pixels(tmp_path / f"out.{GRID}")
    head = grid.shape[0] - 16 - (3 * 76 - 4)
    assert (grid[16:head] < 128).any()  # the names
    middle = (grid.shape[1] - (2 * 76 - 4)) // 2
    for k in range(6):
        top, left = head + k // 2 * 76, middle + k % 2 * 76
        cell = grid[top : top + 72 : 18, left : left + 72 : 18]
        assert np.array_equal(cell, pixels(image_path(tmp_path / "out", k)) if k < 5 else np.full_like(cell, 255))


def test_many_classes_are_named_below_each_image():
    images = randn(9, 3, 4, 4, dtype=torch.float32).clamp(-1, 1)
    names = [f"kind {k} of a long name" for k in range(9)]
    picture = np.array(grid_picture(images, names, 100))
    line = (picture.shape[0] - 2 * 16 + 4) // 3 - 72 - 4
    for k in range(9):
        top, left = 16 + k // 3 * (72 + line + 4), 16 + k % 3 * 76
        cell = picture[top : top + 72 : 18, left : left + 72 : 18]
        assert np.array_equal(cell, to_uint8(images[k]).permute(1, 2, 0).numpy())
        below = picture[top + 72 : top + 72 + line, left : left + 72]
        assert (below < 200).any()
    assert (picture[:, 16 + 72 : 16 + 76] > 250).all()  # no name reaches into the next column
    with pytest.raises(ValueError, match="2 labels for 9 images"):
        labelled_grid(images, ["a", "b"], 3)


def test_one_class_is_the_title():
    images = randn(5, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    titled, plain = grid_picture(images, ["cat"] * 5, 1), grid_picture(images)
    assert plain.height == 2 * 16 + 2 * 76 - 4
    assert titled.height > plain.height + 16
    both = grid_picture(images, ["cat"] * 5, 1, title="base_0 · ddim · 4 steps · seed 0")
    assert both.width > plain.width
    assert np.array_equal(
        np.array(both)[-16 - 148 : -16, both.width // 2 - 112 : both.width // 2 + 112], np.array(plain)[16:-16, 16:-16]
    )


def test_a_way_is_shown_from_end_to_end(model, tmp_path):
    """In rows under a title; of more images than are shown, both ends are among those that are."""
    for num, rows, columns in ((5, 1, 5), (21, 2, 11), (70, 4, 16)):
        out = tmp_path / str(num)
        run(spec(model, num_steps=1, path=[6, 3, num]), out, num=num, batch_size=64)
        grid, last = pixels(tmp_path / f"{num}.{GRID}"), (min(num, 64) - 1) % columns
        bottom, left = grid.shape[0] - 16 - 72, (grid.shape[1] - columns * 76 + 4) // 2
        head = bottom - (rows - 1) * 76
        assert (grid[16 : head - 4] < 128).any()  # From image 6 (cat) to image 3 (dog)
        for top, column, image in ((head, 0, 0), (bottom, last, num - 1)):
            x = left + column * 76
            cell = grid[top : top + 72 : 18, x : x + 72 : 18]
            assert np.array_equal(cell, pixels(image_path(out, image)))


def test_a_trajectory_names_the_classes_of_its_rows(tmp_path):
    """To the left of them, and cut short; all else is as it is without names."""
    images = randn(3, 1, 4, 4, dtype=torch.float32).clamp(-1, 1)
    strips = []
    for names in ([], ["a", "b", "a"], ["kind", "an owl", "x" * 200]):
        trajectory = TrajectoryRecorder(6)
        for step in range(6):
            trajectory(step, images, Prediction(images, images, images))
        trajectory.save(images, tmp_path / STRIP, tmp_path / ANIMATION, names)
        strips.append(pixels(tmp_path / STRIP))
    plain, short, long = (strip[:, :, 0] if strip.ndim == 3 else strip for strip in strips)
    assert plain.shape[0] == short.shape[0] == long.shape[0]
    rows, table = 3 * 76 + 16, 6 * 76 + 16
    assert np.array_equal(plain[-rows:, -table:], short[-rows:, -table:])
    left = short.shape[1] - table
    for row in range(3):
        bottom = short.shape[0] - 16 - (2 - row) * 76
        assert (short[bottom - 72 : bottom, :left] < 150).any()
    assert long.shape[1] < 24 * 20 + table


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (2, 2), (3, 3), (5, 3), (8, 4), (9, 3), (10, 5), (13, 4)])
def test_rows_are_full_where_one_column_more_makes_them_so(count, columns):
    assert full_columns(count) == columns


@pytest.mark.parametrize(
    ("num", "classes", "shown"), [(100, 0, 64), (5, 0, 5), (100, 10, 60), (25, 10, 25), (100, 1, 64), (100, 1000, 64)]
)
def test_a_grid_shows_whole_rows_of_classes(num, classes, shown):
    assert num_shown(num, classes) == shown
