"""Checkpoint → a `torch.export` program: it runs where torch is, without vdiff."""

from __future__ import annotations

import io
import json
from pathlib import Path

import torch
from torch import Tensor

from vdiff.files import write_whole
from vdiff.interop.agreement import check, inputs
from vdiff.interop.graphs import Evaluation, FewSteps, GraphOptions, metadata
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser

METADATA = "vdiff.json"


def export_torch(
    denoiser: Denoiser, config: CheckpointConfig, options: GraphOptions, path: Path, *, fingerprint: str
) -> float:
    """Write the program to `path`, whole or not at all, and answer how far its answers are from vdiff's once reloaded.

    Inputs are those of `Evaluation` and `FewSteps`, given by keyword, for any batch size; `metadata` is the extra file
    `vdiff.json`.

    Raises:
        VdiffError: the answers differ, or the file system refuses.
    """
    module = FewSteps(denoiser, options) if options.sampler else Evaluation(denoiser, options.output)
    module.eval().requires_grad_(False)
    example = inputs(denoiser, options, config, range(2))
    batch = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        program = torch.export.export(module, (), example, dynamic_shapes={name: {0: batch} for name in example})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    told = json.dumps(metadata(denoiser, options, config, fingerprint), ensure_ascii=False, indent=2)
    buffer = io.BytesIO()  # written to a disk that is full, torch would end the whole process
    torch.export.save(program, buffer, extra_files={METADATA: told})

    difference = 0.0

    def write(temporary: Path) -> None:
        nonlocal difference
        temporary.write_bytes(buffer.getbuffer())
        with open(temporary, "rb") as written:
            reloaded = torch.export.load(written).module()

        def answer(named: dict[str, Tensor]) -> Tensor:
            with torch.no_grad():
                found: Tensor = reloaded(**named)
            return found

        difference = check(answer, denoiser, options, config)

    write_whole(path, write)
    return difference
