"""The way from one image to another: spherical interpolation of their noise."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vdiff.diffusion.noise import ImageNoise


def slerp(a: Tensor, b: Tensor, positions: Tensor) -> Tensor:
    """sin((1 − u) θ)/sin θ · a + sin(u θ)/sin θ · b, θ the angle between a and b: (N, …) for N positions u.

    At u = 0 exactly a, at u = 1 exactly b; in between the length passes evenly from that of a to that of b, as noise
    of many dimensions has it. Source: Shoemake 1985; for DDIM's noise, Song et al. 2021, section 5.3.

    Raises:
        ValueError: a and b point the same way, or opposite ways.
    """
    x, y, u = a.double(), b.double(), positions.double().reshape(-1, *[1] * a.ndim)
    theta = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    if not theta.sin() > 1e-6:
        raise ValueError("between noise of the same direction, or of opposite ones, there is no single shortest way")
    return ((((1 - u) * theta).sin() * x + (u * theta).sin() * y) / theta.sin()).to(a.dtype)


class PathNoise:
    """Like `ImageNoise`, for images on the way from image A to image B of a seed: every draw is the `slerp` of theirs.

    So the ends are the images A and B themselves, also where a sampler adds noise.

    Args:
        ends: A and B.
        positions: of the B images, 0 at A and 1 at B.
    """

    def __init__(
        self,
        *,
        seed: int,
        ends: tuple[int, int],
        positions: Sequence[float],
        shape: tuple[int, int, int],
        device: str | torch.device = "cpu",
    ) -> None:
        self.ends = ImageNoise(seed=seed, indices=ends, shape=shape)
        self.positions = torch.tensor(positions, dtype=torch.float64)
        self.device = device

    def __call__(self) -> Tensor:
        a, b = self.ends()
        return slerp(a, b, self.positions).to(self.device)


def nearer_end(position: float, first: int, last: int) -> int:
    """The end that a position from 0 to 1 is nearer to; the first one from halfway."""
    return first if position <= 0.5 else last
