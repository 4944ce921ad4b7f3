"""A network as a file that runs with torch alone: a `torch.export` program with metadata."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.errors import VdiffError
from vdiff.files import write_whole
from vdiff.replacing import Kind
from vdiff.text import cause_of

METADATA = "vdiff.json"
"""The name of the extra file with a program's metadata."""


def _is_program(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        return METADATA if any(Path(name).name == METADATA for name in archive.namelist()) else ""


PROGRAM = Kind("program", _is_program)


def exported(
    module: nn.Module,
    example: tuple[Tensor, ...] | Mapping[str, Tensor],
    fixed: Sequence[str] = (),
    max_batch: int | None = None,
) -> torch.export.ExportedProgram:
    """The program of a module, for any batch size.

    Args:
        example: inputs of any batch but 1, in order or by name.
        fixed: names of inputs that have no batch size.
        max_batch: the largest batch whose computation is that of the example; None: any.

    Raises:
        VdiffError: the module's code depends on the batch size, or cannot be exported.
    """
    batch = torch.export.Dim("batch", min=1, max=max_batch)
    try:
        with torch.no_grad():
            if isinstance(example, tuple):
                return torch.export.export(module, example, dynamic_shapes=tuple({0: batch} for _ in example))
            shapes = {name: None if name in fixed else {0: batch} for name in example}
            return torch.export.export(module, (), dict(example), dynamic_shapes=shapes)
    except Exception as error:  # a type of torch._dynamo, which takes a second to import
        if type(error).__name__ != "UserError":
            raise
        reason = cause_of(error, 160)
        raise VdiffError(f"torch cannot export this network: {reason}", "use its folder, with vdiff") from None


def write_program(
    module: nn.Module,
    example: tuple[Tensor, ...] | Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    path: Path,
    compare: Callable[[nn.Module], float],
) -> float:
    """Write `module`, prepared for inference, to `path`, whole or not at all; returns the result of `compare`.

    Args:
        example: inputs of any batch size except 1, in order or by name, as in calls of the program.
        metadata: for the extra file `METADATA`, as JSON.
        compare: called with the program as read from the file, without gradients; if it raises, no file is left.

    Raises:
        VdiffError: the file system refuses.
    """
    module.eval().requires_grad_(False)
    program = exported(module, example)
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it contains paths of this machine
    text = json.dumps(metadata, ensure_ascii=False, indent=2)
    buffer = io.BytesIO()  # on a full disk, torch would end the whole process
    torch.export.save(program, buffer, extra_files={METADATA: text})

    def write(temporary: Path) -> float:
        temporary.write_bytes(buffer.getbuffer())
        with open(temporary, "rb") as written, torch.no_grad():
            return compare(torch.export.load(written).module())

    return write_whole(path, write)
