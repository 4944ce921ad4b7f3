"""Small evaluations: `python -m tests.evaluating`, under torchrun, in a folder with `data`, `model` and `teacher`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from tests.toy import Watcher, write_checkpoint, write_dataset
from vdiff.evaluation import samples
from vdiff.evaluation.measure import evaluate
from vdiff.evaluation.results import EvalRow, Evaluation
from vdiff.evaluation.work import WorkFolder

NUM = 60


def write_all(folder: Path) -> None:
    """A model, a teacher, and data of their kind: 40 random images."""
    write_checkpoint(folder / "model")
    write_checkpoint(folder / "teacher", seed=7)
    write_dataset(folder / "data", count=40)


def measured(folder: Path, **changes: Any) -> Evaluation:
    """`evaluate` the model in 2 and 4 steps on the CPU, in pieces of 10 samples."""
    samples.PIECE_IMAGES = 10
    values: dict[str, Any] = {
        "num_timesteps": (2, 4),
        "n": NUM,
        "seed": 3,
        "teacher": folder / "teacher",
        "batch_size": 7,
        "device": "cpu",
        "cache": folder / "cache",
        "out": folder / "out.json",
    }
    checkpoints = changes.pop("checkpoints", [folder / "model"])
    data = changes.pop("data", folder / "data")
    return evaluate(checkpoints, data, **values | changes)


def figures(rows: tuple[EvalRow, ...]) -> list[dict[str, Any]]:
    """All of the rows but the time that they took."""
    return [{**vars(row), "seconds": 0, "ms_per_image": 0, "is_time_doubtful": False} for row in rows]


def main() -> None:
    """One of several processes; all but the first are slow to read results."""
    from vdiff.distributed import join

    processes, read = join("cpu"), WorkFolder.read

    def reads_late(work: WorkFolder, name: str) -> dict[str, NDArray[Any]]:
        time.sleep(0.1)
        return read(work, name)

    if not processes.is_main:
        WorkFolder.read = reads_late  # type: ignore[method-assign]
    measured(Path(), processes=processes, reporter=Watcher())


if __name__ == "__main__":
    main()
