"""The folder of an imported model: written whole, and never over anything else."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from vdiff.errors import VdiffError
from vdiff.files import new_folder
from vdiff.models.checkpoint import WEIGHTS, CheckpointConfig, read_config, save_checkpoint


def check_free(folder: Path, *, overwrite: bool) -> None:
    """See, before a large file is read, that `folder` may be written; only imported models are ever replaced.

    Raises:
        VdiffError: something is in the way.
    """
    if not folder.exists():
        return
    if not overwrite:
        raise VdiffError(f"{folder} exists already", "give --overwrite to replace it, or another --out")
    if not _is_imported(folder):
        raise VdiffError(f"{folder} exists and is no imported model", "choose another --out")


def _is_imported(folder: Path) -> bool:
    """Whether a checkpoint of an imported model lies in `folder`; programs of all kinds write a config.json."""
    try:
        return read_config(folder).is_imported and (folder / WEIGHTS).is_file()
    except VdiffError:
        return False


def write_model(folder: Path, weights: Mapping[str, Tensor], description: CheckpointConfig, *, overwrite: bool) -> None:
    """Write the checkpoint folder of an imported network, whole or not at all.

    Args:
        weights: the network's state dict.
        description: its `dataset` begins with "imported:".

    Raises:
        VdiffError: something is in the way, or the file system refuses.
    """
    check_free(folder, overwrite=overwrite)
    with new_folder(folder, overwrite=overwrite) as temporary:
        save_checkpoint(temporary, {f"network.{name}": tensor for name, tensor in weights.items()}, description)
