"""A folder as a ladder leaves it: checkpoints, records and pictures of made-up figures, in an instant."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from tests.toy import SIZE, write_checkpoint
from vdiff.evaluation.results import FILE, EvalRow, Evaluation, Metric, Reference
from vdiff.models.checkpoint import read_config, weights_fingerprint

COLUMNS = 3
DISTANCES = {1: 0.4, 2: 0.3, 4: 0.25}


def write_ladder(root: Path, *, steps: Sequence[int] = (8, 4, 2, 1), name: str = "original", data: str = "toy") -> Path:
    """A first teacher of `steps[0]` steps and a student for each further number; answers with the last one's folder."""
    teacher: dict[str, Any] | None = None
    folder, lines = root, []
    for k, num_steps in enumerate(steps):
        folder = root / (name if k == 0 else f"base_{k - 1}")
        changes = {
            "num_timesteps": num_steps,
            "method": "progressive" if k else "base",
            "teacher": teacher,
            "num_iters": 100 + k,
            "target_iters": 100 + k,
            "num_images": 1000 * (k + 1),
            "train_seconds": 2.5 + k,
            "dataset": data,
        }
        write_checkpoint(folder, seed=100 * k, **changes)
        write_run(folder, k)
        teacher = {**asdict(read_config(folder)), "path": folder.as_posix(), "fingerprint": weights_fingerprint(folder)}
        row = {"checkpoint": folder.as_posix(), "num_steps": num_steps, "ms_per_image": 0.5 * num_steps}
        lines.append({**row, "rmse_to_teacher": 0.01 * k or None, "rmse_to_first": 0.02 * k or None})
        if k:
            (folder / "verdict.json").write_text(json.dumps(verdict(num_steps)))
    (folder / "ladder.json").write_text(json.dumps(lines))
    pixels = np.random.default_rng(0).integers(0, 256, (len(steps) * SIZE, COLUMNS * SIZE), dtype=np.uint8)
    PIL.Image.fromarray(pixels).save(folder / "ladder_images.png")
    PIL.Image.new("RGB", (50, 40), "white").save(folder / "ladder.png")
    return folder


def verdict(num_steps: int, **changes: Any) -> dict[str, Any]:
    """What an examination finds."""
    found = {"rmse_before": 0.2, "rmse": 0.031, "distance": DISTANCES.get(num_steps), "teacher_distance": 0.2}
    return {**found, "num_images": 256, "attempts": 1, "reason": "", **changes}


def write_run(folder: Path, k: int) -> None:
    """Settings and a log of four losses, the third of which was told twice, as by a resumed run."""
    from torch.utils.tensorboard import SummaryWriter

    (folder / "run.toml").write_text('[distill]\nbase = "x"\n' if k else "num_iters = 100\n")
    with SummaryWriter(str(folder / "log")) as writer:
        for step, loss in ((10, 0.5), (20, 0.4), (30, 9.0)):
            writer.add_scalar("loss", loss, step)
    with SummaryWriter(str(folder / "log"), purge_step=30, filename_suffix=".2") as writer:
        writer.add_scalar("loss", 0.3, 30)
        writer.add_scalar("loss", 0.25, 40)


def write_evaluation(root: Path, *, pairs: bool = True, **changes: Any) -> Evaluation:
    """Students at `DISTANCES`, ddim and heun on the teacher at ten times that, and a row of other weights."""
    rows = []
    for folder in sorted(path.parent for path in root.glob("*/config.json")):
        config, mark = read_config(folder), weights_fingerprint(folder)
        if config.teacher:
            far = DISTANCES[config.num_timesteps]
            if config.num_timesteps > 1:  # fewer steps than it was made for
                rows.append(row(folder, mark, 1, metrics(88.0)))
            rows.append(row(folder, mark, config.num_timesteps, metrics(far)))
        else:
            rows += [row(folder, mark, steps, metrics(10 * far)) for steps, far in DISTANCES.items()]
            rows.append(row(folder, mark, 8, metrics(0.2)))
            rows.append(row(folder, mark, 2, metrics(5.0), sampler="heun", evaluations=3.0))
            rows.append(row(folder, "f" * 64, 1, metrics(77.0)))
    values: dict[str, Any] = {
        "features": "pixels",
        "device": "cpu",
        "date": "2026-01-02T03:04:05+00:00",
        "command": "vdiff evaluate --seed 3",
        "reference": Reference("data/toy", "abc", 1797, SIZE, 1),
        "rows": tuple(rows),
        "pairs": "evaluation-nearest.png" if pairs else None,
        "notes": ("n is small.",),
    }
    evaluation = Evaluation(**values | changes)
    evaluation.write(root / FILE)
    PIL.Image.new("L", (30, 20)).save(root / "evaluation-nearest.png")
    return evaluation


def metrics(far: float) -> dict[str, Metric]:
    """A distance with bounds, and how near samples come."""
    return {"fd": Metric(far, 0.9 * far, 1.1 * far), "nearest": Metric(1.25), "nearest_data": Metric(1.5)}


def row(folder: Path, mark: str, steps: int, found: Mapping[str, Metric], **changes: Any) -> EvalRow:
    """One line of an evaluation."""
    values: dict[str, Any] = {
        "checkpoint": folder.as_posix(),
        "checkpoint_fingerprint": mark,
        "weights": "ema",
        "sampler": "ddim",
        "grid": "uniform",
        "num_steps": steps,
        "evaluations": float(steps),
        "n": 2000,
        "seed": 0,
        "seconds": 1.0,
        "ms_per_image": 0.4 * steps,
        "metrics": dict(found),
    }
    return EvalRow(**values | changes)
