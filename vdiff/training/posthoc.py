"""Snapshots of a run's averages, and averages of any length computed from them after the training.

The method of Karras et al. 2024 (EDM2), appendix C: the profiles of two power-function averages at many updates are
combined into the best approximation of the desired profile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from vdiff.errors import OptionError, VdiffError
from vdiff.files import make_folder, remove
from vdiff.models.checkpoint import WEIGHTS, read_metadata, read_tensors, write_tensors
from vdiff.models.reading import read_shapes
from vdiff.text import plural
from vdiff.training.averages import MAX_SIGMA_REL, Averages, Exponential, PowerFunction, gamma_of
from vdiff.training.weights import whole

SNAPSHOT_FOLDER, SNAPSHOT_SUFFIX = "averages", ".safetensors"
NUM_SNAPSHOTS = 40
MAX_MISFIT = 0.1

Floats = NDArray[np.float64]


# Snapshots


@dataclass(frozen=True)
class Snapshot:
    """The additional averages of a run after update `step`.

    Attributes:
        images: number of images seen until then.
        names: names of the averages.
    """

    path: Path
    step: int
    images: int
    names: tuple[str, ...]

    @property
    def sigma_rels(self) -> list[float]:
        """The lengths of the power functions."""
        return self._numbers("power_")

    @property
    def decays(self) -> list[float]:
        """The decays of the exponential averages."""
        return self._numbers("ema_")

    def _numbers(self, prefix: str) -> list[float]:
        return [float(name.removeprefix(prefix)) for name in self.names if name.startswith(prefix)]


def is_snapshot_due(done: int, num_iters: int, interval: int | None) -> bool:
    """Whether to take a snapshot after update `done` of `num_iters`: every `interval` (0: 40 in all) and at the end."""
    return done % (interval or math.ceil(num_iters / NUM_SNAPSHOTS)) == 0 or done == num_iters


def save_snapshot(folder: Path, averages: Averages, *, step: int, images: int, write: bool = True) -> None:
    """Write the additional averages, if any, after update `step` to `folder`/averages, whole or not at all.

    Power functions are stored in half precision as in EDM2, because there are many snapshots. This rounds as TF32 does,
    by 2e-4 of a weight, and a reconstruction multiplies the error by √Σ xᵢ²: by 1 for σ_rel from 0.05 on, by 5 for
    0.03. Exponential averages are used directly, and stored in full precision. Every process calls this, since weights
    may be sharded; those with `write` write.
    """
    if not averages.further:
        return
    values = averages.named()
    tensors: dict[str, Tensor] = {}
    for profile in averages.further:
        stored = torch.float16 if isinstance(profile, PowerFunction) else torch.float32
        for name, tensor in whole(values[profile.name]).items():
            tensors[f"{profile.name}.{name}"] = tensor.to("cpu", stored)
    weights = {name for name, _ in averages.model.named_parameters()}
    for name, tensor in averages.model.state_dict().items():
        if name not in weights:
            tensors[f"buffer.{name}"] = tensor
    names = " ".join(profile.name for profile in averages.further)
    if write:
        make_folder(folder / SNAPSHOT_FOLDER)
        write_tensors(_path(folder, step), tensors, {"step": str(step), "images": str(images), "averages": names})


def find_snapshots(folder: Path) -> list[Snapshot]:
    """The snapshots of the run in `folder`, in the order of training, without reading their tensors.

    Raises:
        VdiffError: a snapshot is damaged.
    """
    found = []
    for path in _paths(folder):
        metadata = read_metadata(path)
        try:
            step, images, names = int(metadata["step"]), int(metadata["images"]), metadata["averages"].split()
        except (KeyError, ValueError):
            raise VdiffError(f"{path} is not a snapshot of averages", "remove it, and run the command again") from None
        found.append(Snapshot(path, step, images, tuple(names)))
    return sorted(found, key=lambda snapshot: snapshot.step)


def drop_later_snapshots(folder: Path, step: int) -> None:
    """Remove the snapshots of updates after `step`, from which the run in `folder` continues: they will be repeated."""
    for path in _paths(folder):
        if int(path.stem) > step:
            remove(path)


def _path(folder: Path, step: int) -> Path:
    return folder / SNAPSHOT_FOLDER / f"{step:09d}{SNAPSHOT_SUFFIX}"


def _paths(folder: Path) -> list[Path]:
    """Only files named by `save_snapshot`, not temporary files of a killed run."""
    return [path for path in (folder / SNAPSHOT_FOLDER).glob(f"*{SNAPSHOT_SUFFIX}") if path.stem.isdecimal()]


# Averages of other lengths


def inner_product(a: ArrayLike, gamma_a: ArrayLike, b: ArrayLike, gamma_b: ArrayLike) -> Floats:
    """⟨p_a, p_b⟩ = ∫ p_a p_b dτ of power-function profiles that end at a and b, elementwise in float64.

    With p_a(τ) = (γ_a + 1) τ^γ_a / a^(γ_a + 1) on [0, a] and m = min(a, b):

        ⟨p_a, p_b⟩ = (γ_a + 1)(γ_b + 1)/(γ_a + γ_b + 1) · m^(γ_a + γ_b + 1) / (a^(γ_a + 1) b^(γ_b + 1)),

    which reduces to (m/max(a, b))^γ/max(a, b) times the first factor, with the γ of the profile that ends later
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
    """The combinations of tracked profiles nearest to those of `sigma_rels` at `time`, and their errors.

    Each minimises ‖Σ xᵢ pᵢ − p‖²: A x = b, where A holds the inner products of the tracked profiles and b those with p.
    With the constraint Σ xᵢ = 1, which preserves constant weights, the minimum is x + μ A⁻¹ 1. In float64 this works
    for a thousand snapshots, although the condition number of A is 1e11: the misfit still falls.

    Args:
        times: the ends of the P tracked profiles, in updates.
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
    """The least and the greatest σ_rel, in thousandths, with a misfit up to 0.1 from `snapshots` at update `step`.

    Raises:
        VdiffError: the snapshots hold no power function.
    """
    _, times, gammas = _parts(snapshots, step)
    candidates = [k / 1000 for k in range(1, math.ceil(1000 * MAX_SIGMA_REL))]
    _, off = coefficients(times, gammas, step, candidates)
    good = [candidate for candidate, misfit in zip(candidates, off, strict=True) if misfit <= MAX_MISFIT]
    return good[0], good[-1]


def snapshot_at(folder: Path, snapshots: Sequence[Snapshot], at: int | None) -> Snapshot:
    """The snapshot of update `at`; the last one if `at` is None.

    Raises:
        VdiffError: there are no snapshots.
        OptionError: there is no snapshot of that update.
    """
    if not snapshots:
        raise VdiffError(
            f"{folder} holds no snapshots of averages", "train with --ema_more profiles, or --ema_more 0.999"
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
    """A power-function average, computed from others.

    Attributes:
        weights: the state dict of a denoiser, in float32.
        snapshots: how many snapshots it combines.
        misfit: the error of its profile as a fraction of the profile's norm; 0 if this length was tracked.
    """

    sigma_rel: float
    weights: Mapping[str, Tensor]
    snapshots: int
    misfit: float


def reconstruct(folder: Path, sigma_rels: Sequence[float], at: int | None = None) -> list[Reconstruction]:
    """The power-function averages of these lengths at update `at`, from the snapshots of the run in `folder`.

    The snapshots are read one by one, once for all lengths, and summed in float64.

    Args:
        at: the update of a snapshot; None: the last.

    Raises:
        VdiffError: no snapshot holds a power function, or one is damaged or of another model.
        OptionError: there is no snapshot at `at`, or the snapshots yield a σ_rel only with a misfit above 0.1.
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
                f"σ_rel {sigma_rel}: the profile from {plural(count, 'snapshot')} until update {end.step} "
                f"would be {misfit:.0%} off",
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
            raise VdiffError(f"{snapshot.path} is of another model than the first snapshot", "remove the foreign one")
        shapes = found
        for share, total in zip(rows[:, k], sums, strict=True):
            for key, tensor in mine.items():
                if not k:
                    total[key] = torch.zeros_like(tensor, dtype=torch.float64)
                total[key].add_(tensor, alpha=float(share))
    others = {**_frozen(folder, sums[0] if sums else {}), **_of(tensors, "buffer")}
    return [
        Reconstruction(
            sigma_rel, {**others, **{key: sum_.float() for key, sum_ in total.items()}}, count, float(misfit)
        )
        for sigma_rel, total, misfit in zip(sigma_rels, sums, misfits, strict=True)
    ]


