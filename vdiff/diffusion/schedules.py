"""Noise schedules: time t ∈ [0, 1] (0 is clean) → angle φ → (α, σ) = (cos φ, sin φ).

The angle determines the noise level: z = cos φ · x + sin φ · ε, SNR = cot² φ, log-SNR λ = −2 log tan φ. Angles are
float64; samplers, targets and losses compute sines and cosines before converting to the precision of the images.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate, pairwise
from operator import mul
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


MAX_LEVELS = 100_000
"""The longest table, so that damaged or hostile files cannot request a huge one."""


def check_count(name: str, value: object) -> None:
    """Refuse values that are not whole numbers from 1 to `MAX_LEVELS`.

    Raises:
        ValueError: the value is not.
    """
    if type(value) is not int or not 1 <= value <= MAX_LEVELS:
        raise ValueError(f"{name} must be a whole number from 1 to {MAX_LEVELS}, got {value!r}")


class Schedule(ABC):
    """A map from time to angle, and from time to the network's timestep.

    Attributes:
        label_scale: L in timestep(t) = L·t − 1.
        zero_snr: whether t = 1 is pure noise, φ = π/2, because the table was rescaled.
    """

    name: ClassVar[str]
    label_scale: int
    zero_snr: bool = False

    @property
    @abstractmethod
    def num_levels(self) -> int | None:
        """The number of noise levels of a table; None if every t ∈ [0, 1] is a level."""

    @property
    @abstractmethod
    def ends(self) -> tuple[float, float]:
        """φ at the first timestep, t = 1/L (of a table: at its first level), and at t = 1."""

    @abstractmethod
    def angle(self, t: Tensor) -> Tensor:
        """φ(t), float64, increasing in t; same shape as t."""

    @abstractmethod
    def time(self, angle: Tensor) -> Tensor:
        """t(φ), float64: the inverse of `angle`."""

    def timestep(self, t: Tensor) -> Tensor:
        """The network's timestep: L·t − 1, a real number.

        Level k of an L-step grid has k − 1, the integer timestep of other libraries. Equal noise levels have equal
        timesteps for any number of steps, so a student starts exactly aligned with its teacher.
        """
        return self.label_scale * t.double() - 1

    def logsnr(self, t: Tensor) -> Tensor:
        """λ(t) = log α²/σ² = −2 log tan φ(t)."""
        return logsnr(self.angle(t))

    def check_num_steps(self, num_steps: int, levels: int | None = None) -> None:
        """Refuse fewer than one step, or more than `levels` (default: those of the table).

        Steps need not divide the levels: between two of them angles are interpolated, and timesteps are fractions.

        Raises:
            ValueError: the number of steps is out of this range.
        """
        levels = levels or self.num_levels
        if num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {num_steps}")
        if levels is not None and num_steps > levels:
            raise ValueError(f"the {self.name} schedule has {levels} levels, too few for {num_steps} steps")

    def to_dict(self) -> dict[str, Any]:
        """Name and parameters, for a checkpoint's configuration; `zero_snr` only if it is set, as in old files."""
        values = {"name": self.name, **asdict(self)}  # type: ignore[call-overload]
        return {key: value for key, value in values.items() if key != "zero_snr" or value}


@dataclass(frozen=True)
class CosineSchedule(Schedule):
    """Continuous cosine schedule φ(t) = a·t + b, truncated so that λ stays within ±`logsnr_max`.

    b = atan e^(−logsnr_max/2), a = atan e^(logsnr_max/2) − b. With `logsnr_max` = ∞, φ(t) = πt/2.
    Source: Salimans & Ho 2022 (section 2 and the released code: λ ∈ [−20, 20]).
    """

    name: ClassVar[str] = "cosine"
    logsnr_max: float = 20.0
    label_scale: int = 1024

    def __post_init__(self) -> None:
        check_count("label_scale", self.label_scale)
        if not self.logsnr_max > 0:
            raise ValueError(f"logsnr_max must be positive, got {self.logsnr_max}")

    @property
    def num_levels(self) -> None:
        """Every t is a level."""
        return

    @property
    def first(self) -> float:
        """b, the angle at t = 0."""
        return math.atan(math.exp(-self.logsnr_max / 2))

    @property
    def span(self) -> float:
        """a, the angle from t = 0 to t = 1: π/2 − 2b, by symmetry."""
        return math.pi / 2 - 2 * self.first

    @property
    def ends(self) -> tuple[float, float]:
        """(a/L + b, a + b)."""
        return self.first + self.span / self.label_scale, self.first + self.span

    def angle(self, t: Tensor) -> Tensor:
        """φ(t) = a·t + b."""
        return self.span * t.double() + self.first

    def time(self, angle: Tensor) -> Tensor:
        """t = (φ − b)/a."""
        return (angle.double() - self.first) / self.span


