"""What every test begins with."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

# networks this small gain nothing by threads; threads that share busy cores make them many times slower, and a forked
# test program waits forever for the threads of its parent
os.environ["OMP_NUM_THREADS"] = "1"

# a ladder ends with a report; the tests of the report ask for it
os.environ.setdefault("VDIFF_REPORT", "False")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # tests that were started in the background would hand an ignored Ctrl-C down to the programs that they interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ["cli_chain", "interop_diffusers", "text_import", "text_sampling", "training_processes", "data_conversion"]
"""Files that take longest although they hold many tests, in seconds of the processor."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first, then those of few tests: one that begins last keeps all processes but one idle."""
    sizes = Counter(item.path for item in items)
    ranks = {f"test_{name}": rank for rank, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (ranks.get(item.path.stem, len(ranks)), sizes[item.path], item.path))


def pytest_collection_finish() -> None:
    """What was imported lives as long as the process: the garbage collector need not look at it again and again."""
    gc.collect()
    gc.freeze()


UNHEEDED = {"data", "base", "dataset", "dataset_fingerprint", "teacher", "num_iters", "target_iters", "train_seconds"}
"""Fields of settings and descriptions that the memory of a run does not depend on."""


@pytest.fixture(scope="session", autouse=True)
def _memory_of_equal_runs_is_counted_once() -> Iterator[None]:
    """The commands count it in an update on tensors without values, which takes longer than the runs of most tests."""
    if "vdiff.training.student" not in sys.modules:
        yield
        return
    from vdiff.models.checkpoint import read_config
    from vdiff.training import base_training, student

    found: dict[str, Any] = {}

    def once(count: Callable[..., Any], images: Any, engine: Any, *described: Any) -> Any:
        settings = [{key: value for key, value in vars(each).items() if key not in UNHEEDED} for each in described]
        key = repr((count.__name__, images.shape, images.num_images, engine.world_size, engine.device, settings))
        if key not in found:
            found[key] = count()
        return found[key]

    of_base, of_stage = base_training.memory_of_base, student.memory_of_stage

    def memory_of_base(config: Any, images: Any, description: Any, engine: Any) -> Any:
        def base() -> Any:
            return of_base(config, images, description, engine)

        return base() if description.adapter else once(base, images, engine, config, description)

    def memory_of_stage(stage: Any, config: Any, images: Any, engine: Any) -> Any:
        def of() -> Any:
            return of_stage(stage, config, images, engine)

        own = stage.settings(config)
        return of() if own.student_config else once(of, images, engine, own, read_config(stage.base))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base_training, "memory_of_base", memory_of_base)
        patch.setattr(student, "memory_of_stage", memory_of_stage)
        yield


@pytest.fixture(autouse=True)
def _no_precision_of_an_earlier_test() -> Iterator[None]:
    """Accelerate keeps its precision for the whole process: forget it after each test that used it."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
