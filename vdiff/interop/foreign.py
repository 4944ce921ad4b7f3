"""Checked values of other programs' JSON files, and the checkpoint folder of an imported model."""

from __future__ import annotations

import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.errors import VdiffError
from vdiff.files import read_json
from vdiff.models.checkpoint import FILES, IMPORTED, CheckpointConfig, read_config, save_checkpoint
from vdiff.replacing import Kind, new_folder

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class JsonFile:
    """The values of a JSON object, and their source.

    Attributes:
        where: the file's name in errors.
    """

    where: str
    values: Mapping[str, Any]

    @classmethod
    def read(cls, path: Path, advice: str) -> JsonFile:
        """The object in the file `path`.

        Args:
            advice: the hint if it cannot be read.

        Raises:
            VdiffError: the file is missing, too large, or not a JSON object.
        """
        if not path.is_file():
            raise VdiffError(f"{path} is missing", advice)
        return cls(str(path), read_json(path, advice))

    def get(self, key: str, default: Any = None) -> Any:
        """The value, unchecked; `default` if the key is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int, *, low: int, high: int) -> int:
        """A whole number from `low` to `high`."""
        value = self.get(key, default)
        if type(value) is not int or not low <= value <= high:
            raise self.refusal(key, f"need a whole number from {low} to {high}")
        return value

    def number(self, key: str, default: float, *, low: float, high: float) -> float:
        """A number between `low` and `high`, both excluded."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not low < value < high:
            raise self.refusal(key, f"need a number between {low} and {high}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """True or false."""
        value = self.get(key, default)
        if type(value) is not bool:
            raise self.refusal(key, "need true or false")
        return value

    def word(self, key: str, default: str, choices: Sequence[str]) -> str:
        """One of `choices`."""
        value = self.get(key, default)
        if value not in choices:
            raise self.refusal(key, f"only {', '.join(choices)} can be read")
        return str(value)

    def items(self, key: str, kind: type, *, high: int) -> list[Any]:
        """A list of one to `high` values of a type."""
        value = self.get(key)
        if type(value) is not list or not 1 <= len(value) <= high or any(type(item) is not kind for item in value):
            raise self.refusal(key, f"need a list of 1 to {high} values of type {kind.__name__}")
        return value

    def unknown(self, known: Collection[str]) -> list[str]:
        """A sentence about keys outside `known`, as newer versions of diffusers may write; else empty."""
        names = ", ".join(sorted(reprlib.repr(key) for key in self.values if key not in known and key[:1] != "_"))
        return [f"{self.where} has {names}, which vdiff does not know: it may draw other images"] if names else []

    def refusal(self, key: str, why: str) -> VdiffError:
        """The error that names the file, the key and its value, cut short."""
        return VdiffError(f"{self.where}: {key} is {reprlib.repr(self.get(key))}", why)


NO_DROPOUT = "dropout, if it was trained with any, is left out"
NO_VARIANCE = "its learned variance is left out: the samplers of vdiff have their own"
NO_AUGMENTATION = "its inputs for augmented images are left out: every image counts as not augmented"


def imported_fields(
    source: str, *, method: str = "base", weights: str = "raw", approximated: Sequence[str] = ()
) -> dict[str, Any]:
    """Fields of the description of a checkpoint that vdiff did not train; `source` names its origin."""
    return {
        "approximated": list(approximated),
        "method": method, "weights": weights, "num_iters": 0, "target_iters": 0, "num_images": 0,
        "dataset": f"{IMPORTED}{source}", "dataset_fingerprint": "",
    }  # fmt: skip


IMPORTED_MODEL = Kind("imported model", lambda folder: FILES if read_config(folder).is_imported else "")


def write_model(folder: Path, weights: Mapping[str, Tensor], description: CheckpointConfig, *, overwrite: bool) -> None:
    """Write the checkpoint folder of an imported network, whole or not at all.

    Args:
        weights: the network's state dict.
        description: its `dataset` begins with "imported:".

    Raises:
        VdiffError: the folder holds something else, or the file system refuses.
    """
    with new_folder(folder, IMPORTED_MODEL, overwrite=overwrite) as temporary:
        save_checkpoint(temporary, {f"network.{name}": tensor for name, tensor in weights.items()}, description)