@dataclass(frozen=True)
class EdmSchedule(Schedule):
    """Noise levels s = tan φ evenly spaced in s^(1/ρ), from `sigma_min` at t = 1/L to `sigma_max` at t = 1.

    So the uniform grid of L steps is EDM's grid of L steps, and the grid `karras` is EDM's for any number of steps.
    Source: Karras et al. 2022, *Elucidating the Design Space of Diffusion-Based Generative Models*, eq. 5.

    Raises:
        ValueError: the levels do not increase, or are so far apart that s would reach 0 before t does.
    """

    name: ClassVar[str] = "edm"
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    label_scale: int = 1024

    def __post_init__(self) -> None:
        check_count("label_scale", self.label_scale)
        if not (0 < self.sigma_min < self.sigma_max < math.inf and 0 < self.rho < math.inf):
            raise ValueError(f"need 0 < sigma_min < sigma_max and rho > 0, got {self}")
        low, high = self.roots
        if self.label_scale < 2 or not low * self.label_scale > high:
            raise ValueError(f"label_scale {self.label_scale} is too small for noise levels so far apart")

    @property
    def num_levels(self) -> None:
        """Every t is a level."""
        return

    @property
    def roots(self) -> tuple[float, float]:
        """s^(1/ρ) at t = 1/L and at t = 1."""
        return self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)

    @property
    def ends(self) -> tuple[float, float]:
        """(atan `sigma_min`, atan `sigma_max`)."""
        return math.atan(self.sigma_min), math.atan(self.sigma_max)

    def angle(self, t: Tensor) -> Tensor:
        """φ(t) = atan s, s^(1/ρ) linear in t."""
        low, high = self.roots
        part = (self.label_scale * t.double() - 1) / (self.label_scale - 1)
        return ((low + part * (high - low)) ** self.rho).atan()

    def time(self, angle: Tensor) -> Tensor:
        """The inverse of `angle`."""
        low, high = self.roots
        part = (angle.double().tan() ** (1 / self.rho) - low) / (high - low)
        return (part * (self.label_scale - 1) + 1) / self.label_scale


@dataclass(frozen=True)
class FlowSchedule(Schedule):
    """Rectified flow: z ∝ (1 − τ) x + τ ε with the time shift τ = s t/(1 + (s − 1) t), so that tan φ = s t/(1 − t).

    Source: Liu et al. 2023, *Flow Straight and Fast*; the shift: Esser et al. 2024, *Scaling Rectified Flow
    Transformers*, eq. 23. A dynamic shift by μ is s = e^μ.
    """

    name: ClassVar[str] = "flow"
    zero_snr: ClassVar[bool] = True  # type: ignore[misc]
    shift: float = 1.0
    label_scale: int = 1024

    def __post_init__(self) -> None:
        check_count("label_scale", self.label_scale)
        if not 0 < self.shift < math.inf:
            raise ValueError(f"shift must be positive, got {self.shift}")

    @property
    def num_levels(self) -> None:
        """Every t is a level."""
        return

    @property
    def ends(self) -> tuple[float, float]:
        """(atan2(s, L − 1), π/2)."""
        return math.atan2(self.shift, self.label_scale - 1), math.pi / 2

    def angle(self, t: Tensor) -> Tensor:
        """φ(t) = atan2(s t, 1 − t)."""
        import torch

        t = t.double()
        return torch.atan2(self.shift * t, 1 - t)

    def time(self, angle: Tensor) -> Tensor:
        """t = sin φ/(s cos φ + sin φ)."""
        sine, cosine = angle.double().sin(), angle.double().cos()
        return sine / (self.shift * cosine + sine)


