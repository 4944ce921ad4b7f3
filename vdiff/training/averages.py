"""Averages of the weights over a training: exponential ones, power-function ones, and any length of these afterwards.

An average is ema ← β ema + (1 − β) θ after each update; what it remembers is decided by β alone, as a function of the
update. The power functions are those of Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion
Models" (EDM2), section 3 and appendix C: snapshots of two of them let `reconstruct` make one of another length when the
training is over. Time is counted in updates everywhere: t = 1 after the first.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder, remove
from vdiff.models.checkpoint import read_metadata, read_tensors, write_tensors
from vdiff.models.denoiser import Denoiser
from vdiff.training.sharding import like, local, whole

MODEL, TEACHER = "ema", "self_teacher"
SNAPSHOT_FOLDER, SNAPSHOT_SUFFIX = "averages", ".safetensors"
NUM_SNAPSHOTS = 40
TRACKED = (0.05, 0.10)
MAX_SIGMA_REL = 12**-0.5
MAX_MISFIT = 0.1
RAMP_UP = 0.05

Floats = NDArray[np.float64]


# How much each average remembers


class Profile(Protocol):
    """The shape of an average's memory."""

    @property
    def name(self) -> str:
        """What the average is called in files."""

    def decay_at(self, step: int) -> float:
        """β of update `step` (from 0): the part of the average that is kept."""


@dataclass(frozen=True)
class Exponential:
    """β(n) = min(decay, (1 + n)/(10 + n)).

    The warm-up lets the first averages forget the initial weights: after n updates of it they keep about 9!/n⁹ (1e-9
    and less after a hundred).
    """

    decay: float

    @property
    def name(self) -> str:
        """`ema_0.999`."""
        return f"ema_{self.decay}"

    def decay_at(self, step: int) -> float:
        """β of update `step` (from 0)."""
        return min(self.decay, (1 + step) / (10 + step))


@dataclass(frozen=True)
class HalfLife:
    """β(n) = ½^(B / min(H, 0.05 (n + 1) B)): what is H images old weighs half, whatever the batch size B is.

    The warm-up is the ramp of Karras et al. 2022 (EDM), and not (1 + n)/(10 + n), because it is said in the same unit:
    the half-life is never longer than 5 % of the images seen so far. It forgets the initial weights at once, β(0) being
    2⁻²⁰.

    Args:
        images: H.
        batch_size: B, images in an update.
    """

    images: float
    batch_size: int

    @property
    def name(self) -> str:
        """`images_500000.0`."""
        return f"images_{self.images}"

    def decay_at(self, step: int) -> float:
        """β of update `step` (from 0)."""
        half_life = min(self.images, RAMP_UP * (step + 1) * self.batch_size)
        return float(0.5 ** (self.batch_size / half_life))


@dataclass(frozen=True)
class BiasCorrected:
    """β(n) = (d − dⁿ⁺¹)/(1 − dⁿ⁺¹): the average of the weights alone that were trained, each weighing d times the next.

    That is Σ_k d^(n−k) θ_k / Σ_k d^(n−k), what an average that began at zero gives once its bias is taken off
    (Kingma & Ba 2015, section 3); the initial weights have no part in it.
    """

    decay: float

    @property
    def name(self) -> str:
        """`corrected_0.5`."""
        return f"corrected_{self.decay}"

    def decay_at(self, step: int) -> float:
        """β of update `step` (from 0)."""
        power = self.decay ** (step + 1)
        return (self.decay - power) / (1 - power)


