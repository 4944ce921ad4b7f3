"""Averages of the weights over a training: exponential and power-function averages.

An average is ema ← β ema + (1 − β) θ after each update. Only β, a function of the update, decides how long it
remembers. The power functions are those of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of
Diffusion Models" (EDM2), section 3. After the training `posthoc` combines snapshots of two of them into an average of
any other length. Time is counted in updates: t = 1 after the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vdiff.errors import OptionError
from vdiff.models.denoiser import Denoiser
from vdiff.training.weights import copy_sharing, frozen, like, load_without, local, state_without, trainable

MODEL, TEACHER = "ema", "self_teacher"
TRACKED = (0.05, 0.10)
MAX_SIGMA_REL = 12**-0.5


# How much each average remembers


@dataclass(frozen=True)
class Exponential:
    """β(n) = (d − dⁿ⁺¹)/(1 − dⁿ⁺¹) with d = `decay`: weights of k updates ago count dᵏ times as much as the newest.

    The average is Σₖ d^(n−k) θₖ / Σₖ d^(n−k) over the weights θₖ after the updates k = 0 … n: an average that began at
    zero, divided by 1 − dⁿ⁺¹ (bias correction; Kingma & Ba 2015, section 3; Berthelot et al. 2023). It does not contain
    the initial weights. Without a warm-up, d means the same in every update; d = 1 is the plain mean.
    """

    decay: float

    @property
    def name(self) -> str:
        """`ema_0.999`."""
        return f"ema_{self.decay}"

    def decay_at(self, step: int) -> float:
        """β of update `step` (from 0)."""
        if self.decay == 1:
            return step / (step + 1)
        power = self.decay ** (step + 1)
        return (self.decay - power) / (1 - power)


@dataclass(frozen=True)
class PowerFunction:
    """β(t) = (1 − 1/t)^(γ + 1), t = n + 1, which makes the average θ̂_γ(t) = (γ + 1)/t^(γ + 1) ∫₀ᵗ τ^γ θ(τ) dτ.

    For τ ∈ (k − 1, k], θ(τ) are the weights after update k; then both forms are exactly equal (EDM2 equations 3 and 4).
    The average does not contain the initial weights, as β(1) = 0.

    Args:
        sigma_rel: standard deviation of the profile as a fraction of t; it determines γ.
    """

    sigma_rel: float

    @property
    def name(self) -> str:
        """`power_0.05`."""
        return f"power_{self.sigma_rel}"

    @cached_property
    def gamma(self) -> float:
        """The exponent γ."""
        return gamma_of(self.sigma_rel)

    def decay_at(self, step: int) -> float:
        """β of update `step` (from 0)."""
        return float((1 - 1 / (step + 1)) ** (self.gamma + 1))


Profile = Exponential | PowerFunction
"""The shape of an average: a `name` for files, and the decay β(n) at update n."""


def gamma_of(sigma_rel: float) -> float:
    """The γ ≥ 0 of a σ_rel in (0, √(1/12)]: the largest root of (γ + 2)² (γ + 3) = (γ + 1)/σ_rel².

    σ_rel is the standard deviation of p(τ) ∝ τ^γ on [0, t], divided by t (EDM2 equation 123). It is largest at γ = 0,
    the plain mean of all weights.

    With u = γ + 2 and s = 1/σ_rel² this is u³ + u² − s u + s = 0, and u = w − 1/3 removes the square:
    w³ − 3 m² w + q = 0 with m² = (s + 1/3)/3 and q = 2/27 + 4 s/3, whose largest root is 2 m cos(⅓ arccos(−q/(2 m³))).

    Raises:
        OptionError: no profile has this σ_rel.
    """
    if not 0 < sigma_rel < MAX_SIGMA_REL * (1 + 1e-12):
        raise OptionError(
            f"σ_rel {sigma_rel} is out of range: the profile τ^γ with γ ≥ 0 has none above {MAX_SIGMA_REL:.4f}",
            f"give one above 0 and below {MAX_SIGMA_REL:.4f}, such as 0.1",
        )
    s = sigma_rel**-2
    m = math.sqrt((s + 1 / 3) / 3)
    q = 2 / 27 + 4 * s / 3
    return 2 * m * math.cos(math.acos(max(-1.0, -q / (2 * m**3))) / 3) - 1 / 3 - 2


# The averages of a run


class Averages:
    """The averages of a denoiser's trainable weights: the one that is saved as the model, and others.

    The denoiser is the module itself, without DDP's wrapper. Its parameters are read in place, so it may be wrapped or
    compiled before or after. Every average keeps the memory format of the weights. Buffers are copied, not averaged.

    Attributes:
        model: the averaged denoiser, ready to use; the denoiser itself if `profile` is None.
        teacher: an averaged denoiser that the denoiser learns from; the denoiser itself if `of_teacher` is None.

    Args:
        profile: the shape of `model`.
        further: the shapes of the others. They are kept as tensors, one copy of the weights each.
        prepare: shards weights over processes; it is applied to the denoiser and to the averaged ones.
        of_teacher: the shape of `teacher`.

    Raises:
        ValueError: two of `further` have the same name.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        profile: Profile | None,
        further: Sequence[Profile] = (),
        prepare: Callable[[Denoiser], None] | None = None,
        of_teacher: Profile | None = None,
    ) -> None:
        if len({other.name for other in further}) < len(further):
            raise ValueError("two averages have the same name")
        self.profile, self.further = profile, tuple(further)
        fixed = frozen(denoiser)
        self._frozen = fixed.keys()
        self.model, self.teacher = (  # all share the frozen weights
            denoiser if each is None else copy_sharing(denoiser, fixed.values()).eval().requires_grad_(False)
            for each in (profile, of_teacher)
        )
        self._modules = [
            (name, module) for name, module in ((MODEL, self.model), (TEACHER, self.teacher)) if module is not denoiser
        ]
        if prepare is not None:  # after copying: sharded weights cannot be copied
            for module in (denoiser, *(module for _, module in self._modules)):
                prepare(module)
        learning = trainable(denoiser)
        self._names = list(learning)
        self._raw: list[Tensor] = [local(tensor) for tensor in learning.values()]
        self._buffers: list[Tensor] = list(denoiser.buffers())
        self._copied: list[list[Tensor]] = [list(module.buffers()) for _, module in self._modules]
        self._others = [[tensor.detach().clone() for tensor in learning.values()] for _ in self.further]
        averages = zip(self.further, self._others, strict=True)
        self._tracked = [(other, [local(tensor) for tensor in tensors]) for other, tensors in averages]
        for each, module in ((of_teacher, self.teacher), (profile, self.model)):
            if each is not None:
                weights = dict(module.named_parameters())
                self._tracked.insert(0, (each, [local(weights[name]) for name in self._names]))

    def decay_at(self, step: int) -> float:
        """β of the model's average at update `step` (from 0); 0 if there is no average."""
        return 0.0 if self.profile is None else self.profile.decay_at(step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights after update `step` (from 0) to each average, in one call each and without a device sync."""
        for profile, average in self._tracked:
            torch._foreach_lerp_(average, self._raw, 1 - profile.decay_at(step))
        for buffers in self._copied if self._buffers else ():
            torch._foreach_copy_(buffers, self._buffers)

    def named(self) -> dict[str, Mapping[str, Tensor]]:
        """Name of an average → name of a weight → tensor (a view), for resuming."""
        values: dict[str, Mapping[str, Tensor]] = {
            name: state_without(module, self._frozen) for name, module in self._modules
        }
        for profile, average in zip(self.further, self._others, strict=True):
            values[profile.name] = dict(zip(self._names, average, strict=True))
        return values

    @torch.no_grad()
    def load(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Restore every average from the result of `named`.

        Raises:
            KeyError, ValueError, RuntimeError: an average is missing, or belongs to another model.
        """
        for module_name, module in self._modules:
            load_without(module, values[module_name], self._frozen)
        for profile, average in zip(self.further, self._others, strict=True):
            for name, tensor in zip(self._names, average, strict=True):
                kept = values[profile.name][name]
                if kept.shape != tensor.shape:  # copy_ would broadcast a smaller one
                    raise ValueError(f"{name} has shape {tuple(kept.shape)}, not {tuple(tensor.shape)}")
                tensor.copy_(like(kept, tensor))


def profiles_of(
    *, ema: float, ema_more: Iterable[float], ema_profiles: bool
) -> tuple[Profile | None, tuple[Profile, ...]]:
    """The profile of the model's average and those of the others, from the settings of a run.

    Args:
        ema: decay of the model's average; 0 for no average.
        ema_more: decays of other averages.
        ema_profiles: whether to keep the power functions `TRACKED` too.
    """
    powers = [PowerFunction(sigma_rel) for sigma_rel in TRACKED] if ema_profiles else []
    return Exponential(ema) if ema else None, (*(Exponential(decay) for decay in ema_more), *powers)