@dataclass(frozen=True)
class VpSdeSchedule(Schedule):
    """The "variance preserving" SDE with β(t) = β_min + β_d t: tan² φ(t) = exp(β_d t²/2 + β_min t) − 1.

    It is the limit of `LinearSchedule` for many levels. Source: Song et al. 2021, *Score-Based Generative Modeling
    through Stochastic Differential Equations*, eq. 33, with the names of Karras et al. 2022, table 1.

    Raises:
        ValueError: a parameter is not positive and finite, or β_d < 0.
    """

    name: ClassVar[str] = "vp_sde"
    beta_d: float = 19.9
    beta_min: float = 0.1
    label_scale: int = 1024

    def __post_init__(self) -> None:
        check_count("label_scale", self.label_scale)
        if not (0 < self.beta_d < 1e3 and 0 < self.beta_min < 1e3):
            raise ValueError(f"need beta_d and beta_min between 0 and 1000, got {self}")

    @property
    def num_levels(self) -> None:
        """Every t is a level."""
        return

    @property
    def ends(self) -> tuple[float, float]:
        """φ at t = 1/L, and at t = 1."""
        first, last = (
            math.atan(math.sqrt(math.expm1(self.beta_d * t**2 / 2 + self.beta_min * t)))
            for t in (1 / self.label_scale, 1)
        )
        return first, last

    def angle(self, t: Tensor) -> Tensor:
        """φ(t) = atan √(exp(β_d t²/2 + β_min t) − 1)."""
        t = t.double()
        return (self.beta_d * t**2 / 2 + self.beta_min * t).expm1().sqrt().atan()

    def time(self, angle: Tensor) -> Tensor:
        """t = (√(β_min² + 2 β_d ln(1 + tan² φ)) − β_min)/β_d."""
        exponent = (angle.double().tan() ** 2).log1p()
        return ((self.beta_min**2 + 2 * self.beta_d * exponent).sqrt() - self.beta_min) / self.beta_d


class TableSchedule(Schedule):
    """A table of ᾱ_k at k = 1 … N: level k is t = k/N, level 0 is the clean image, and φ is linear in between.

    With `zero_snr` the betas are rescaled so that ᾱ_N = 0, before anything is derived from them.

    Raises:
        ValueError: a count is not a whole number from 1, the table is longer than `MAX_LEVELS`, a parameter is outside
            [0, 1), or `zero_snr` has a single level or no noise.
    """

    num_levels: int

    def __post_init__(self) -> None:
        for field in fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if field.name in ("num_levels", "labels_per_level"):
                check_count(field.name, value)
            elif field.name == "zero_snr":
                if type(value) is not bool:
                    raise ValueError(f"zero_snr must be true or false, got {value!r}")
            elif type(value) not in (int, float) or not 0 <= value < 1:
                raise ValueError(f"{field.name} must be a number from 0 to less than 1, got {value!r}")
        check_count("the number of labels", self.label_scale)
        if self.zero_snr and not any(self.plain_betas()[1:]):
            raise ValueError("zero_snr needs at least 2 levels, and noise after the first one")

    def alphas_cumprod(self) -> list[float]:
        """ᾱ_k = ∏_{j ≤ k} (1 − β_j) for k = 1 … N."""
        return list(accumulate((1 - beta for beta in self.betas()), mul))

    def betas(self) -> list[float]:
        """β_k, the variance that step k adds, k = 1 … N: `plain_betas`, or these rescaled to zero terminal SNR."""
        return to_zero_terminal_snr(self.plain_betas()) if self.zero_snr else self.plain_betas()

    @abstractmethod
    def plain_betas(self) -> list[float]:
        """β_k by the schedule's formula, k = 1 … N."""

    @cached_property
    def angles(self) -> list[float]:
        """φ_k for k = 0 … N: tan² φ_k = (1 − ᾱ_k)/ᾱ_k, φ_0 = 0."""
        return [0.0, *(math.atan2(math.sqrt(1 - a), math.sqrt(a)) for a in self.alphas_cumprod())]

    @cached_property
    def _array(self) -> np.ndarray:
        """`angles`, from which a tensor is made ten times as fast as from a list."""
        import numpy as np

        return np.array(self.angles)

    @property
    def ends(self) -> tuple[float, float]:
        """(φ_1, φ_N)."""
        return self.angles[1], self.angles[-1]

    def angle(self, t: Tensor) -> Tensor:
        """φ at t, linear between the levels of the table."""
        levels = t.double() * (len(self.angles) - 1)
        table = levels.new_tensor(self._array)
        below = levels.floor().clamp(0, len(self.angles) - 2).long()
        return table[below].lerp(table[below + 1], levels - below)

    def time(self, angle: Tensor) -> Tensor:
        """The inverse of `angle`."""
        import torch

        angle = angle.double()
        table = angle.new_tensor(self._array)
        below = (torch.searchsorted(table, angle.contiguous(), right=True) - 1).clamp(0, len(self.angles) - 2)
        return (below + (angle - table[below]) / (table[below + 1] - table[below])) / (len(self.angles) - 1)


