"""Parameterisations: the input of a network for z, its measure of the noise level, and the meaning of its output.

Every Gaussian diffusion a x + b ε is z = cos φ · x + sin φ · ε after a division by √(a² + b²), φ = atan(b/a). So a
network of another family keeps its own state, noise measure and output, and the rest of vdiff uses only z, φ and
`Prediction`. All formulas are regular at both ends, φ = 0 and φ = π/2, except for outputs that are noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from vdiff.diffusion.prediction import PREDICTION_TYPES, Prediction, from_v, from_x
from vdiff.diffusion.schedules import Schedule, alpha_sigma, coefficient, grid_angles
from vdiff.diffusion.weighting import OUTPUT, WEIGHTINGS
from vdiff.errors import suggestion

if TYPE_CHECKING:
    from torch import Tensor


class Parameterisation(ABC):
    """How a family of diffusion models uses its network.

    Attributes:
        name: its key in `PARAMETERISATIONS`.
        training: settings of `train.py` that suit the family.
    """

    name: ClassVar[str]
    training: ClassVar[Mapping[str, Any]] = {}

    @property
    def prediction(self) -> str:
        """The `prediction` in a checkpoint: the network's prediction type, or the family's name if it has only one."""
        return self.name

    @property
    def channel_factor(self) -> int:
        """The network's output channels, as a multiple of those of z."""
        return 1

    @property
    def predicts_noise(self) -> bool:
        """Whether the output is the noise, which carries no information about the image at zero signal."""
        return False

    def level(self, angle: Tensor) -> Tensor:
        """The family's measure of noise at φ (B,), float64: s = σ/α = tan φ, or another."""
        return angle.double().tan()

    def angle(self, level: Tensor) -> Tensor:
        """φ = atan s: the inverse of `level`, in its precision, as ONNX knows no arcs in float64."""
        return level.atan()

    @abstractmethod
    def state(self, z: Tensor, angle: Tensor) -> Tensor:
        """The network's input for z (B, …) at φ (B,)."""

    @abstractmethod
    def timestep(self, schedule: Schedule, t: Tensor) -> Tensor:
        """The network's timestep for the time t (B,): (B,) float64."""

    @abstractmethod
    def angle_of_timestep(self, schedule: Schedule, timestep: Tensor) -> Tensor:
        """φ (B,) for the network's timesteps (B,): the inverse of `timestep`."""

    @abstractmethod
    def read(self, z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
        """The prediction in the network's output at z and φ."""

    @abstractmethod
    def output_weight(self, logsnr: Tensor) -> Tensor:
        """w(λ) that turns the squared error of x̂ into that of the network's output."""

    @abstractmethod
    def describe(self, schedule: Schedule) -> str:
        """The network's timestep, as a formula."""

    def summary(self) -> str:
        """One line for people: the name, and the parameters."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]
        return ", ".join([self.name, *(f"{name} {value}" for name, value in values.items())])

    def student(self) -> Parameterisation:
        """The parameterisation of a few-step student: the same input, but a noise output gets another meaning."""
        return self

    def config_fields(self) -> dict[str, Any]:
        """`prediction` and `parameterisation` (name and parameters, None for `Vp`) of a checkpoint's configuration."""
        described = None if isinstance(self, Vp) else {"name": self.name, **asdict(self)}  # type: ignore[call-overload]
        return {"prediction": self.prediction, "parameterisation": described}


@dataclass(frozen=True)
class Vp(Parameterisation):
    """Variance preserving: the state is z itself, and the timestep is the index of the level, L·t − 1.

    Used by DDPM, iDDPM, ADM and Stable Diffusion, and vdiff's default.

    Args:
        predicts: "v", "x", "eps" or "both", see `PREDICTION_TYPES`.

    Raises:
        ValueError: an unknown prediction type.
    """

    name: ClassVar[str] = "vp"
    predicts: str = "v"

    def __post_init__(self) -> None:
        if self.predicts not in PREDICTION_TYPES:
            raise ValueError(f"unknown prediction type {self.predicts!r}, choose from {', '.join(PREDICTION_TYPES)}")

    @property
    def prediction(self) -> str:
        """What the network predicts."""
        return self.predicts

    @property
    def channel_factor(self) -> int:
        """2 for "both"."""
        return PREDICTION_TYPES[self.predicts].channel_factor

    @property
    def predicts_noise(self) -> bool:
        """Whether it predicts ε."""
        return self.predicts == "eps"

    def state(self, z: Tensor, angle: Tensor) -> Tensor:
        """z."""
        del angle
        return z

    def timestep(self, schedule: Schedule, t: Tensor) -> Tensor:
        """L·t − 1."""
        return schedule.timestep(t)

    def angle_of_timestep(self, schedule: Schedule, timestep: Tensor) -> Tensor:
        """φ((timestep + 1)/L)."""
        return grid_angles(schedule, (timestep.double() + 1) / schedule.label_scale)

    def read(self, z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
        """See `PREDICTION_TYPES`."""
        return PREDICTION_TYPES[self.predicts].read(z, output, angle)

    def output_weight(self, logsnr: Tensor) -> Tensor:
        """1 for x, SNR for ε, SNR + 1 for v and both."""
        return WEIGHTINGS[{"x": "constant", "eps": "snr"}.get(self.predicts, "snr_plus_one")](logsnr)

    def describe(self, schedule: Schedule) -> str:
        """L·t − 1."""
        return f"{schedule.label_scale} * t - 1"

    def student(self) -> Vp:
        """v in the place of ε."""
        return Vp("v") if self.predicts_noise else self


class OfLevel(Parameterisation):
    """A family with a timestep that is a function of its own noise level."""

    @abstractmethod
    def timestep_of_level(self, level: Tensor) -> Tensor:
        """The network's timestep for a level (B,)."""

    @abstractmethod
    def level_of_timestep(self, timestep: Tensor) -> Tensor:
        """The inverse of `timestep_of_level`."""

    def timestep(self, schedule: Schedule, t: Tensor) -> Tensor:
        """`timestep_of_level` for the level at t; at t = 0, for the least noise of the schedule."""
        return self.timestep_of_level(self.level(schedule.angle(t)))

    def angle_of_timestep(self, schedule: Schedule, timestep: Tensor) -> Tensor:
        """φ of the timestep's level."""
        del schedule
        return self.angle(self.level_of_timestep(timestep))


@dataclass(frozen=True)
class Edm(OfLevel):
    """EDM and related models: the state is x + s ε with s = tan φ, the input c_in · state, the output F.

    x̂ = c_skip · state + c_out F, c_skip = σ_d²/(s² + σ_d²), c_out = s σ_d/√(s² + σ_d²), c_in = 1/√(s² + σ_d²). With
    r = √(σ² + σ_d² α²), input = z/r and v̂ = α σ (1 − σ_d²)/r² · z − σ_d/r · F, where nothing becomes infinite. For
    σ_d = 1, F is −v̂. Source: Karras et al. 2022, table 1 and eq. 7; EDM2 is the same.

    Args:
        sigma_data: σ_d, the standard deviation of the data.
        scaled_input: off: c_in = 1, the "variance exploding" networks of Song et al. 2021.
        noise_output: F is −ε̂, c_skip = 1 and c_out = s, as in those networks; it divides by α.
        noise_scale, noise_offset: the timestep is `noise_scale` · ln s + `noise_offset`: ¼ ln s in EDM and EDM2,
            250 ln s in consistency_models, ln(s/2) in the "variance exploding" networks.

    Raises:
        ValueError: a number is not positive and finite.
    """

    name: ClassVar[str] = "edm"
    training: ClassVar[Mapping[str, Any]] = {
        "schedule": "edm",
        "weighting": OUTPUT,
        "noise_mean": -1.2,
        "noise_std": 1.2,
    }
    sigma_data: float = 0.5
    scaled_input: bool = True
    noise_output: bool = False
    noise_scale: float = 0.25
    noise_offset: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sigma_data", "noise_scale", "noise_offset"):
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value) or (value <= 0 and name != "noise_offset"):
                raise ValueError(f"{name} must be a positive number, got {value!r}")
        for name in ("scaled_input", "noise_output"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name} must be true or false, got {getattr(self, name)!r}")

    @property
    def predicts_noise(self) -> bool:
        """Whether F is −ε̂."""
        return self.noise_output

    def _radius(self, angle: Tensor) -> Tensor:
        """r = √(σ² + σ_d² α²) = α √(s² + σ_d²)."""
        return (angle.sin() ** 2 + self.sigma_data**2 * angle.cos() ** 2).sqrt()

    def state(self, z: Tensor, angle: Tensor) -> Tensor:
        """c_in · state: z/r, or z/α."""
        return coefficient(1 / (self._radius(angle) if self.scaled_input else angle.cos()), z) * z

    def timestep_of_level(self, level: Tensor) -> Tensor:
        """`noise_scale` · ln s + `noise_offset`."""
        return self.noise_scale * level.log() + self.noise_offset

    def level_of_timestep(self, timestep: Tensor) -> Tensor:
        """s for the timestep."""
        return ((timestep - self.noise_offset) / self.noise_scale).exp()

    def read(self, z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
        """v̂ from F."""
        if self.noise_output:
            alpha, sigma = alpha_sigma(angle, z)
            return from_x(z, (z + sigma * output) / alpha, angle)
        radius = self._radius(angle)
        of_z = angle.cos() * angle.sin() * (1 - self.sigma_data**2) / radius**2
        return from_v(z, coefficient(of_z, z) * z - coefficient(self.sigma_data / radius, z) * output, angle)

    def output_weight(self, logsnr: Tensor) -> Tensor:
        """1/c_out² = SNR + 1/σ_d², or SNR."""
        return logsnr.exp() + (0 if self.noise_output else self.sigma_data**-2)

    def describe(self, schedule: Schedule) -> str:
        """In s = σ/α."""
        del schedule
        offset = f" {self.noise_offset:+.6g}" if self.noise_offset else ""
        return f"{self.noise_scale:g} * ln(sigma/alpha){offset}"

    def student(self) -> Edm:
        """F by c_skip and c_out instead of −ε̂."""
        return Edm(self.sigma_data, self.scaled_input, False, self.noise_scale, self.noise_offset)


@dataclass(frozen=True)
class Flow(OfLevel):
    """Rectified flow: the state is (1 − τ) x + τ ε with τ = sin φ/(sin φ + cos φ), the output u = ε − x.

    With c = 1/(sin φ + cos φ) the state is c z, and v̂ = c ((α − σ) z + û). Used by SD3, FLUX, PixArt and others.
    Source: Liu et al. 2023, *Flow Straight and Fast*; Lipman et al. 2023, *Flow Matching for Generative Modeling*.

    Args:
        time_scale: the timestep is `time_scale` · τ: 1000 τ in diffusers, τ in FLUX's own class.

    Raises:
        ValueError: the scale is not positive and finite.
    """

    name: ClassVar[str] = "flow"
    training: ClassVar[Mapping[str, Any]] = {
        "schedule": "flow",
        "weighting": OUTPUT,
        "noise_mean": 0.0,
        "noise_std": 1.0,
    }
    time_scale: float = 1000.0

    def __post_init__(self) -> None:
        if type(self.time_scale) not in (int, float) or not 0 < self.time_scale < math.inf:
            raise ValueError(f"time_scale must be a positive number, got {self.time_scale!r}")

    def level(self, angle: Tensor) -> Tensor:
        """τ = sin φ/(sin φ + cos φ)."""
        sine = angle.double().sin()
        return sine / (sine + angle.double().cos())

    def angle(self, level: Tensor) -> Tensor:
        """φ = atan2(τ, 1 − τ)."""
        import torch

        return torch.atan2(level, 1 - level)

    def state(self, z: Tensor, angle: Tensor) -> Tensor:
        """c z."""
        return coefficient(1 / (angle.sin() + angle.cos()), z) * z

    def timestep_of_level(self, level: Tensor) -> Tensor:
        """`time_scale` · τ."""
        return self.time_scale * level

    def level_of_timestep(self, timestep: Tensor) -> Tensor:
        """τ for the timestep."""
        return timestep / self.time_scale

    def read(self, z: Tensor, output: Tensor, angle: Tensor) -> Prediction:
        """v̂ = c ((α − σ) z + û)."""
        total = angle.sin() + angle.cos()
        of_z = (angle.cos() - angle.sin()) / total
        return from_v(z, coefficient(of_z, z) * z + coefficient(1 / total, z) * output, angle)

    def output_weight(self, logsnr: Tensor) -> Tensor:
        """1/τ² = (1 + √SNR)²."""
        return (1 + (logsnr / 2).exp()) ** 2

    def describe(self, schedule: Schedule) -> str:
        """In τ."""
        del schedule
        return f"{self.time_scale:g} * sigma/(sigma + alpha)"


PARAMETERISATIONS: dict[str, type[Parameterisation]] = {kind.name: kind for kind in (Vp, Edm, Flow)}


def build_parameterisation(config: Mapping[str, Any]) -> Parameterisation:
    """The parameterisation with this name and these parameters.

    Raises:
        ValueError: the name or a parameter is unknown, or a value is invalid.
    """
    parameters = {key: value for key, value in config.items() if key != "name"}
    name = str(config.get("name"))
    if name not in PARAMETERISATIONS:
        raise ValueError(f"unknown parameterisation {name!r}; {suggestion(name, PARAMETERISATIONS)}")
    kind: Any = PARAMETERISATIONS[name]
    if unknown := sorted(parameters.keys() - {field.name for field in fields(kind)}):
        raise ValueError(f"parameterisation {name} has no parameter {unknown[0]}")
    built: Parameterisation = kind(**parameters)
    return built


def normal_angles(u: Tensor, mean: float, std: float) -> Tensor:
    """Angles for u (B,) uniform in [0, 1): ln tan φ ~ N(mean, std²), float64.

    As tan φ is EDM's s, this is its log-normal distribution of noise levels. As tan φ = τ/(1 − τ), it is also the
    logit-normal distribution of τ in a flow. A time shift s adds ln s to the mean.
    Source: Karras et al. 2022, table 1 (mean −1.2, deviation 1.2); Esser et al. 2024, section 3.1 (0 and 1).
    """
    import torch

    quantile = torch.special.ndtri(u.clamp(min=1e-12).double())
    return (mean + std * quantile).exp().atan()
