"""The folder of an imported model: written whole, and never over anything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vdiff.errors import VdiffError
from vdiff.models.checkpoint import FILES, CheckpointConfig, read_config, save_checkpoint
from vdiff.replacing import Kind, new_folder


def _files_of_model(folder: Path) -> str:
    try:
        return FILES if read_config(folder).is_imported else ""
    except VdiffError:
        return ""


IMPORTED_MODEL = Kind("imported model", _files_of_model)


def write_model(folder: Path, weights: Mapping[str, Tensor], description: CheckpointConfig, *, overwrite: bool) -> None:
    """Write the checkpoint folder of an imported network, whole or not at all.

    Args:
        weights: the network's state dict.
        description: its `dataset` begins with "imported:".

    Raises:
        VdiffError: something is in the way, or the file system refuses.
    """
    with new_folder(folder, IMPORTED_MODEL, overwrite=overwrite) as temporary:
        save_checkpoint(temporary, {f"network.{name}": tensor for name, tensor in weights.items()}, description)
