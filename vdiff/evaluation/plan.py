"""The plan of an evaluation, checked against the checkpoints, the data and the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vdiff.diffusion.samplers import SAMPLERS
from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.evaluation.features import INCEPTION, PIXELS, Features
from vdiff.evaluation.nearest import MAX_QUERIES
from vdiff.evaluation.reference import MAX_KEPT, ReferenceImages
from vdiff.models.checkpoint import CheckpointConfig, read_config
from vdiff.models.checks import check_guidance
from vdiff.text import plural

METRICS = ("fd", "kd", "precision", "recall", "isc", "rmse", "psnr", "nearest")
OF_INCEPTION = {"fid": "fd", "kid": "kd"}
MIN_IMAGES = 10
UNBIASED_FROM = 10_000
EXTRAPOLATED_FROM = 5
"""`fd_inf` needs this many samples per dimension; with 1.5 it is usually negative."""
MAX_PAIRED = 256
"""At most this many samples are compared with the teacher's from the same noise."""


@dataclass(frozen=True)
class RowSpec:
    """One row: a checkpoint, sampler, number of steps and grid; `raw`: weights without average."""

    checkpoint: Path
    sampler: str = "ddim"
    num_steps: int = 1
    grid: str = "uniform"
    raw: bool = False

    @property
    def steps(self) -> str:
        """`1 step`, `8 steps`."""
        return plural(self.num_steps, "step")


@dataclass(frozen=True)
class EvalPlan:
    """The settings for drawing and measuring all rows.

    Attributes:
        n, seed: samples 0 … n − 1 of the seed.
        features, weights: see `features.load_features`.
        metrics: names from `METRICS`; empty: all that are possible.
        teacher, teacher_steps: samples are compared with this checkpoint's images from the same noise, drawn by ddim in
            this number of steps (None: its own).
        guidance: the weight w of classifier-free guidance.
        batch_size: images that each process draws at once.
        precision: of the networks.
        most_images: how many images of the data to read, see `ReferenceImages`; None: all.
    """

    n: int = 2000
    seed: int = 0
    features: str = PIXELS
    weights: Path | None = None
    metrics: tuple[str, ...] = ()
    teacher: Path | None = None
    teacher_steps: int | None = None
    guidance: float = 0.0
    batch_size: int = 64
    precision: str = "auto"
    most_images: int | None = None


def plan_rows(
    checkpoints: Sequence[Path],
    *,
    num_timesteps: Sequence[int] = (),
    samplers: Sequence[str] = ("ddim",),
    grid: str = "uniform",
    raw: bool = False,
) -> tuple[list[RowSpec], list[str]]:
    """A row for each checkpoint, number of steps (default: its own) and sampler; and a line for each skipped row.

    A number of steps that a distilled model does not support is skipped, if the model supports another one.

    Raises:
        VdiffError: a checkpoint cannot be read, or supports none of the numbers of steps.
        OptionError: a sampler is unknown.
    """
    for name in samplers:
        if name not in SAMPLERS:
            raise OptionError(f"--samplers {name} is unknown", suggestion(name, SAMPLERS))
    rows: list[RowSpec] = []
    left_out: list[str] = []
    for folder in checkpoints:
        config = read_config(folder)
        reasons = {steps: why_not(config, grid, steps) for steps in num_timesteps or [config.num_timesteps]}
        if all(reasons.values()):
            steps, reason = next(iter(reasons.items()))
            raise VdiffError(f"{folder} cannot sample in {steps} steps: {reason}", "give other --num_timesteps")
        left_out += [f"{folder} in {steps} steps is skipped: {reason}" for steps, reason in reasons.items() if reason]
        known = [steps for steps, reason in reasons.items() if not reason]
        rows += [RowSpec(folder, name, steps, grid, raw) for name in samplers for steps in known]
    return rows, left_out


def why_not(config: CheckpointConfig, grid: str, num_steps: int) -> str:
    """Why a model cannot sample in a number of steps on a grid; empty if it can."""
    try:
        config.check_grid(grid, num_steps)
    except ValueError as error:
        return str(error)
    return ""


def check_plan(
    plan: EvalPlan, configs: Mapping[Path, CheckpointConfig], images: ReferenceImages, features: Features
) -> tuple[str, ...]:
    """Check that a plan is possible with these models, data and features; returns its metrics.

    Raises:
        VdiffError: the images of the models or the data differ in size or channels, or there are too few.
        OptionError: a model does not support the guidance, a metric cannot be computed, or there are too few samples.
    """
    kinds = {folder: _kind(config.shape[-1], config.shape[0]) for folder, config in configs.items()}
    first, kind = next(iter(kinds.items()))
    for folder, other in kinds.items():
        if other != kind:
            raise VdiffError(f"{first} draws images of {kind}, but {folder} of {other}", "evaluate them separately")
        try:
            check_guidance(configs[folder], plan.guidance)
        except VdiffError as error:
            raise OptionError(f"--guidance {plan.guidance:g}: {folder}: {error.cause}", error.hint) from None
    data, path = _kind(images.image_size, images.channels), images.store.path
    if kind != data:
        raise VdiffError(
            f"the checkpoints draw images of {kind}, but {path} holds {data}",
            "give --data a dataset like the training data",
        )
    metrics = choose_metrics(plan.metrics, features, plan.teacher is not None)
    _check_numbers(plan.n, len(images), features, metrics, path)
    return metrics


