"""What every test begins with."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator

import pytest

# networks this small gain nothing by threads; threads that share busy cores make them many times slower, and a forked
# test program waits forever for the threads of its parent
os.environ["OMP_NUM_THREADS"] = "1"

# a ladder ends with a report; the tests of the report ask for it
os.environ.setdefault("VDIFF_REPORT", "False")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # tests that were started in the background would hand an ignored Ctrl-C down to the programs that they interrupt
    signal.signal(signal.SIGINT, signal.default_int_handler)


LONGEST = ["cli_chain", "training_processes", "interop_diffusers", "data_resume", "averages", "data_conversion"]
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


@pytest.fixture(autouse=True)
def _no_precision_of_an_earlier_test() -> Iterator[None]:
    """Accelerate keeps its precision for the whole process: forget it after each test that used it."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(reset_partial_state=True)
