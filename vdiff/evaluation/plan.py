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
from vdiff.models.checks import check_guidance, default_guidance, without_limits
from vdiff.models.components import check_components
from vdiff.models.condition import IMAGE, TOKENS
from vdiff.models.prompting import drawn_shape, has_surroundings
from vdiff.text import plural

METRICS = ("fd", "kd", "precision", "recall", "isc", "clip", "rmse", "psnr", "lsd", "psnr_truth", "nearest")
OF_INCEPTION = {"fid": "fd", "kid": "kd"}
MIN_IMAGES = 10
UNBIASED_FROM = 10_000
EXTRAPOLATED_FROM = 5
"""`fd_inf` needs this many samples per dimension; with 1.5 it is usually negative."""
MAX_PAIRED = 256
"""At most this many samples are compared with the teacher's from the same noise."""


@dataclass(frozen=True)
class RowSpec:
    """One row: a checkpoint, sampler, number of steps and grid; `raw`: the raw weights instead of the EMA."""

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
        guidance: the weight w of classifier-free guidance; None: each model's default, as in sample.py.
        batch_size: images in a batch of each process; None: 64, and 4 for a latent model.
        prompts: text-to-image models take them in turn; empty: the captions of the data, in random order.
        negative_prompt: guidance moves away from it.
        components, vae: see `Prompting.read`.
        clip: the folder of a CLIP model, see `ClipScore`; it scores pictures and prompts.
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
    guidance: float | None = None
    batch_size: int | None = None
    prompts: tuple[str, ...] = ()
    negative_prompt: str = ""
    components: Path | None = None
    vae: Path | None = None
    clip: Path | None = None
    precision: str = "auto"
    most_images: int | None = None

    def guidance_of(self, config: CheckpointConfig) -> float:
        """The weight of guidance for a model."""
        return default_guidance(config) if self.guidance is None else self.guidance


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
        OptionError: a sampler is unknown, or not for this model.
    """
    for name in samplers:
        if name not in SAMPLERS:
            raise OptionError(f"--samplers {name} is unknown", suggestion(name, SAMPLERS))
    rows: list[RowSpec] = []
    left_out: list[str] = []
    for folder in checkpoints:
        config = read_config(folder)
        for name in samplers:
            try:
                without_limits(config, name, {})
            except VdiffError as error:
                raise OptionError(f"--samplers {name}: {folder}: {error.cause}", error.hint) from None
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


def common_shape(plan: EvalPlan, configs: Mapping[Path, CheckpointConfig]) -> tuple[int, int]:
    """The channels and the size of the square images, or sounds, that all models generate.

    Raises:
        VdiffError: they draw different images, or others; components of a text-to-image model are missing.
    """
    shapes = {}
    for folder, config in configs.items():
        shape = config.shape
        if has_surroundings(config):
            components = Path(check_components(config.components, plan.components)["path"])
            shape = drawn_shape(config, plan.vae or components)
        if not config.space.is_sound and (len(shape) != 3 or shape[1] != shape[2]):
            shown = " × ".join(map(str, shape))
            raise VdiffError(
                f"{folder} generates samples of {shown}, not square images or sounds", "evaluate another model"
            )
        shapes[folder] = shape
    first, shape = next(iter(shapes.items()))
    for folder, other in shapes.items():
        if other != shape:
            kinds = f"{first} generates images of {_kind(*shape[:2])}, but {folder} of {_kind(*other[:2])}"
            if len(shape) == len(other) == 2:
                kinds = f"{first} generates sounds of {shape[1]} samples, but {folder} of {other[1]}"
            raise VdiffError(kinds, "evaluate them separately")
    return shape[0], shape[1]


def check_plan(
    plan: EvalPlan,
    configs: Mapping[Path, CheckpointConfig],
    images: ReferenceImages,
    features: Features,
    channels: int,
) -> tuple[str, ...]:
    """Check that a plan is possible with these models, data and features; returns its metrics.

    Args:
        channels: of the images that the models generate.

    Raises:
        VdiffError: the data are of other channels, have too few images, or have no captions for a text-to-image model.
        OptionError: a model does not support the guidance or prompts, a metric cannot be computed, or there are too few
            samples.
    """
    for folder, config in configs.items():
        weight = plan.guidance_of(config)
        try:
            check_guidance(config, weight)
        except VdiffError as error:
            raise OptionError(f"--guidance {weight:g}: {folder}: {error.cause}", error.hint) from None
    if any(takes_prompts(config) for config in configs.values()):
        if not plan.prompts and not images.store.meta.num_captions:
            raise VdiffError(
                f"{images.store.path} has no captions to use as prompts",
                "give --prompts FILE, or prepare images with captions",
            )
    else:
        for flag, value in {
            "--prompts": plan.prompts,
            "--negative_prompt": plan.negative_prompt,
            "--clip": plan.clip,
        }.items():
            if value:
                raise OptionError(f"{flag}: {next(iter(configs))} takes no prompts", "leave it out")
    if channels != images.channels:
        kind, data = (_kind(count, images.image_size) for count in (channels, images.channels))
        raise VdiffError(
            f"the checkpoints generate images of {kind}, but {images.store.path} holds {data}",
            "give --data a dataset like the training data",
        )
    for folder, config in configs.items():
        if (ours := config.sample_rate) != (theirs := images.store.meta.rate):
            rates = [f"sounds at {rate:,} Hz" if rate else "images" for rate in (ours, theirs)]
            raise VdiffError(
                f"{folder} generates {rates[0]}, but {images.store.path} holds {rates[1]}",
                "give --data a dataset like the training data",
            )
    has_pairs = any(takes_image(config) for config in configs.values())
    if has_pairs and not images.store.meta.has_conditions:
        raise VdiffError(
            f"{images.store.path} has no condition images, which the models need",
            "give --data a dataset of pairs: prepare_data.py IMAGES --condition FOLDER",
        )
    metrics = choose_metrics(
        plan.metrics,
        features,
        has_teacher=bool(plan.teacher),
        has_clip=bool(plan.clip),
        has_pairs=has_pairs,
        are_sounds=bool(images.store.meta.rate),
    )
    _check_numbers(plan.n, images, features, metrics)
    return metrics


def takes_prompts(config: CheckpointConfig) -> bool:
    """Whether a model takes prompts."""
    return TOKENS in config.signature.names


def takes_image(config: CheckpointConfig) -> bool:
    """Whether a model takes condition images."""
    return IMAGE in config.signature.names


def _kind(channels: int, size: int) -> str:
    return f"{size}×{size} with {plural(channels, 'channel')}"


def choose_metrics(
    wanted: Sequence[str],
    features: Features,
    *,
    has_teacher: bool,
    has_clip: bool,
    has_pairs: bool = False,
    are_sounds: bool = False,
) -> tuple[str, ...]:
    """The chosen metrics, in the order of `METRICS`; by default all that are possible.

    Raises:
        OptionError: a metric is unknown, or needs other features, a teacher, a CLIP model or condition images.
    """
    is_inception = features.name == INCEPTION
    lacking = {"isc": not is_inception, "rmse": not has_teacher, "psnr": not has_teacher, "clip": not has_clip}
    lacking |= {"psnr_truth": not has_pairs, "lsd": not (has_teacher and are_sounds)}
    found = set()
    for word in wanted:
        name = OF_INCEPTION.get(word, word)
        if name not in METRICS:
            raise OptionError(f"--metrics {word} is unknown", suggestion(word, [*METRICS, *OF_INCEPTION]))
        if not is_inception and (word in OF_INCEPTION or name == "isc"):
            instead = f", or --metrics {name}" if word in OF_INCEPTION else ""
            raise OptionError(f"--metrics {word} needs Inception's features", f"give --features inception{instead}")
        if name == "clip" and lacking[name]:
            raise OptionError("--metrics clip needs a CLIP model", "give --clip FOLDER")
        if name == "psnr_truth" and lacking[name]:
            raise OptionError("--metrics psnr_truth needs image-conditioned models", "leave it out")
        if name == "lsd" and not are_sounds:
            raise OptionError("--metrics lsd is for sounds", "leave it out")
        if lacking.get(name):
            raise OptionError(f"--metrics {word} needs a teacher", "give --teacher CHECKPOINT")
        found.add(name)
    if has_clip and wanted and "clip" not in found:
        raise OptionError("--clip has no effect, as --metrics leaves clip out", "add clip to --metrics")
    return tuple(name for name in METRICS if (name in found if wanted else not lacking.get(name)))


def _check_numbers(n: int, images: ReferenceImages, features: Features, metrics: Sequence[str]) -> None:
    """Refuse fewer images than the metrics need."""
    least = max(MIN_IMAGES, features.dim if "fd" in metrics else 0)
    why = f"the {features.dim} dimensions of the features {features.name}" if least > MIN_IMAGES else f"{MIN_IMAGES}"
    others = ",".join(name for name in metrics if name not in ("fd", "isc", "clip")) or "kd"
    without = f", or vdiff evaluate --metrics {others}" if least > MIN_IMAGES else ""
    if n < least:
        raise OptionError(f"--num {n} is fewer than {why}", f"give --num {least} or more{without}")
    if len(images) < least:
        held = f"{images.store.path} holds {len(images)} {images.store.meta.noun}s"
        raise VdiffError(f"{held}, fewer than {why}", f"give more data{without}")


def notes_for(
    images: ReferenceImages,
    configs: Mapping[Path, CheckpointConfig],
    features: Features,
    n: int,
    metrics: Sequence[str],
) -> tuple[str, ...]:
    """Notes for the reader of the metrics, one sentence each."""
    notes: list[str] = []
    noun = images.store.meta.noun
    fd, kd = ("fid", "kid") if features.name == INCEPTION else ("fd", "kd")
    enough = EXTRAPOLATED_FROM * features.dim
    if "fd" in metrics and n < UNBIASED_FROM:
        others = [f"{kd}, which has no bias" if "kd" in metrics else "", f"{fd}_inf" if n >= enough else ""]
        instead = ", or ".join(filter(None, others)) or f"--metrics {kd}"
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
        sides = f"{min(n, MAX_KEPT):,} samples and {min(len(images), MAX_KEPT):,} {noun}s of the data"
        notes.append(f"{', '.join(pairs)} are computed from {sides}.")
    if "nearest" in metrics and n > MAX_QUERIES:
        notes.append(f"Nearest {noun}s are those of the first {MAX_QUERIES:,} samples.")
    if "rmse" in metrics and n > MAX_PAIRED:
        notes.append(f"The teacher is compared on the first {MAX_PAIRED} samples.")
    if features.name == PIXELS and images.image_size > 32:
        notes.append(
            "Distances on pixels are not informative at this size: give --features inception or a network's file."
        )
    if images.store.meta.shard:
        notes.append(f"The data are only part {images.store.meta.shard} of a dataset.")
    if any(takes_image(config) for config in configs.values()):
        notes.append("Samples are generated from condition images of the data, in random order.")
    elif any(config.class_names for config in configs.values()):
        notes.append("Samples take the classes in turn, all equally often.")
    for folder, config in configs.items():
        theirs, ours = config.dataset_fingerprint, images.store.meta.fingerprint
        if theirs and ours and theirs != ours:
            notes.append(f"{folder} was trained on other {noun}s than these.")
        if not config.is_finished:
            notes.append(f"{folder} is unfinished: {config.num_iters} of {config.target_iters} updates.")
    return tuple(notes)
