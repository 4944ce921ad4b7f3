"""The verdict on a single model: `train.py` ends with it, and `distill.py` begins with the teacher's."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vdiff.cli.console import Console
from vdiff.cli.options import speaks
from vdiff.errors import VdiffError

if TYPE_CHECKING:
    import torch

    from vdiff.evaluation.results import Quality


def quality_of(folder: Path, data: str, budget: int, *, device: torch.device, console: Console) -> Quality | None:
    """The quality of a single model, on rank 0; None if it is not known.

    Args:
        data: the dataset; empty if there is none.
        budget: how many network evaluations the measurement may use.

    Raises:
        Interrupted: by a signal.
    """
    if not data or not speaks():
        return None

    from vdiff.distributed import Processes
    from vdiff.evaluation.measure import measure_quality

    try:
        return measure_quality(folder, data, budget, processes=Processes(device), reporter=console)
    except VdiffError as error:
        console.line(f"no verdict on {folder}: {error.cause}")
        return None
