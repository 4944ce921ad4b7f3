"""The state of a run for resuming: weights, averages, the optimiser's state and the update, in one safetensors file.

All randomness of update n is a function of seed and n (`step.py`, `data/batches.py`), so no generator is stored.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from vdiff.errors import VdiffError
from vdiff.files import make_folder, remove
from vdiff.models.checkpoint import read_metadata, read_tensors, write_tensors
from vdiff.records import STATE
from vdiff.text import cause_of
from vdiff.training.averages import Exponential
from vdiff.training.meter import Position
from vdiff.training.optimisation import load_optimizer_state, optimizer_state
from vdiff.training.step import TrainStep
from vdiff.training.weights import frozen, load_without, state_without, trainable, whole

STATISTICS, METHOD = "statistics", "method"
AVERAGING = {"averaging": "bias-corrected"}  # states without this mark have averages with a warm-up
RANDOM = {"random": "philox"}  # runs without this mark draw noise and times for the whole batch


def state_path(folder: Path) -> Path:
    """The state file of the run in `folder`."""
    return folder / STATE


def save_state(folder: Path, position: Position, step: TrainStep, *, write: bool = True) -> None:
    """Write the state of a run, whole or not at all; only the trainable weights.

    Every process calls this, since weights may be sharded; those with `write` write.
    """
    raw = state_without(step.denoiser, frozen(step.denoiser).keys())
    tensors = {f"raw.{name}": tensor for name, tensor in whole(raw).items()}
    for average, values in step.averages.named().items():
        tensors |= {f"{average}.{name}": tensor for name, tensor in whole(values).items()}
    # bad updates count as updates of the run, but not of the optimiser
    moments, numbers = optimizer_state(step.optimizer, trainable(step.denoiser))
    tensors |= moments
    tensors |= {f"{STATISTICS}.{name}": tensor for name, tensor in _statistics(step).items()}
    if step.networks is not None:
        tensors |= {f"{METHOD}.{name}": tensor for name, tensor in step.networks.state().items()}
    metadata = {"step": str(position.step), "seconds": repr(position.seconds), **numbers}
    metadata |= AVERAGING if step.draws_whole_batch else {**AVERAGING, **RANDOM}
    if (scaler := step.engine.accelerator.scaler) is not None:
        metadata["scaler"] = json.dumps(scaler.state_dict())
    if write:
        make_folder(state_path(folder).parent)
        write_tensors(state_path(folder), tensors, metadata)


def load_state(folder: Path, step: TrainStep) -> Position:
    """Restore a step to the state that `save_state` wrote; without a state file it stays at update 0.

    A state of an earlier version continues with that version's random numbers.

    Raises:
        VdiffError: the file is damaged or of another model, or its exponential averages have a warm-up.
    """
    path, denoiser, averages = state_path(folder), step.denoiser, step.averages
    if not path.exists():
        return Position()
    metadata, tensors = read_metadata(path), read_tensors(path)
    is_exponential = any(isinstance(profile, Exponential) for profile in (averages.profile, *averages.further))
    if is_exponential and not AVERAGING.items() <= metadata.items():
        raise VdiffError(
            f"{path} is of an older vdiff, whose averages of the weights had a warm-up",
            "finish the run with the vdiff that began it, give another --out, or --overwrite to begin again",
        )
    try:
        position = Position(int(metadata["step"]), float(metadata["seconds"]))
        load_without(denoiser, _part(tensors, "raw."), frozen(denoiser).keys())
        averages.load({name: _part(tensors, f"{name}.") for name in averages.named()})
        for name, tensor in _statistics(step).items():
            saved = tensors[f"{STATISTICS}.{name}"]
            if saved.shape == tensor.shape:  # an earlier version had fewer bins; these start again
                tensor.copy_(saved)
        if step.networks is not None:
            step.networks.load(_part(tensors, f"{METHOD}."))
        if (scaler := step.engine.accelerator.scaler) is not None:
            scaler.load_state_dict(json.loads(metadata["scaler"]))
        load_optimizer_state(step.optimizer, trainable(denoiser), tensors, metadata)
    except (KeyError, ValueError, RuntimeError) as error:
        cause = f"{path} does not belong to this run ({cause_of(error, 120)})"
        raise VdiffError(cause, "start again with another --out, or with --overwrite") from None
    step.draws_whole_batch = not RANDOM.items() <= metadata.items()
    return position


def remove_state(folder: Path) -> None:
    """Delete the state of a run that cannot be resumed any more."""
    remove(state_path(folder).parent)


def _statistics(step: TrainStep) -> dict[str, Tensor]:
    """The statistics of importance sampling."""
    return {} if step.importance is None else {"moments": step.importance.moments}


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