def _kind(size: int, channels: int) -> str:
    return f"{size}×{size} with {plural(channels, 'channel')}"


def choose_metrics(wanted: Sequence[str], features: Features, has_teacher: bool) -> tuple[str, ...]:
    """The chosen metrics, in the order of `METRICS`; by default all that are possible.

    Raises:
        OptionError: a metric is unknown, or needs other features or a teacher.
    """
    is_inception = features.name == INCEPTION
    lacking = {"isc": not is_inception, "rmse": not has_teacher, "psnr": not has_teacher}
    found = set()
    for word in wanted:
        name = OF_INCEPTION.get(word, word)
        if name not in METRICS:
            raise OptionError(f"--metrics {word} is unknown", suggestion(word, [*METRICS, *OF_INCEPTION]))
        if not is_inception and (word in OF_INCEPTION or name == "isc"):
            instead = f", or --metrics {name}" if word in OF_INCEPTION else ""
            raise OptionError(f"--metrics {word} needs Inception's features", f"give --features inception{instead}")
        if lacking.get(name):
            raise OptionError(f"--metrics {word} needs a teacher", "give --teacher CHECKPOINT")
        found.add(name)
    return tuple(name for name in METRICS if (name in found if wanted else not lacking.get(name)))


def _check_numbers(n: int, num_images: int, features: Features, metrics: Sequence[str], data: Path | str) -> None:
    """Refuse fewer images than the metrics need."""
    least = max(MIN_IMAGES, features.dim if "fd" in metrics else 0)
    why = f"the {features.dim} dimensions of the features {features.name}" if least > MIN_IMAGES else f"{MIN_IMAGES}"
    others = ",".join(name for name in metrics if name not in ("fd", "isc")) or "kd"
    without = f", or vdiff evaluate --metrics {others}" if least > MIN_IMAGES else ""
    if n < least:
        raise OptionError(f"--num {n} is fewer than {why}", f"give --num {least} or more{without}")
    if num_images < least:
        raise VdiffError(f"{data} holds {num_images} images, fewer than {why}", f"give more data{without}")


def notes_for(
    images: ReferenceImages,
    configs: Mapping[Path, CheckpointConfig],
    features: Features,
    n: int,
    metrics: Sequence[str],
) -> tuple[str, ...]:
    """Notes for the reader of the metrics, one sentence each."""
    notes: list[str] = []
    fd, kd = ("fid", "kid") if features.name == INCEPTION else ("fd", "kd")
    enough = EXTRAPOLATED_FROM * features.dim
    if "fd" in metrics and n < UNBIASED_FROM:
        others = [f"{kd}, which has no bias" if "kd" in metrics else "", f"{fd}_inf" if n >= enough else ""]
        instead = " or ".join(filter(None, others)) or f"--metrics {kd}"
        notes.append(
            f"n = {n:,} is below {UNBIASED_FROM:,}: {fd}@{n} is biased upwards; compare it only at equal n, or use "
            f"{instead}."
        )
    if "fd" in metrics and n < enough:
        notes.append(
            f"{fd}_inf is omitted: it needs {enough:,} samples, {EXTRAPOLATED_FROM} for each of the {features.dim:,} "
            "dimensions of the features."
        )
    pairs = [name for name in ("kd", "precision", "recall") if name in metrics]
    if pairs and max(n, len(images)) > MAX_KEPT:
        sides = f"{min(n, MAX_KEPT):,} samples and {min(len(images), MAX_KEPT):,} images of the data"
        notes.append(f"{', '.join(pairs)} are computed from {sides}.")
    if "nearest" in metrics and n > MAX_QUERIES:
        notes.append(f"Nearest images are those of the first {MAX_QUERIES:,} samples.")
    if "rmse" in metrics and n > MAX_PAIRED:
        notes.append(f"The teacher is compared on the first {MAX_PAIRED} samples.")
    if features.name == PIXELS and images.image_size > 32:
        notes.append("Pixels say little about images of this size: give --features inception or a network's file.")
    if images.store.meta.shard:
        notes.append(f"The data are only part {images.store.meta.shard} of a dataset.")
    if any(config.class_names for config in configs.values()):
        notes.append("Samples take the classes in turn, all equally often.")
    for folder, config in configs.items():
        theirs, ours = config.dataset_fingerprint, images.store.meta.fingerprint
        if theirs and ours and theirs != ours:
            notes.append(f"{folder} was trained on other images than these.")
        if not config.is_finished:
            notes.append(f"{folder} is unfinished: {config.num_iters} of {config.target_iters} updates.")
    return tuple(notes)