@dataclass(frozen=True)
class PowerFunction:
    """β(t) = (1 − 1/t)^(γ + 1), t = n + 1, which makes the average θ̂_γ(t) = (γ + 1)/t^(γ + 1) ∫₀ᵗ τ^γ θ(τ) dτ.

    The weights θ(τ) are those after update k for τ ∈ (k − 1, k]; then the two are the same exactly (EDM2 equations 3
    and 4). The initial weights have no part in it, β(1) being 0.

    Args:
        sigma_rel: standard deviation of the profile, as a part of t; γ follows from it.
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


def sigma_rel_of(gamma: float) -> float:
    """σ_rel = √((γ + 1)/((γ + 2)² (γ + 3))): the standard deviation of p(τ) ∝ τ^γ on [0, t], divided by t.

    It falls from √(1/12) at γ = 0, the plain mean of all weights, towards 0 (EDM2 equation 123).
    """
    return math.sqrt((gamma + 1) / ((gamma + 2) ** 2 * (gamma + 3)))


def gamma_of(sigma_rel: float) -> float:
    """The γ ≥ 0 of a σ_rel in (0, √(1/12)]: the largest root of (γ + 2)² (γ + 3) = (γ + 1)/σ_rel².

    With u = γ + 2 and s = 1/σ_rel² that is u³ + u² − s u + s = 0, and u = w − 1/3 takes the square away:
    w³ − 3 m² w + q = 0 with m² = (s + 1/3)/3 and q = 2/27 + 4 s/3, whose largest root is 2 m cos(⅓ arccos(−q/(2 m³))).

    Raises:
        OptionError: there is no such profile.
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
    """The averages of a denoiser's weights: the one that is the model, and further ones of other lengths.

    The denoiser is the bare one, not what DDP or an optimiser make of it; its parameters are read where they are, so
    wrapping it or compiling it in place before or after makes no difference. Every average keeps the memory format of
    the weights. Buffers are copied, not averaged.

    Attributes:
        model: the averaged denoiser, ready to use; the denoiser itself where `profile` is None.
        teacher: an averaged denoiser that the denoiser learns from; the denoiser itself where `of_teacher` is None.

    Args:
        profile: of `model`.
        further: of the others, which are only kept as tensors: one more copy of the weights each.
        prepare: what shares weights out over processes; it is done to the denoiser and to the averaged ones alike.
        of_teacher: of `teacher`.

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
        self.model, self.teacher = (
            denoiser if each is None else copy.deepcopy(denoiser).eval().requires_grad_(False)
            for each in (profile, of_teacher)
        )
        self._modules = [
            (name, module) for name, module in ((MODEL, self.model), (TEACHER, self.teacher)) if module is not denoiser
        ]
        if prepare is not None:  # after the copies: what is shared out cannot be copied
            for module in (denoiser, *(module for _, module in self._modules)):
                prepare(module)
        self._names = [name for name, _ in denoiser.named_parameters()]
        self._raw: list[Tensor] = [local(tensor) for tensor in denoiser.parameters()]
        self._buffers: list[Tensor] = list(denoiser.buffers())
        self._copied: list[list[Tensor]] = [list(module.buffers()) for _, module in self._modules]
        self._others = [[tensor.detach().clone() for tensor in denoiser.parameters()] for _ in self.further]
        averages = zip(self.further, self._others, strict=True)
        self._tracked = [(other, [local(tensor) for tensor in tensors]) for other, tensors in averages]
        for each, module in ((of_teacher, self.teacher), (profile, self.model)):
            if each is not None:
                self._tracked.insert(0, (each, [local(tensor) for tensor in module.parameters()]))

    def decay_at(self, step: int) -> float:
        """β of the model's average at update `step` (from 0); 0 where there is none."""
        return 0.0 if self.profile is None else self.profile.decay_at(step)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after update `step` (from 0): one call for each average, and no wait for the device."""
        for profile, average in self._tracked:
            torch._foreach_lerp_(average, self._raw, 1 - profile.decay_at(step))
        for buffers in self._copied if self._buffers else ():
            torch._foreach_copy_(buffers, self._buffers)

    def named(self) -> dict[str, Mapping[str, Tensor]]:
        """Name of an average → name of a weight → tensor: what resuming needs. They are views, not copies."""
        values: dict[str, Mapping[str, Tensor]] = {name: module.state_dict() for name, module in self._modules}
        for profile, average in zip(self.further, self._others, strict=True):
            values[profile.name] = dict(zip(self._names, average, strict=True))
        return values

    @torch.no_grad()
    def load(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Bring every average back to what `named` said.

        Raises:
            KeyError, ValueError, RuntimeError: one is missing, or of another model.
        """
        for module_name, module in self._modules:
            weights = dict(module.named_parameters())
            found = values[module_name].items()
            module.load_state_dict({name: like(tensor, weights.get(name, tensor)) for name, tensor in found})
        for profile, average in zip(self.further, self._others, strict=True):
            for name, tensor in zip(self._names, average, strict=True):
                kept = values[profile.name][name]
                if kept.shape != tensor.shape:  # copy_ would repeat a smaller one
                    raise ValueError(f"{name} is {tuple(kept.shape)} where {tuple(tensor.shape)} is due")
                tensor.copy_(like(kept, tensor))


