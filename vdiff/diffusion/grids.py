"""Grids: the times t_0 < … < t_N of a sampler with N steps; it evaluates the network at t_1 … t_N, and ends at t_0 = 0.

A distilled network was trained only at the times i/N of its own N: it needs `uniform`, with its N or a number that
divides N. The other grids are for networks trained at all times, or at all levels of a table.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TYPE_CHECKING

from vdiff.diffusion.schedules import Schedule, grid_times

if TYPE_CHECKING:
    from torch import Tensor

RHO = 7.0
"""The exponent of Karras et al. 2022."""

MOST_NOISE = 5.1
"""The largest log(σ/α) for the spacing of `logsnr` and `karras`, where the code of Lu et al. also cuts cosine
schedules. Steps at higher noise levels would be wasted on pure noise."""


def uniform(schedule: Schedule, num_steps: int) -> Tensor:
    """t_i = i/N; between the levels of a table, timesteps are fractions, which other libraries round.

    Raises:
        ValueError: fewer than one step, or more than a table has levels.
    """
    schedule.check_num_steps(num_steps)
    return grid_times(num_steps)


def trailing(schedule: Schedule, num_steps: int) -> Tensor:
    """t_i = round(L·i/N)/L, L = the schedule's `label_scale`: whole timesteps, and any N up to L.

    Equals `uniform` if N divides L. Halves are rounded to even. This is diffusers' trailing spacing, with timesteps
    L·t_i − 1.

    Raises:
        ValueError: fewer than one step, or more than L.
    """
    import torch

    size = schedule.label_scale
    schedule.check_num_steps(num_steps, size)
    levels = [round(Fraction(size * i, num_steps)) for i in range(num_steps + 1)]
    return torch.tensor(levels, dtype=torch.float64) / size


def logsnr(schedule: Schedule, num_steps: int) -> Tensor:
    """λ evenly spaced from t = 1 (or `MOST_NOISE`) to the first timestep t = 1/L, then one step to 0.

    On a table the nearest levels are taken, each once. Source: Lu et al. 2022, *DPM-Solver*.

    Raises:
        ValueError: fewer than one step, more than a table has levels.
    """
    return spaced(schedule, num_steps, lambda angle: -angle.tan().log(), lambda value: (-value).exp().atan())


def karras(schedule: Schedule, num_steps: int) -> Tensor:
    """(σ/α)^(1/ρ), ρ = 7, evenly spaced from t = 1 (or `MOST_NOISE`) to the first timestep t = 1/L, then one step to 0.

    On a table the nearest levels are taken, each once. Source: Karras et al. 2022, eq. 5.

    Raises:
        ValueError: fewer than one step, more than a table has levels.
    """
    return spaced(schedule, num_steps, lambda angle: angle.tan() ** (1 / RHO), lambda value: (value**RHO).atan())


def spaced(
    schedule: Schedule, num_steps: int, scale: Callable[[Tensor], Tensor], angle: Callable[[Tensor], Tensor]
) -> Tensor:
    """0, and N times from t = 1/L to 1, evenly spaced on `scale`(φ); `angle` is the inverse of `scale`.

    If the schedule goes beyond `MOST_NOISE`, the spacing starts there, but t_N is still 1.

    Raises:
        ValueError: fewer than one step, more than a table has levels.
    """
    import torch

    schedule.check_num_steps(num_steps)
    size = schedule.label_scale
    first, last = schedule.angle(torch.tensor([1 / size, 1], dtype=torch.float64))
    last = last.clamp(max=math.atan(math.exp(MOST_NOISE)))
    to_first = torch.arange(num_steps - 1, -1, -1, dtype=torch.float64) / max(num_steps - 1, 1)
    values = scale(last).lerp(scale(first), to_first)
    if schedule.num_levels is None:
        times = schedule.time(angle(values))
    else:
        table = scale(schedule.angle(grid_times(size)[1:]))
        times = _once_each((table[:, None] - values).abs().argmin(0) + 1, size) / size
    times[-1] = 1
    return torch.cat([times.new_zeros(1), times])


def _once_each(levels: Tensor, size: int) -> Tensor:
    """Increasing levels 1 … `size` (float64): equal ones are moved down, or up if too few levels are left below."""
    import torch

    moved: list[int] = []
    above = size + 1
    for place, level in reversed(list(enumerate(levels.tolist(), start=1))):
        above = max(min(level, above - 1), place)
        moved.append(above)
    return torch.tensor(moved[::-1], dtype=torch.float64)


def check_times(times: Tensor, num_steps: int) -> None:
    """Refuse times that are not a grid of `num_steps` steps.

    Raises:
        ValueError: not N + 1 increasing float64 times in [0, 1].
    """
    import torch

    if times.shape != (num_steps + 1,) or times.dtype != torch.float64:
        shape, dtype = tuple(times.shape), times.dtype
        raise ValueError(f"a grid of {num_steps} steps is {num_steps + 1} float64 times, got {shape} {dtype}")
    if not (times[0] >= 0 and times[-1] <= 1 and (times.diff() > 0).all()):
        raise ValueError(f"the times of a grid increase within [0, 1], got {times.tolist()}")


def grid_of(name: str, schedule: Schedule, num_steps: int) -> Tensor:
    """The times t_0 = 0 < … < t_N = 1 of the grid `name` of `num_steps` steps: (N + 1,) float64, on the CPU.

    A distilled checkpoint needs "uniform", with its own number of steps or one that divides it.

    Raises:
        ValueError: the name is unknown, or this schedule has no such grid.
    """
    if name not in GRIDS:
        raise ValueError(f"unknown grid {name!r}, choose from {', '.join(GRIDS)}")
    return GRIDS[name](schedule, num_steps)


GRIDS: dict[str, Callable[[Schedule, int], Tensor]] = {
    "uniform": uniform,
    "trailing": trailing,
    "logsnr": logsnr,
    "karras": karras,
}
