"""From how many steps to how many: the stages on the way to few steps. Without torch."""

from __future__ import annotations


def halving_plan(num_steps: int, to_steps: int) -> list[int]:
    """The students' numbers of steps, from `num_steps` down to `to_steps`: 64, 8 → [32, 16, 8].

    Raises:
        ValueError: halving never leads from one to the other.
    """
    plan = []
    steps = num_steps
    while steps > to_steps:
        if steps % 2:
            raise ValueError(f"{steps} steps cannot be halved on the way from {num_steps} to {to_steps}")
        steps //= 2
        plan.append(steps)
    if steps != to_steps or to_steps < 1:
        raise ValueError(f"halving {num_steps} steps never gives {to_steps}")
    return plan


def check_phase(num_steps: int, to_steps: int) -> None:
    """Refuse a stage whose steps do not lie on its teacher's.

    Raises:
        ValueError: `to_steps` is not a smaller number that divides `num_steps`.
    """
    if not 1 <= to_steps < num_steps or num_steps % to_steps:
        raise ValueError(f"{num_steps} steps cannot become {to_steps}: a smaller number that divides them can follow")


def single_plan(num_steps: int, to_steps: int) -> list[int]:
    """All in one stage."""
    check_phase(num_steps, to_steps)
    return [to_steps]


def two_phase_plan(num_steps: int, to_steps: int) -> list[int]:
    """Two stages, each shortening by about the same factor, or one where that would be 8 or less: 1024, 1 → [32, 1].

    Source: Berthelot et al. 2023, *TRACT*: 1024 → 32 → 1.
    """
    check_phase(num_steps, to_steps)
    ratio = num_steps // to_steps
    factors = [d for d in range(2, ratio) if ratio % d == 0]
    if ratio <= 8 or not factors:
        return [to_steps]
    # of two that are as near to the root, the larger: the first phase is the easier one
    middle = min(factors, key=lambda d: (max(d, ratio // d), -d))
    return [to_steps * middle, to_steps]