def profiles_of(
    *, ema: float, ema_images: float, ema_more: Iterable[float], ema_profiles: bool, batch_size: int
) -> tuple[Profile | None, tuple[Profile, ...]]:
    """The profile of the model and those of the further averages, as the settings of a run say them.

    Args:
        ema: decay of the model's average; 0 for none.
        ema_images: its half-life in images instead, where it is not 0.
        ema_more: decays of further ones.
        ema_profiles: whether the power functions `TRACKED` are kept as well.
    """
    profile: Profile | None = Exponential(ema) if ema else None
    if ema_images:
        profile = HalfLife(ema_images, batch_size)
    powers = [PowerFunction(sigma_rel) for sigma_rel in TRACKED] if ema_profiles else []
    return profile, (*(Exponential(decay) for decay in ema_more), *powers)


# Snapshots


@dataclass(frozen=True)
class Snapshot:
    """The further averages of a run as they were after update `step`.

    Attributes:
        images: seen until then.
        names: of the averages.
    """

    path: Path
    step: int
    images: int
    names: tuple[str, ...]

    @property
    def sigma_rels(self) -> list[float]:
        """The lengths of its power functions."""
        return self._numbers("power_")

    @property
    def decays(self) -> list[float]:
        """The decays of its exponential averages."""
        return self._numbers("ema_")

    def _numbers(self, prefix: str) -> list[float]:
        return [float(name.removeprefix(prefix)) for name in self.names if name.startswith(prefix)]


def is_snapshot_due(done: int, num_iters: int, interval: int | None) -> bool:
    """Whether a snapshot is due after `done` of `num_iters` updates: every `interval`, else 40 in all, and the end."""
    return done % (interval or math.ceil(num_iters / NUM_SNAPSHOTS)) == 0 or done == num_iters


def save_snapshot(folder: Path, averages: Averages, *, step: int, images: int, write: bool = True) -> None:
    """Write the further averages after update `step` to `folder`/averages, whole or not at all; without any, nothing.

    Power functions are kept in half precision as in EDM2, for there are many snapshots. It rounds as TF32 does, by 2e-4
    of a weight, and enters a reconstruction √Σ xᵢ² times: once for σ_rel from 0.05 on, five times for 0.03. Exponential
    averages are used as they are, so they are kept as they are. Every process calls this, since weights may be shared
    out over them; those with `write` write.
    """
    if not averages.further:
        return
    values = averages.named()
    tensors: dict[str, Tensor] = {}
    for profile in averages.further:
        stored = torch.float16 if isinstance(profile, PowerFunction) else torch.float32
        for name, tensor in values[profile.name].items():
            tensors[f"{profile.name}.{name}"] = whole(tensor).to("cpu", stored)
    weights = {name for name, _ in averages.model.named_parameters()}
    for name, tensor in averages.model.state_dict().items():
        if name not in weights:
            tensors[f"buffer.{name}"] = whole(tensor)
    names = " ".join(profile.name for profile in averages.further)
    if write:
        make_folder(folder / SNAPSHOT_FOLDER)
        write_tensors(_path(folder, step), tensors, {"step": str(step), "images": str(images), "averages": names})


