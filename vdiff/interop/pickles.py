"""The weights in a `.pt` file, read so that nothing in the file is ever run.

Three locks, each of which would do: the archive's list is looked at first; then the pickle in it is read as a list of
names, without being executed, and refused for any name that weights do not need; then `torch.load(weights_only=True)`
knows only tensors. The file is mapped, not read into memory: no claim about sizes reserves more than the file holds.
"""

from __future__ import annotations

import pickletools
import re
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
PLAIN_NAMES = frozenset(
    {
        "collections OrderedDict",
        "torch._utils _rebuild_tensor_v2",
        "torch._utils _rebuild_parameter",
        *(
            f"torch {kind}Storage"
            for kind in ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
        ),
    }
)
"""All that a file of tensors, texts and numbers refers to."""

OTHER_REFERENCES = frozenset({"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4"})
"""Opcodes that make objects by other ways than naming them; `torch.save` writes none of them."""


def read_pt(path: Path) -> Mapping[str, Any]:
    """The dictionary that `torch.save` wrote to `path`; its tensors are mapped from the file.

    Raises:
        VdiffError: there is no such file, it is no archive of tensors, or it asks for anything but tensors.
    """
    try:
        _check_archive(path)
    except FileNotFoundError:
        raise VdiffError(f"{path}: no such file", "give the path of a checkpoint.pt") from None
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile) as error:
        raise VdiffError(f"{path} cannot be read ({cause_of(error)})", "copy it again") from None
    try:
        values = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged pickles fail in every way there is
        # torch advises to open it without a guard, which would run what is in it
        is_advice = re.search("weights.only", str(error), re.IGNORECASE)
        reason = "more than tensors, or damaged" if is_advice else cause_of(error)
        raise VdiffError(f"{path} cannot be read as weights ({reason})", "copy it again") from None
    if not isinstance(values, Mapping):
        raise VdiffError(f"{path} holds a {type(values).__name__}, no dictionary", "give another file")
    return values


def check_backed(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that claim more numbers than the file has room for, as views of few numbers may.

    Raises:
        VdiffError: it names the first tensor.
    """
    room = path.stat().st_size
    for name, tensor in tensors.items():
        room -= tensor.numel() * tensor.element_size()
        if room < 0:
            raise VdiffError(
                f"{path}: {name} claims to be {' × '.join(map(str, tensor.shape))} numbers, more than the file holds",
                "the file is damaged or made up: give another one",
            )


def _check_archive(path: Path) -> None:
    """Look at the archive and at the names in its pickle.

    Raises:
        VdiffError: something is there that weights do not need.
    """
    if path.is_dir():
        raise VdiffError(f"{path} is a folder", "give the path of the checkpoint.pt in it")
    check_regular(path)
    if path.suffix == ".safetensors":
        raise VdiffError(
            f"{path} is no .pt file, and tells no number of timesteps",
            "give the checkpoint.pt; `vdiff import diffusers` takes the folder of a pipeline, sample.py one of vdiff",
        )
    with open(path, "rb") as file:
        start = file.read(4)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise VdiffError(f"{path} is larger than {MAX_FILE_BYTES // 2**30} GiB", "give a file of weights alone")
    if start[:2] != b"PK":
        raise VdiffError(
            f"{path} is no archive that torch.save wrote; a bare pickle is never opened",
            "if you trust it, load and save it again with PyTorch 1.6 or newer",
        )
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        for entry in entries:
            if entry.filename.startswith(("/", "\\")) or ".." in entry.filename.replace("\\", "/").split("/"):
                raise VdiffError(f"{path} has an entry {entry.filename!r} outside of it", "give a file of weights")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise VdiffError(f"{path}: {entry.filename!r} is compressed", "give a file as torch.save wrote it")
        if len({entry.filename for entry in entries}) < len(entries):
            raise VdiffError(f"{path} has two entries of one name", "give a file as torch.save wrote it")
        pickles = [entry for entry in entries if entry.filename.endswith(".pkl")]
        if len(pickles) != 1:
            raise VdiffError(f"{path} holds {len(pickles)} pickles where one is due", "give a file of weights alone")
        if pickles[0].file_size > MAX_PICKLE_BYTES:
            raise VdiffError(f"{path}: {pickles[0].filename!r} is too large", "give a file of weights alone")
        check_names(path, archive.read(pickles[0]))


def check_names(path: Path, pickle: bytes) -> None:
    """Read a pickle as a list of operations, none of which is carried out, and refuse names weights do not need.

    Raises:
        VdiffError: it names the first one.
        ValueError: it is no pickle.
    """
    for opcode, argument, _ in pickletools.genops(pickle):
        if opcode.name in OTHER_REFERENCES or (opcode.name == "GLOBAL" and argument not in PLAIN_NAMES):
            named = str(argument).replace(" ", ".") if opcode.name in ("GLOBAL", "INST") else opcode.name
            raise VdiffError(
                f"{path} asks for {named[:80]!r}, which no weights need: refused, nothing of it was run",
                "do not open the file with anything that runs pickles; save the plain tensors if it is yours",
            )
