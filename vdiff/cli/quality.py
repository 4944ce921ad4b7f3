"""The verdict on a model by itself: `train.py` ends with it, `distill.py` begins with that on its teacher."""

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
    """How good a model is by itself, in the first process; None where that is not known.

    Args:
        data: the dataset; empty where there is none.
        budget: network evaluations that measuring may cost.

    Raises:
        Interrupted: a signal came.
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
