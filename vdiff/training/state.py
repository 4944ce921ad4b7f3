"""What resuming needs: weights, their average, the optimiser's moments and the update, in one file without pickle.

All randomness of update n is a function of seed and n (`loop.py`, `data/batches.py`), so no generator is stored.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdiff.errors import VdiffError
from vdiff.files import make_folder, remove
from vdiff.models.checkpoint import read_metadata, read_tensors, write_tensors
from vdiff.models.denoiser import Denoiser
from vdiff.training.optimisation import WeightAverage

STATE_FOLDER, STATE_FILE = "state", "state.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


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
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> None:
    """Write the state of a run, whole or not at all; `scaler` is that of fp16."""
    tensors = {f"raw.{name}": tensor for name, tensor in denoiser.state_dict().items()}
    if average.decay:
        tensors |= {f"ema.{name}": tensor for name, tensor in average.model.state_dict().items()}
    for name, parameter in denoiser.named_parameters():
        for moment in MOMENTS:
            tensors[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    make_folder(folder / STATE_FOLDER)
    # bad updates count as updates of the run, but not of the optimiser
    steps = [float(optimizer.state[parameter]["step"]) for parameter in denoiser.parameters()]
    metadata = {"step": str(position.step), "seconds": repr(position.seconds), "optimizer_step": repr(steps[0])}
    if scaler is not None:
        metadata["scaler"] = json.dumps(scaler.state_dict())
    write_tensors(state_path(folder), tensors, metadata)


def load_state(
    folder: Path,
    denoiser: Denoiser,
    average: WeightAverage,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> Position:
    """Bring them back to where `save_state` left them; without a state file they stay as they are, at update 0.

    Raises:
        VdiffError: the file is damaged, or of another model.
    """
    path = state_path(folder)
    if not path.exists():
        return Position()
    metadata, tensors = read_metadata(path), read_tensors(path)
    try:
        position = Position(int(metadata["step"]), float(metadata["seconds"]))
        denoiser.load_state_dict(_part(tensors, "raw."))
        if average.decay:
            average.model.load_state_dict(_part(tensors, "ema."))
        step = torch.tensor(float(metadata["optimizer_step"]))
        if scaler is not None:
            scaler.load_state_dict(json.loads(metadata["scaler"]))
        names = [name for name, _ in denoiser.named_parameters()]
        moments = [{moment: tensors[f"{moment}.{name}"] for moment in MOMENTS} for name in names]
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
