"""Checkpoint → a `torch.export` program: it runs where torch is, without vdiff."""

from __future__ import annotations

from pathlib import Path
from typing import cast

from torch import Tensor, nn

from vdiff.interop.agreement import check, inputs
from vdiff.interop.graphs import Evaluation, FewSteps, GraphOptions, metadata
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.denoiser import Denoiser
from vdiff.models.program import write_program


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
    example = inputs(denoiser, options, config, range(2))

    def compare(program: nn.Module) -> float:
        return check(lambda named: cast(Tensor, program(**named)), denoiser, options, config)

    return write_program(module, example, metadata(denoiser, options, config, fingerprint), path, compare)
