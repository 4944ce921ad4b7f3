"""The numbers of steps of a ladder's stages. Without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence


def halving_plan(num_steps: int, to_steps: int) -> list[int]:
    """The students' numbers of steps, from `num_steps` down to `to_steps`: 64, 8 → [32, 16, 8].

    Each stage halves the steps, or divides them by the smallest factor of an odd remaining ratio: 250, 2 → [50, 10, 2].

    Raises:
        ValueError: `to_steps` does not divide `num_steps`.
    """
    plan = []
    if num_steps != to_steps or num_steps < 1:
        check_phase(num_steps, to_steps)
    while num_steps > to_steps:
        ratio = num_steps // to_steps
        num_steps //= next(factor for factor in range(2, ratio + 1) if ratio % factor == 0)
        plan.append(num_steps)
    return plan


def halving_start(num_steps: int, to_steps: int) -> int:
    """The largest number of steps up to `num_steps` that halving alone reduces to `to_steps`: 1000, 1 → 512."""
    return to_steps << ((num_steps // to_steps).bit_length() - 1)


def fitting_phases(phases: Sequence[int]) -> list[int]:
    """The decreasing list nearest to `phases`, by ratios, in which each number divides the previous one."""
    fitting = list(phases[:1])
    for wanted in phases[1:]:
        before = fitting[-1]
        divisors = [steps for steps in range(1, before) if before % steps == 0]
        fitting += [min(divisors, key=lambda steps: abs(math.log(steps / wanted)))] if divisors else []
    return fitting


def check_phase(num_steps: int, to_steps: int) -> None:
    """Refuse a stage if its steps do not lie on its teacher's grid.

    Raises:
        ValueError: `to_steps` is not a smaller divisor of `num_steps`.
    """
    if not 1 <= to_steps < num_steps or num_steps % to_steps:
        raise ValueError(f"{num_steps} steps cannot become {to_steps}: only a smaller divisor can follow")


def single_plan(num_steps: int, to_steps: int) -> list[int]:
    """All in one stage."""
    check_phase(num_steps, to_steps)
    return [to_steps]


def two_phase_plan(num_steps: int, to_steps: int) -> list[int]:
    """Two stages of about the same factor, or one stage if that factor would be 8 or less: 1024, 1 → [32, 1].

    Source: Berthelot et al. 2023, *TRACT*: 1024 → 32 → 1.
    """
    check_phase(num_steps, to_steps)
    ratio = num_steps // to_steps
    factors = [d for d in range(2, ratio) if ratio % d == 0]
    if ratio <= 8 or not factors:
        return [to_steps]
    # of two numbers equally near to the root, take the larger: the first phase is the easier one
    middle = min(factors, key=lambda d: (max(d, ratio // d), -d))
    return [to_steps * middle, to_steps]