def read_exponential(folder: Path, decay: float, at: int | None = None) -> dict[str, Tensor]:
    """The additional exponential average with this decay at update `at`, as the state dict of a denoiser.

    Raises:
        VdiffError: there are no snapshots, or the file is damaged.
        OptionError: there is no snapshot at `at`, or no average with this decay.
    """
    snapshot = snapshot_at(folder, find_snapshots(folder), at)
    if decay not in snapshot.decays:
        kept = ", ".join(map(str, snapshot.decays))
        raise OptionError(
            f"--decay {decay}: {folder} has no such average",
            f"it has {kept}" if kept else f"train with --ema_more {decay}",
        )
    tensors = read_tensors(snapshot.path)
    average, buffers = _of(tensors, Exponential(decay).name), _of(tensors, "buffer")
    return {**_frozen(folder, {**average, **buffers}), **average, **buffers}


def _parts(snapshots: Sequence[Snapshot], step: int) -> tuple[list[tuple[Snapshot, str]], list[float], list[float]]:
    """Every power function up to update `step`, in order: its snapshot and name, its last update and its γ.

    Raises:
        VdiffError: there is none.
    """
    found = [
        (snapshot, PowerFunction(s)) for snapshot in snapshots if snapshot.step <= step for s in snapshot.sigma_rels
    ]
    if not found:
        raise VdiffError("the snapshots hold no power functions", "train with --ema_more profiles")
    parts = [(snapshot, profile.name) for snapshot, profile in found]
    return parts, [float(snapshot.step) for snapshot, _ in found], [profile.gamma for _, profile in found]


def _frozen(folder: Path, averaged: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights that the run in `folder` did not train, which are in no snapshot."""
    path = folder / WEIGHTS
    if not path.exists() or read_shapes(path).keys() <= averaged.keys():
        return {}
    return {name: tensor for name, tensor in read_tensors(path).items() if name not in averaged}


def _of(tensors: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}."): tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
