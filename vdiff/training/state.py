"""What resuming needs: weights, their averages, the optimiser's moments and the update, in one file without pickle.

All randomness of update n is a function of seed and n (`loop.py`, `data/batches.py`), so no generator is stored.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdiff.errors import VdiffError
from vdiff.files import make_folder, remove
from vdiff.models.checkpoint import read_metadata, read_tensors, write_tensors
from vdiff.models.denoiser import Denoiser
from vdiff.training.averages import Averages, Exponential
from vdiff.training.sharding import like, whole

STATE_FOLDER, STATE_FILE = "state", "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
STATISTICS = "statistics"
AVERAGING = {"averaging": "bias-corrected"}  # states without this mark averaged with a warm-up


@dataclass(frozen=True)
class Position:
    """How far a run is: updates done, and seconds spent on them."""

    step: int = 0
    seconds: float = 0.0


def state_path(folder: Path) -> Path:
    """The state file of the run in `folder`."""
    return folder / STATE_FOLDER / STATE_FILE


def save_state(
    folder: Path,
    position: Position,
    denoiser: Denoiser,
    averages: Averages,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    *,
    statistics: Mapping[str, Tensor] | None = None,
    write: bool = True,
) -> None:
    """Write the state of a run, whole or not at all; `scaler` is that of fp16, `statistics` what else was learned.

    Every process calls this, since weights may be shared out over them; those with `write` write.
    """
    tensors = {f"raw.{name}": whole(tensor) for name, tensor in denoiser.state_dict().items()}
    for average, values in averages.named().items():
        tensors |= {f"{average}.{name}": whole(tensor) for name, tensor in values.items()}
    for name, parameter in denoiser.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = whole(optimizer.state[parameter][moment])
    tensors |= {f"{STATISTICS}.{name}": tensor for name, tensor in (statistics or {}).items()}
    # bad updates count as updates of the run, but not of the optimiser
    steps = [float(optimizer.state[parameter]["step"]) for parameter in denoiser.parameters()]
    metadata = {"step": str(position.step), "seconds": repr(position.seconds), "optimizer_step": repr(steps[0])}
    metadata |= AVERAGING
    if scaler is not None:
        metadata["scaler"] = json.dumps(scaler.state_dict())
    if write:
        make_folder(folder / STATE_FOLDER)
        write_tensors(state_path(folder), tensors, metadata)


def load_state(
    folder: Path,
    denoiser: Denoiser,
    averages: Averages,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    *,
    statistics: Mapping[str, Tensor] | None = None,
) -> Position:
    """Bring them back to where `save_state` left them; without a state file they stay as they are, at update 0.

    Raises:
        VdiffError: the file is damaged, of another model, or its exponential averages had a warm-up.
    """
    path = state_path(folder)
    if not path.exists():
        return Position()
    metadata, tensors = read_metadata(path), read_tensors(path)
    is_exponential = any(isinstance(profile, Exponential) for profile in (averages.profile, *averages.further))
    if is_exponential and not AVERAGING.items() <= metadata.items():
        raise VdiffError(
            f"{path} is of an older vdiff, whose averages of the weights had a warm-up",
            "finish the run with the vdiff that began it, or give --overwrite to begin anew",
        )
    try:
        position = Position(int(metadata["step"]), float(metadata["seconds"]))
        parameters = dict(denoiser.named_parameters())
        raw = _part(tensors, "raw.")
        denoiser.load_state_dict({name: like(tensor, parameters.get(name, tensor)) for name, tensor in raw.items()})
        averages.load({name: _part(tensors, f"{name}.") for name in averages.named()})
        for name, tensor in (statistics or {}).items():
            saved = tensors[f"{STATISTICS}.{name}"]
            if saved.shape == tensor.shape:  # an earlier version had fewer bins: those are learned anew
                tensor.copy_(saved)
        step = torch.tensor(float(metadata["optimizer_step"]))
        if scaler is not None:
            scaler.load_state_dict(json.loads(metadata["scaler"]))
        moments = [
            {moment: like(tensors[f"{moment}.{name}"], parameter) for moment in MOMENTS}
            for name, parameter in parameters.items()
        ]
    except (KeyError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise VdiffError(f"{path} does not belong to this run ({reason})", "start anew with --overwrite") from None
    state = {i: {"step": step.clone(), **values} for i, values in enumerate(moments)} if position.step else {}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return position


def remove_state(folder: Path) -> None:
    """Free the space of a run that has nothing left to resume."""
    remove(folder / STATE_FOLDER)


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
