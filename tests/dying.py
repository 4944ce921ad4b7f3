"""Drawing that dies, in a folder that holds a checkpoint `model`.

For every format, a drawing leaves without a word at the points below, or is killed at random moments; the same call
then goes on. Printed are the cases whose files are not, byte for byte, those of one that was never cut.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torchvision.utils  # noqa: F401 - once, not in every fork

from tests.drawing import run, spec
from tests.sudden_end import die_at
from tests.toy import contents
from vdiff.sampling import job, outputs, record_log
from vdiff.sampling.outputs import FORMATS

NUM, BATCH_SIZE = 11, 4
POINTS: dict[str, tuple[Any, str]] = {
    "append": (record_log.RecordLog, "append"),
    "file": (outputs.FileFolder, "encode"),
    "batch": (outputs.FileFolder, "commit"),
    "grid": (job, "save_png"),
    "path": (job.TrajectoryRecorder, "save"),
    "move": (shutil, "move"),
    "replace": (os, "replace"),
    "remove": (outputs, "remove"),
}
# a point, and at which of its calls
CASES = {
    "png": [
        "after:file 2",
        "after:batch 2",
        "after:path 1",
        "before:grid 1",
        "before:replace 1",
        "before:replace 3",
        "after:replace 5",
    ],
    "zip": [
        *("before:append 1", "after:append 2", "before:path 1", "after:path 1", "before:grid 1", "after:grid 1"),
        *("after:move 1", "after:move 3", "before:replace 1", "before:replace 5", "after:replace 5"),
        *("before:remove 2", "after:remove 2"),
    ],
    "npz": ["before:remove 2"],
    "lmdb": ["after:append 3", "before:remove 2", "before:replace 5", "after:replace 5"],
}


def no_death() -> None:
    """Nothing."""


def draw(place: Path, form: str, prepare: Callable[[], None] = no_death, seconds: float = 0.0) -> int:
    """Draw in a process of its own, killed after so many seconds (0: never); its exit code."""
    pid = os.fork()
    if pid == 0:
        os.chdir(place)
        prepare()
        wanted = spec(Path("../model"), sampler="ddpm")
        run(wanted, Path(f"out.{form}"), form=form, num=NUM, batch_size=BATCH_SIZE, trajectory=True)
        os._exit(0)
    if seconds:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(root: Path, kills: int, most: int) -> None:
    """Print the number of deaths, and the cases that went wrong; of each format at up to `most` of its points."""
    deaths, wrong = 0, []
    for form in FORMATS:
        (whole := root / f"whole {form}").mkdir()
        began = time.monotonic()
        assert draw(whole, form) == 0
        usual = time.monotonic() - began
        rng = random.Random(form)
        cuts = [(case, *case.split()) for case in CASES[form][:: max(len(CASES[form]) // most, 1)]]
        ends = [(case, partial(die_at, POINTS, point, int(number)), 0.0) for case, point, number in cuts]
        ends += [(str(k), no_death, rng.uniform(0.2, 1) * usual) for k in range(kills)]
        for case, prepare, seconds in ends:
            (place := root / f"{form} {case.replace(':', ' ')}").mkdir()
            code = draw(place, form, prepare, seconds)
            deaths += code != 0
            is_expected = code in ((0, -9) if seconds else (9,))
            if not is_expected or draw(place, form) != 0 or contents(place) != contents(whole):
                wrong.append(f"{form} {case}")
    print(json.dumps({"deaths": deaths, "wrong": wrong}))
