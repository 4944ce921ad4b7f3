"""A checkpoint to be given away: weights, public description and model card, and nothing else that lies beside them."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path

from vdiff.errors import VdiffError
from vdiff.files import write_json
from vdiff.interop.card import CARD, FILES_OF_CARD, is_card, write_card
from vdiff.interop.sharing import public
from vdiff.interop.usage import weights_usage
from vdiff.models.checkpoint import CONFIG, FILES, WEIGHTS, is_checkpoint, read_config
from vdiff.replacing import Kind, new_folder


def describe(checkpoint: Path, folder: Path, *, license_name: str) -> None:
    """Write all but the weights into `folder`: config.json without paths, README.md and its picture.

    Raises:
        VdiffError: the checkpoint cannot be used.
    """
    name = checkpoint.resolve().name
    write_card(folder, checkpoint, usage={WEIGHTS: weights_usage(name)}, license_name=license_name)
    write_json(folder / CONFIG, public(asdict(read_config(checkpoint))))


def _files_of_export(folder: Path) -> str:
    return f"{FILES}|{FILES_OF_CARD}" if is_checkpoint(folder) and is_card(folder / CARD) else ""


EXPORT = Kind("export", _files_of_export)


def export_weights(checkpoint: Path, folder: Path, *, license_name: str, overwrite: bool) -> None:
    """Write `folder`, which is a checkpoint itself, with the weights of `checkpoint` bit for bit; whole or not at all.

    Raises:
        VdiffError: the checkpoint cannot be used, or the folder exists; only folders of this function are replaced.
    """
    if folder.resolve() == checkpoint.resolve():
        raise VdiffError(f"{folder} is the checkpoint itself", "give another folder")
    with new_folder(folder, EXPORT, overwrite=overwrite, flag="another folder") as temporary:
        describe(checkpoint, temporary, license_name=license_name)
        shutil.copyfile(checkpoint / WEIGHTS, temporary / WEIGHTS)