def find_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of the run in `folder`, in the order of training; their tensors are not read.

    Raises:
        VdiffError: one is damaged.
    """
    found = []
    for path in _paths(folder):
        metadata = read_metadata(path)
        try:
            step, images, names = int(metadata["step"]), int(metadata["images"]), metadata["averages"].split()
        except (KeyError, ValueError):
            raise VdiffError(f"{path} is no snapshot of averages", "remove it, and give the command again") from None
        found.append(Snapshot(path, step, images, tuple(names)))
    return sorted(found, key=lambda snapshot: snapshot.step)


def drop_later_snapshots(folder: Path, step: int) -> None:
    """Remove the snapshots of updates behind `step`, from which the run in `folder` goes on: they will come again."""
    for path in _paths(folder):
        if int(path.stem) > step:
            remove(path)


def _path(folder: Path, step: int) -> Path:
    return folder / SNAPSHOT_FOLDER / f"{step:09d}{SNAPSHOT_SUFFIX}"


def _paths(folder: Path) -> list[Path]:
    """Only names that `save_snapshot` gives: a temporary file of a killed run is none."""
    return [path for path in (folder / SNAPSHOT_FOLDER).glob(f"*{SNAPSHOT_SUFFIX}") if path.stem.isdecimal()]


# Another length, afterwards


def inner_product(a: ArrayLike, gamma_a: ArrayLike, b: ArrayLike, gamma_b: ArrayLike) -> Floats:
    """⟨p_a, p_b⟩ = ∫ p_a p_b dτ of power-function profiles that end at a and b, elementwise in float64.

    With p_a(τ) = (γ_a + 1) τ^γ_a / a^(γ_a + 1) on [0, a] and m = min(a, b):

        ⟨p_a, p_b⟩ = (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · m^(γ_a + γ_b + 1) / (a^(γ_a + 1) b^(γ_b + 1)),

    in which only (the smaller end/the larger)^γ of the one that ends later is left, divided by the larger end
    (EDM2 equation 151 and algorithm 3).
    """
    a, gamma_a, b, gamma_b = (np.asarray(value, dtype=np.float64) for value in (a, gamma_a, b, gamma_b))
    later = np.where(a <= b, gamma_b, gamma_a)
    ratio = (np.minimum(a, b) / np.maximum(a, b)) ** later
    product: Floats = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * ratio / np.maximum(a, b)
    return product


def coefficients(
    times: Sequence[float], gammas: Sequence[float], time: float, sigma_rels: Sequence[float]
) -> tuple[Floats, Floats]:
    """The combinations of tracked profiles nearest to those of `sigma_rels` at `time`, and how far they are off.

    Each minimises ‖Σ xᵢ pᵢ − p‖²: A x = b with A the inner products of the tracked profiles and b those with p. Under
    the condition Σ xᵢ = 1, so that weights which do not change come out as they are, the minimum is x + μ A⁻¹ 1. In
    float64 the equations bear a thousand snapshots, though the condition number of A is 1e11: the misfit still falls.

    Args:
        times: at which the P tracked profiles end, in updates.
        gammas: their exponents.
        sigma_rels: R lengths.

    Returns:
        x (R, P), and ‖Σ xᵢ pᵢ − p‖/‖p‖ (R,).
    """
    t, g = np.asarray(times, dtype=np.float64), np.asarray(gammas, dtype=np.float64)
    wanted = np.asarray([gamma_of(sigma_rel) for sigma_rel in sigma_rels])
    a = inner_product(t[:, None], g[:, None], t, g)
    b = inner_product(t[:, None], g[:, None], time, wanted)
    solved = np.linalg.solve(a, np.column_stack([b, np.ones(len(t))]))
    free, ones = solved[:, :-1], solved[:, -1:]
    x = free + ones * (1 - free.sum(0)) / ones.sum()
    norm = inner_product(time, wanted, time, wanted)
    off = norm - 2 * (x * b).sum(0) + (x * (a @ x)).sum(0)
    return x.T, np.sqrt(np.maximum(0, off) / norm)


def reachable(snapshots: Sequence[Snapshot], step: int) -> tuple[float, float]:
    """The least and the greatest σ_rel, in thousandths, that `snapshots` can make at update `step` to within a tenth.

    Raises:
        VdiffError: they hold no power function.
    """
    _, times, gammas = _parts(snapshots, step)
    candidates = [k / 1000 for k in range(1, math.ceil(1000 * MAX_SIGMA_REL))]
    _, off = coefficients(times, gammas, step, candidates)
    good = [candidate for candidate, misfit in zip(candidates, off, strict=True) if misfit <= MAX_MISFIT]
    return good[0], good[-1]


def snapshot_at(folder: Path, snapshots: Sequence[Snapshot], at: int | None) -> Snapshot:
    """The snapshot of update `at`, the last one where it is None.

    Raises:
        VdiffError: there is none at all.
        OptionError: there is none of that update.
    """
    if not snapshots:
        raise VdiffError(
            f"{folder} holds no snapshots of averages", "train with --ema_profiles, or with --ema_more 0.999"
        )
    if at is None:
        return snapshots[-1]
    nearest = min(snapshots, key=lambda snapshot: abs(snapshot.step - at))
    if nearest.step != at:
        raise OptionError(
            f"--at {at}: {folder} holds no snapshot of that update", f"the nearest is --at {nearest.step}"
        )
    return nearest


@dataclass(frozen=True)
class Reconstruction:
    """A power-function average that was made from others.

    Attributes:
        weights: the state dict of a denoiser, in float32.
        snapshots: how many it was made from.
        misfit: how far its profile is off, as a part of the profile's norm; 0 where it was itself tracked.
    """

    sigma_rel: float
    weights: Mapping[str, Tensor]
    snapshots: int
    misfit: float


def reconstruct(folder: Path, sigma_rels: Sequence[float], at: int | None = None) -> list[Reconstruction]:
    """The power-function averages of these lengths at update `at`, from the snapshots of the run in `folder`.

    The snapshots are read one by one, once for all lengths, and summed in float64.

    Args:
        at: the update of a snapshot; None is the last.

    Raises:
        VdiffError: no snapshot holds a power function, or one is damaged or of another model.
        OptionError: no snapshot at `at`, or a σ_rel that these snapshots cannot make to within a tenth.
    """
    snapshots = find_snapshots(folder)
    end = snapshot_at(folder, snapshots, at)
    parts, times, gammas = _parts(snapshots, end.step)
    rows, misfits = coefficients(times, gammas, end.step, sigma_rels)
    count = len(set(times))
    for sigma_rel, misfit in zip(sigma_rels, misfits, strict=True):
        if misfit > MAX_MISFIT:
            low, high = reachable(snapshots, end.step)
            raise OptionError(
                f"σ_rel {sigma_rel}: made from {count} snapshot{'' if count == 1 else 's'} until update {end.step}, "
                f"its profile would be {misfit:.0%} off",
                f"give one from {low} to {high}, or train with a shorter --ema_interval",
            )
    sums: list[dict[str, Tensor]] = [{} for _ in sigma_rels]
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, torch.Size] = {}
    for k, (snapshot, name) in enumerate(parts):
        if not k or snapshot is not parts[k - 1][0]:
            tensors = read_tensors(snapshot.path)
        mine = _of(tensors, name)
        found = {key: tensor.shape for key, tensor in mine.items()}
        if not found or found != (shapes or found):
            raise VdiffError(f"{snapshot.path} is of another model than the first snapshot", "remove what is foreign")
        shapes = found
        for share, total in zip(rows[:, k], sums, strict=True):
            for key, tensor in mine.items():
                if not k:
                    total[key] = torch.zeros_like(tensor, dtype=torch.float64)
                total[key].add_(tensor, alpha=float(share))
    buffers = _of(tensors, "buffer")
    return [
        Reconstruction(
            sigma_rel, {**{key: sum_.float() for key, sum_ in total.items()}, **buffers}, count, float(misfit)
        )
        for sigma_rel, total, misfit in zip(sigma_rels, sums, misfits, strict=True)
    ]


def read_exponential(folder: Path, decay: float, at: int | None = None) -> dict[str, Tensor]:
    """The further exponential average with this decay at update `at`, as the state dict of a denoiser.

    Raises:
        VdiffError: there are no snapshots, or the file is damaged.
        OptionError: no snapshot at `at`, or no average with this decay.
    """
    snapshot = snapshot_at(folder, find_snapshots(folder), at)
    if decay not in snapshot.decays:
        kept = ", ".join(map(str, snapshot.decays))
        raise OptionError(
            f"--decay {decay}: {folder} kept no such average",
            f"it has {kept}" if kept else f"train with --ema_more {decay}",
        )
    tensors = read_tensors(snapshot.path)
    return {**_of(tensors, Exponential(decay).name), **_of(tensors, "buffer")}


def _parts(snapshots: Sequence[Snapshot], step: int) -> tuple[list[tuple[Snapshot, str]], list[float], list[float]]:
    """Every power function up to update `step`, in order: where it is, the update at which it ends, and its γ.

    Raises:
        VdiffError: there is none.
    """
    found = [
        (snapshot, PowerFunction(s)) for snapshot in snapshots if snapshot.step <= step for s in snapshot.sigma_rels
    ]
    if not found:
        raise VdiffError("the snapshots hold no power functions", "train with --ema_profiles")
    parts = [(snapshot, profile.name) for snapshot, profile in found]
    return parts, [float(snapshot.step) for snapshot, _ in found], [profile.gamma for _, profile in found]


def _of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
