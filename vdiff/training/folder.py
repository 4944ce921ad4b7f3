"""The folder of a run: whether it may be written or resumed, or is finished."""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Collection
from pathlib import Path

from vdiff.diffusion.distillation import METHODS
from vdiff.errors import OptionError, VdiffError, shell
from vdiff.files import parse, read_text
from vdiff.models.checkpoint import CONFIG, FILES, CheckpointConfig, is_checkpoint, read_config
from vdiff.records import RUN_FILE, STATE, check_same_settings
from vdiff.replacing import Kind, check_free, is_free, start_folder
from vdiff.training.config import DistillConfig, TrainConfig, settings_of, values_of
from vdiff.training.dataset import TENSORS, TrainingData
from vdiff.training.presets import run_text

FILES_OF_RUN = "|".join(
    [
        *(FILES, r"run\.toml", r"verdict\.json", r"ladder(_images)?\.(png|json|html)", r"state/state\.safetensors"),
        *(r"samples/\d{7,}\.png", r"log/events\.out\.tfevents\.[^/]+", r"averages/\d{9,}\.safetensors"),
        r"history/\d{9,}/((model|adapter)\.safetensors|config\.json)",
        r"report\.html|evaluation\.json|evaluation-nearest\.png",  # written by vdiff report FOLDER
        r"quality(-nearest\.png|\.json)|\.quality\.json\.(lock|work/[^/]+)",
    ]
)
"""A regular expression of the names of all files that vdiff writes into a run."""


def recorded(folder: Path) -> CheckpointConfig | None:
    """The checkpoint in `folder`; None if nothing was saved yet."""
    return read_config(folder) if (folder / CONFIG).exists() else None


def is_run(folder: Path) -> bool:
    """Whether `folder` holds a run or a checkpoint."""
    return (folder / RUN_FILE).is_file() or (folder / CONFIG).is_file()


def _files_of_run(folder: Path) -> str:
    try:
        table = parse(read_text(folder / RUN_FILE), tomllib.loads)
    except (OSError, ValueError, VdiffError):
        table = {}
    settings = table.get("distill", table)
    is_ours = isinstance(settings, dict) and settings.keys() >= {"num_iters", "batch_size", "ckpt_interval"}
    return FILES_OF_RUN if is_ours or is_checkpoint(folder) else ""


RUN = Kind("run", _files_of_run)


def start_anew(folder: Path, config: TrainConfig | DistillConfig, *, overwrite: bool) -> None:
    """Create the folder of a new run, with its settings; it replaces an earlier run.

    Raises:
        VdiffError: the folder exists (and `overwrite` is off, or it is not a run), or the disk refuses.
    """
    check_new(folder, overwrite=overwrite)
    start_folder(folder, RUN_FILE, run_text(config))


def check_new(folder: Path, *, overwrite: bool) -> None:
    """Check that a new run may begin in `folder`.

    Raises:
        VdiffError: the folder exists and `overwrite` is off, or vdiff did not write all of it.
    """
    if not overwrite and not is_free(folder) and RUN.files(folder):
        found = recorded(folder)
        done = f"{found.num_iters} of {found.target_iters} updates" if found else "no checkpoint yet"
        is_over = found is not None and found.is_finished
        resume = "" if is_over else "--resume to continue, "
        longer = "--resume with more --num_iters, " if is_over and (folder / STATE).is_file() else ""
        hint = f"give {resume}another --name or --out to keep both, {longer}or --overwrite"
        raise VdiffError(f"{folder} exists already ({done})", hint)
    check_free(folder, RUN, overwrite=True)


def check_resumable(folder: Path, images: TrainingData) -> None:
    """Refuse to resume a checkpoint without its state, which would silently start again, or with other images.

    Raises:
        VdiffError: the checkpoint has no state, or was trained on another dataset.
    """
    found = recorded(folder)
    if found is None:
        return
    if found.dataset_fingerprint != images.fingerprint:
        was = "the same tensors" if found.dataset == TENSORS else f"{shell('--data', found.dataset)} as it was"
        raise VdiffError(f"{folder} was begun with other {found.space.noun}s than {images.name} holds", f"give {was}")
    if not (folder / STATE).is_file():
        raise VdiffError(
            f"{folder} cannot be resumed: {folder / STATE} is missing",
            "give another --out, or --overwrite to begin again",
        )


def check_same_model(folder: Path, found: CheckpointConfig, now: CheckpointConfig) -> None:
    """Refuse to resume with a model of another meaning, even if the weights fit.

    Raises:
        VdiffError: names what differs.
    """
    for name in ("sample_shape", "codec", "schedule", "prediction", "parameterisation", "class_names"):
        if (was := getattr(found, name)) != (new := getattr(now, name)):
            raise VdiffError(
                f"{folder} was begun with {name} {was}, not {new}", "give the model as it was, or another out"
            )


def check_same_run(folder: Path, now: TrainConfig | DistillConfig, saved: TrainConfig | DistillConfig) -> None:
    """Refuse to resume a run with settings that change its result.

    Raises:
        OptionError: names the setting and its two values.
    """
    may_go_on = saved.lr_schedule == "constant" and not saved.ema_remainder and not _is_annealed(saved)
    check_settings(
        saved,
        now,
        f"{folder} was begun",
        lambda name: (
            f"leave --{name} out to resume, give another --name or --out to keep both, or --overwrite to begin again"
        ),
        but=("num_iters",) if may_go_on else (),
    )


def check_settings(
    saved: TrainConfig | DistillConfig,
    now: TrainConfig | DistillConfig,
    done: str,
    hint: Callable[[str], str],
    but: Collection[str],
) -> None:
    """Refuse settings that change the result of a run, except those in `but`; see `records.check_same_settings`.

    Raises:
        OptionError: names the setting and its two values.
    """
    free = [name for name, setting in settings_of(type(now)).items() if setting.metadata.get("free", False)]
    check_same_settings(values_of(saved), values_of(now), done=done, hint=hint, but=(*free, *but), error=OptionError)


def _is_annealed(config: TrainConfig | DistillConfig) -> bool:
    """Whether updates depend on the planned number of updates."""
    return isinstance(config, DistillConfig) and METHODS[config.method].is_annealed