@dataclass(frozen=True)
class DdpmCosineSchedule(TableSchedule):
    """Table of N levels with ᾱ_k ∝ cos²(((k/N) + s)/(1 + s)·π/2), s = 0.008, and β ≤ 0.999.

    Source: Nichol & Dhariwal 2021, *Improved Denoising Diffusion Probabilistic Models*, eq. 17.
    """

    name: ClassVar[str] = "ddpm_cosine"
    num_levels: int = 1024
    offset: float = 0.008
    max_beta: float = 0.999
    labels_per_level: int = 1
    zero_snr: bool = False

    @property
    def label_scale(self) -> int:  # type: ignore[override]
        """L = N, or a multiple of it: the labels of neighbouring levels are `labels_per_level` apart."""
        return self.num_levels * self.labels_per_level

    def plain_betas(self) -> list[float]:
        """β_k = min(1 − ᾱ_k/ᾱ_{k−1}, 0.999)."""

        def alpha_bar(k: int) -> float:
            return math.cos((k / self.num_levels + self.offset) / (1 + self.offset) * math.pi / 2) ** 2

        return [min(1 - alpha_bar(k) / alpha_bar(k - 1), self.max_beta) for k in range(1, self.num_levels + 1)]


@dataclass(frozen=True)
class SigmoidSchedule(TableSchedule):
    """Table of N levels with ᾱ_k ∝ s(3) − s(6 k/N − 3), s the logistic function, and β ≤ 0.999.

    Source: Jabri et al. 2023, *Scalable Adaptive Computation for Iterative Generation*, figure 8; the default of
    denoising-diffusion-pytorch.
    """

    name: ClassVar[str] = "sigmoid"
    num_levels: int = 1000
    max_beta: float = 0.999
    zero_snr: bool = False

    @property
    def label_scale(self) -> int:  # type: ignore[override]
        """L = N."""
        return self.num_levels

    def plain_betas(self) -> list[float]:
        """β_k = min(1 − ᾱ_k/ᾱ_{k−1}, 0.999)."""
        logistic = [1 / (1 + math.exp(3 - 6 * k / self.num_levels)) for k in range(self.num_levels + 1)]
        left = [logistic[-1] - value for value in logistic]
        return [min(1 - after / before, self.max_beta) for before, after in pairwise(left)]


@dataclass(frozen=True)
class LinearSchedule(TableSchedule):
    """Table of N levels with β rising linearly from 1e-4 to 0.02 (Ho et al. 2020, N = 1000)."""

    name: ClassVar[str] = "linear"
    num_levels: int = 1000
    first_beta: float = 1e-4
    last_beta: float = 0.02
    zero_snr: bool = False

    @property
    def label_scale(self) -> int:  # type: ignore[override]
        """L = N."""
        return self.num_levels

    def plain_betas(self) -> list[float]:
        """β_k = 1e-4 + (k − 1)/(N − 1)·(0.02 − 1e-4)."""
        n = self.num_levels
        return [self.first_beta + k / max(n - 1, 1) * (self.last_beta - self.first_beta) for k in range(n)]


