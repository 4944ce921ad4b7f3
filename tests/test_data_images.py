"""Tensors to pictures: exact round trips, whole files, grids that show every pixel."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from vdiff.data.images import captioned_grid, cell_scale, make_grid, save_png, to_pil
from vdiff.models.codec import from_uint8, to_uint8


def test_every_level_survives_the_round_trip() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(from_uint8(levels)), levels)
    assert from_uint8(levels)[[0, 255]].tolist() == [-1.0, 1.0]
    for dtype in (torch.float64, torch.float16):  # bfloat16 has fewer than 256 levels near 1
        assert torch.equal(to_uint8(from_uint8(levels).to(dtype)), levels)


def test_values_are_rounded_to_the_nearest_level_and_clamped() -> None:
    x = torch.tensor([-7.0, -1, 0.5 / 127.5 - 1 - 1e-4, 0.5 / 127.5 - 1 + 1e-4, 1, 1e30])
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 255, 255]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_never_turned_into_black(bad: float) -> None:
    with pytest.raises(ValueError, match=r"1 of 3 .*torch\.float16"):
        to_uint8(torch.tensor([0, bad, 1], dtype=torch.float16))


def test_wrong_dtypes_and_shapes_are_named() -> None:
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        to_uint8(torch.zeros(1, dtype=torch.uint8))
    with pytest.raises(ValueError, match=r"torch\.float32"):
        from_uint8(torch.zeros(1))
    with pytest.raises(ValueError, match=r"\(2, 4, 4\)"):
        to_pil(torch.zeros(2, 4, 4))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_pixels(tmp_path: Path, channels: int) -> None:
    pixels = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    save_png(from_uint8(pixels), tmp_path / "a.png")
    with PIL.Image.open(tmp_path / "a.png") as image:
        assert image.mode == ("L" if channels == 1 else "RGB")
        got = np.asarray(image).reshape(5, 7, channels).transpose(2, 0, 1)
    np.testing.assert_array_equal(got, pixels.numpy())
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("channels", [1, 3])
def test_a_grid_places_images_in_reading_order(channels: int) -> None:
    images = torch.linspace(-1, 0.5, 5)[:, None, None, None].expand(5, channels, 2, 3)
    grid = make_grid(images, columns=3, padding=1)
    assert grid.shape == (channels, 2 * 3 + 1, 3 * 4 + 1)
    for index in range(5):
        row, column = divmod(index, 3)
        cell = grid[:, 1 + row * 3 : 3 + row * 3, 1 + column * 4 : 4 + column * 4]
        assert torch.equal(cell, images[index])
    assert (grid[:, 0] == 1).all()


def test_a_grid_enlarges_small_images_without_smoothing() -> None:
    images = torch.rand(3, 1, 2, 3) * 2 - 1
    grid = make_grid(images, columns=2, padding=1, scale=4)
    assert grid.shape == (1, 2 * 9 + 1, 2 * 13 + 1)
    for k in range(3):
        top, left = 1 + k // 2 * 9, 1 + k % 2 * 13
        assert torch.equal(grid[:, top : top + 8, left : left + 12], torch.kron(images[k], torch.ones(1, 4, 4)))
    assert [cell_scale(torch.zeros(1, size, size)) for size in (8, 32, 71, 72, 256)] == [9, 3, 2, 1, 1]


def test_a_captioned_grid_shows_every_pixel_enlarged() -> None:
    image = from_uint8(torch.randint(0, 200, (3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)))
    picture = captioned_grid([[image, image], [image, image]], ["a", "b\nc"], ["r", "s"], "title")
    cell = np.asarray(to_pil(image)).repeat(9, 0).repeat(9, 1)
    pixels = np.asarray(picture)
    assert (pixels[:16] == 255).all()
    assert (pixels[:, :16] == 255).all()
    found = [
        (y, x)
        for y, x in np.argwhere((pixels == cell[0, 0]).all(-1))
        if (pixels[y : y + 72, x : x + 72].shape == cell.shape) and (pixels[y : y + 72, x : x + 72] == cell).all()
    ]
    (top, left), (top2, right), (bottom, left2), _ = found
    assert (top, left) == (top2, left2)
    assert right - left >= 72
    assert bottom - top >= 72
    assert (pixels[16:top, left : left + 72] < 128).any()  # words above


def test_a_captioned_grid_checks_its_titles() -> None:
    image = torch.zeros(1, 4, 4)
    for rows, columns, titles in [
        ([[image], [image, image]], ["a"], None),
        ([[image]], ["a", "b"], None),
        ([[image]], ["a"], ["b", "c"]),
        ([], [], None),
    ]:
        with pytest.raises(ValueError, match=r"rows|images"):
            captioned_grid(rows, columns, titles)


def test_the_scale_can_be_given() -> None:
    small, large = (captioned_grid([[torch.zeros(1, 4, 4)]], [""], scale=scale) for scale in (1, 10))
    assert large.width - small.width == 36
