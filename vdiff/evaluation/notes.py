"""What a reader must know of the figures of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from vdiff.evaluation.drawn import MAX_PAIRED
from vdiff.evaluation.features import INCEPTION, PIXELS, Features
from vdiff.evaluation.nearest import MAX_QUERIES
from vdiff.evaluation.plan import EXTRAPOLATED_FROM, UNBIASED_FROM
from vdiff.evaluation.reference import MAX_KEPT, Images
from vdiff.models.checkpoint import CheckpointConfig


def notes_for(
    images: Images, configs: Mapping[Path, CheckpointConfig], features: Features, n: int, metrics: Sequence[str]
) -> tuple[str, ...]:
    """A sentence for each thing."""
    notes: list[str] = []
    fd, kd = ("fid", "kid") if features.name == INCEPTION else ("fd", "kd")
    enough = EXTRAPOLATED_FROM * features.dim
    if "fd" in metrics and n < UNBIASED_FROM:
        others = [f"{kd}, which has no bias" if "kd" in metrics else "", f"{fd}_inf" if n >= enough else ""]
        instead = " or ".join(filter(None, others)) or f"{kd}, which can be asked for"
        notes.append(
            f"n = {n:,} is below {UNBIASED_FROM:,}: {fd}@{n} is biased upwards; compare it at equal n alone, or take "
            f"{instead}."
        )
    if "fd" in metrics and n < enough:
        notes.append(
            f"{fd}_inf is left out: it needs {enough:,} samples, {EXTRAPOLATED_FROM} for each of the {features.dim:,} "
            "dimensions of the features."
        )
    pairs = [name for name in ("kd", "precision", "recall") if name in metrics]
    if pairs and max(n, len(images)) > MAX_KEPT:
        sides = f"{min(n, MAX_KEPT):,} samples and {min(len(images), MAX_KEPT):,} images of the data"
        notes.append(f"{', '.join(pairs)} rest on {sides}.")
    if "nearest" in metrics and n > MAX_QUERIES:
        notes.append(f"Nearest images are those of the first {MAX_QUERIES:,} samples.")
    if "rmse" in metrics and n > MAX_PAIRED:
        notes.append(f"The teacher is compared on the first {MAX_PAIRED} samples.")
    if features.name == PIXELS and images.image_size > 32:
        notes.append("Pixels say little of images of this size: give --features inception, or a network's file.")
    if images.store.meta.shard:
        notes.append(f"The data are part {images.store.meta.shard} of a dataset.")
    if any(config.class_names for config in configs.values()):
        notes.append("Samples take the classes in turn, each as often as any other.")
    for folder, config in configs.items():
        theirs, ours = config.dataset_fingerprint, images.store.meta.fingerprint
        if theirs and ours and theirs != ours:
            notes.append(f"{folder} was trained on other images than these.")
        if not config.is_finished:
            notes.append(f"{folder} is unfinished: {config.num_iters} of {config.target_iters} updates.")
    return tuple(notes)