@dataclass(frozen=True)
class ScaledLinearSchedule(LinearSchedule):
    """Table of N levels with √β rising linearly, over the range of `LinearSchedule`.

    Source: Rombach et al. 2022, *Latent Diffusion Models*; their released code uses 8.5e-4 to 0.012.
    """

    name: ClassVar[str] = "scaled_linear"

    def plain_betas(self) -> list[float]:
        """β_k = (√β_1 + (k − 1)/(N − 1)·(√β_N − √β_1))²."""
        n, first, last = self.num_levels, math.sqrt(self.first_beta), math.sqrt(self.last_beta)
        return [(first + k / max(n - 1, 1) * (last - first)) ** 2 for k in range(n)]


def to_zero_terminal_snr(betas: Sequence[float]) -> list[float]:
    """β_k with √ᾱ_k → (√ᾱ_k − √ᾱ_N) · √ᾱ_1/(√ᾱ_1 − √ᾱ_N): the first level stays, the last one has no signal.

    Source: Lin et al. 2024, *Common Diffusion Noise Schedules and Sample Steps are Flawed*, algorithm 1.
    """
    roots = [math.sqrt(kept) for kept in accumulate((1 - beta for beta in betas), mul)]
    scale = roots[0] / (roots[0] - roots[-1])
    rescaled = [(root - roots[-1]) * scale for root in roots]
    return [betas[0], *(1 - (here / before) ** 2 for before, here in pairwise(rescaled))]


def logsnr(angle: Tensor) -> Tensor:
    """λ = −2 log tan φ."""
    return -2 * angle.double().tan().log()


def grid_times(num_steps: int) -> Tensor:
    """t_i = i/N for i = 0 … N: shape (N + 1,), float64."""
    import torch

    return torch.arange(num_steps + 1, dtype=torch.float64) / num_steps


def grid_angles(schedule: Schedule, t: Tensor) -> Tensor:
    """φ(t) on a sampling grid, with φ = 0 at the end t = 0, which is the image itself.

    The cosine schedule's own φ(0) = 4.5e-5 would leave that much noise in the sample. With φ = 0 the last DDIM step is
    z_0 = cos φ_t · z − sin φ_t · v̂ = x̂, as in the released code, without a special case.
    """
    return schedule.angle(t) * (t > 0)


def coefficient(values: Tensor, like: Tensor) -> Tensor:
    """Convert per-image `values` (B,) to the type and device of `like` (B, …), shaped to multiply it.

    The type is converted first, as some devices have no float64.
    """
    return values.to(like.dtype).to(like.device).reshape(-1, *[1] * (like.ndim - 1))


def alpha_sigma(angle: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """(α, σ) = (cos φ, sin φ), computed in float64, then shaped to multiply `like`."""
    return coefficient(angle.cos(), like), coefficient(angle.sin(), like)


def diffuse(x: Tensor, eps: Tensor, angle: Tensor) -> Tensor:
    """z = α x + σ ε: x and eps (B, …), angle (B,)."""
    alpha, sigma = alpha_sigma(angle, x)
    return alpha * x + sigma * eps


def build_schedule(config: Mapping[str, Any]) -> Schedule:
    """The schedule that `Schedule.to_dict` described.

    Raises:
        ValueError: the name or a parameter is unknown.
    """
    parameters = {key: value for key, value in config.items() if key != "name"}
    name = config.get("name")
    if name not in SCHEDULES:
        raise ValueError(f"unknown schedule {name!r}, choose from {', '.join(SCHEDULES)}")
    known = {field.name for field in fields(SCHEDULES[name])}  # type: ignore[arg-type]
    if unknown := set(parameters) - known:
        raise ValueError(
            f"schedule {name} has no parameter {', '.join(sorted(unknown))}, only {', '.join(sorted(known))}"
        )
    return SCHEDULES[name](**parameters)


SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule
    for schedule in (
        CosineSchedule,
        DdpmCosineSchedule,
        LinearSchedule,
        ScaledLinearSchedule,
        SigmoidSchedule,
        VpSdeSchedule,
        EdmSchedule,
        FlowSchedule,
    )
}
