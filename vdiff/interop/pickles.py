"""Reading the weights in a `.pt` file without running any code in it.

`torch.load(weights_only=True)` runs no code, but allocates a bytearray of any size that a file asks for. So two checks
come first: the pickle names only what weights need, and the archive does not claim more bytes than the file has. The
file is memory-mapped, so wrong sizes cannot allocate more than the file holds.
"""

from __future__ import annotations

import pickletools
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.errors import VdiffError
from vdiff.files import check_regular
from vdiff.text import cause_of

MAX_FILE_BYTES = 64 * 2**30
MAX_PICKLE_BYTES = 64 * 2**20
STORAGES = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
NAMES = {
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {kind}Storage" for kind in STORAGES),
}
"""All names that a file of tensors, strings and numbers needs."""


def read_pt(path: Path) -> Mapping[str, Any]:
    """The dictionary that `torch.save` wrote to `path`; its tensors are memory-mapped.

    Raises:
        VdiffError: the file is missing, is not an archive of tensors, or asks for anything except tensors.
    """
    try:
        _check_archive(path)
    except FileNotFoundError:
        raise VdiffError(f"{path}: no such file", "give the path of a checkpoint.pt") from None
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise VdiffError(f"{path} cannot be read ({cause_of(error)})", "copy it again") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about newer pickle protocols before it refuses them
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles raise errors of any type
        # torch suggests loading it unsafely, which would run its code
        is_advice = re.search("weights.only", str(error), re.IGNORECASE)
        reason = "more than tensors, or damaged" if is_advice else cause_of(error)
        raise VdiffError(f"{path} cannot be read as weights ({reason})", "copy it again") from None
    if not isinstance(values, Mapping):
        raise VdiffError(f"{path} holds a {type(values).__name__}, not a dictionary", "give another file")
    return values


def check_backed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more numbers than the file can hold, as views of few numbers may.

    Raises:
        VdiffError: names the first such tensor.
    """
    room = path.stat().st_size
    for name, tensor in tensors.items():
        room -= tensor.numel() * tensor.element_size()
        if room < 0:
            raise VdiffError(
                f"{path}: {name} claims to be {' × '.join(map(str, tensor.shape))} numbers, more than the file holds",
                "the file is damaged or forged: give another one",
            )


def _check_archive(path: Path) -> None:
    """Check the archive's sizes against the file's, and the names in its pickle against `NAMES`."""
    if path.is_dir():
        raise VdiffError(f"{path} is a folder", "give the path of the checkpoint.pt in it")
    check_regular(path)
    if path.suffix == ".safetensors":
        raise VdiffError(
            f"{path} is not a .pt file and does not contain the number of timesteps",
            "give the checkpoint.pt; `vdiff import diffusers` reads pipeline folders, sample.py reads vdiff's",
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        is_archive = file.read(2) == b"PK"
    if size > MAX_FILE_BYTES:
        raise VdiffError(f"{path} is larger than {MAX_FILE_BYTES // 2**30} GiB", "give a file with only weights")
    if not is_archive:
        raise VdiffError(
            f"{path} is not an archive of torch.save; vdiff never opens a bare pickle",
            "if you trust it, load and save it again with PyTorch 1.6 or newer",
        )
    with zipfile.ZipFile(path) as archive:
        if (claimed := sum(entry.file_size for entry in archive.infolist())) > size:
            raise VdiffError(f"{path} has {size:,} bytes but unpacks to {claimed:,}", "give a file of torch.save")
        pickles = [entry for entry in archive.infolist() if entry.filename.lower().endswith(".pkl")]
        if len(pickles) != 1:
            raise VdiffError(f"{path} holds {len(pickles)} pickles, not one", "give a file with only weights")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise VdiffError(f"{path}: {pickles[0].filename!r} is too large", "give a file with only weights")
        for opcode, argument, _ in pickletools.genops(archive.read(pickles[0])):  # runs no code
            if opcode.name == "GLOBAL" and (name := str(argument)) not in NAMES:
                raise VdiffError(
                    f"{path} asks for {name.replace(' ', '.')[:80]!r}, which weights do not need: refused, "
                    "and none of its code was run",
                    "do not open the file with programs that run pickles; if it is yours, save only its tensors",
                )
