"""Whether training diverges at any noise level: the loss in eight bins of λ = log α²/σ², early and late in a training.

    python benchmarks/noise_levels.py --data data/digits_8 --data data/emoji_32

Every prediction with every weighting, small networks, few updates. The last column names the bins whose loss in the
last quarter of the training is above twice that of the first quarter, or no number: where training diverges, or, in
outer bins of few images and tiny losses, by chance. – is a bin without images. ε with truncated SNR is refused by
vdiff, as the paper found that it diverges.
"""

from __future__ import annotations

import math
import shutil
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

import click

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from vdiff.diffusion.prediction import PREDICTION_TYPES
from vdiff.diffusion.weighting import WEIGHTINGS
from vdiff.errors import OptionError, VdiffError
from vdiff.reporting import Silent
from vdiff.training.base import resolve_training
from vdiff.training.base_training import train
from vdiff.training.meter import LOGSNR_EDGES

QUARTERS = 4


def losses(folder: Path) -> dict[str, list[float]]:
    """Name of a bin → its loss in each quarter of the training."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    names = [f"loss_by_logsnr/{low}_{high}" for low, high in pairwise(LOGSNR_EDGES)]
    known = events.Tags()["scalars"]
    return {name: [event.value for event in events.Scalars(name)] if name in known else [] for name in names}


def run(data: str, prediction: str, weighting: str, num_iters: int, folder: Path) -> list[str]:
    """One row: the last loss of each bin, from much noise to none, and which of them diverged."""
    flags = {
        "data": data, "preset": "toy", "prediction": prediction, "weighting": weighting, "num_iters": num_iters,
        "log_interval": num_iters // QUARTERS, "ckpt_interval": num_iters, "sample_interval": num_iters, "seed": 0,
    }  # fmt: skip
    try:
        config, images = resolve_training(flags, None, folder=folder, resume=False)
        train(config, images, folder=folder, resume=False, overwrite=False, reporter=Silent())
    except OptionError:
        return [*[""] * (len(LOGSNR_EDGES) - 1), "refused"]
    except VdiffError as error:
        return [*[""] * (len(LOGSNR_EDGES) - 1), error.cause]
    found = losses(folder)
    rose = [name.partition("/")[2] for name, each in found.items() if each and not each[-1] <= 2 * each[0]]
    values = [f"{each[-1]:.3g}" if each and math.isfinite(each[-1]) else "–" for each in found.values()]
    return [*values, ", ".join(rose) or "none"]


@click.command()
@click.option("--data", multiple=True, default=["data/digits_8"], show_default=True, help="Datasets; may be repeated.")
@click.option("--num_iters", default=400, show_default=True, help="Updates of each training.")
def main(data: tuple[str, ...], num_iters: int) -> None:
    """Print the table and write it to benchmarks/results/noise_levels.md."""
    scratch = Path(tempfile.mkdtemp())
    rows = []
    try:
        for place in data:
            for prediction in PREDICTION_TYPES:
                for weighting in WEIGHTINGS:
                    folder = scratch / f"{Path(place).name}_{prediction}_{weighting}"
                    row = run(place, prediction, weighting, num_iters, folder)
                    rows.append([Path(place).name, prediction, weighting, *row])
                    print(" ".join(rows[-1]), file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(scratch)
    bins = [f"{low} … {high}" for low, high in pairwise(LOGSNR_EDGES)]
    title = "Weighted loss by noise level λ in the last quarter of a training, and where it is twice that of the first"
    write_report("noise_levels", title, ["data", "predicts", "weighting", *bins, "twice the first"], rows, machine())


if __name__ == "__main__":
    main()
