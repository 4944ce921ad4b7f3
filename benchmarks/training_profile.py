"""Where an update of vdiff spends its time, before and after what made it faster, and what each change gives.

    python benchmarks/training_profile.py

Each change is undone by itself, and all of them together; the sides take turns in one process, and the fastest updates
are compared: what a change gives is less than what other work on the machine may take. The profiles of all undone and
of none stand side by side in benchmarks/results/training_profile.md, what each gives in training_changes.md.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import click
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.report import machine, write_report
from benchmarks.training import SIZE, UNET, Update, milliseconds, ours, product_gigaflops_per_second
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine, build_engine

UPDATES, SHOWN = 3, 20


def two_operations(h: Tensor, conv: nn.Conv2d) -> Tensor:
    """Upsampling, then the convolution: 36/16 of the multiplications."""
    answer: Tensor = conv(F.interpolate(h, scale_factor=2.0, mode="nearest"))
    return answer


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ/√d) v, with the matrix of all pairs in memory."""
    return (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(dim=-1) @ v


def in_a_loop(averages: Sequence[Tensor], weights: Sequence[Tensor], weight: float) -> None:
    """A moving average, one weight after the other."""
    for average, each in zip(averages, weights, strict=True):
        average.lerp_(each, weight)


CHANGES: dict[str, tuple[str, Callable[..., Any]]] = {
    "upsampling and convolution in one": ("vdiff.models.unet.upsample_conv", two_operations),
    "scaled_dot_product_attention": ("torch.nn.functional.scaled_dot_product_attention", written_out),
    "averages in one call": ("torch._foreach_lerp_", in_a_loop),
}
"""What is done → the function that does it, and what was there before."""


@contextmanager
def undone(names: Sequence[str]) -> Iterator[None]:
    """Inside, these changes have not been made."""
    with ExitStack() as stack:
        for name in names:
            stack.enter_context(patch(*CHANGES[name]))
        yield


def build(engine: Engine, config: LoopConfig, names: Sequence[str]) -> Update:
    """An update of vdiff's without these changes."""
    with undone(names):
        update, _ = ours(engine, config, UNET, distil=False)

    def without(step: int, images: Tensor) -> object:
        with undone(names):
            return update(step, images)

    return without


def profiled(update: Update, images: Tensor) -> dict[str, tuple[int, float]]:
    """Operation → calls and milliseconds of an update; of the GPU where there is one."""
    on_gpu = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for step in range(UPDATES):
        update(step, images)
    with profile(activities=activities) as found:
        for step in range(UPDATES):
            update(step, images)
    spent = {
        e.key: (e.count, e.self_device_time_total if on_gpu else e.self_cpu_time_total) for e in found.key_averages()
    }
    return {key: (count // UPDATES, time / 1000 / UPDATES) for key, (count, time) in spent.items()}


def beside(before: dict[str, tuple[int, float]], after: dict[str, tuple[int, float]]) -> list[list[str]]:
    """The operations that take most of an update, before or after, and all of them."""
    most = sorted(before | after, key=lambda key: -max(before.get(key, (0, 0))[1], after.get(key, (0, 0))[1]))
    total = sum(time for _, time in after.values())
    rows = [["all", "", f"{sum(time for _, time in before.values()):.0f}", "", f"{total:.0f}", "100 %"]]
    for key in most[:SHOWN]:
        cells = [(str(calls), f"{time:.1f}") for calls, time in (before.get(key, (0, 0.0)), after.get(key, (0, 0.0)))]
        rows.append([key, *cells[0], *cells[1], f"{100 * after.get(key, (0, 0.0))[1] / total:.1f} %"])
    return rows


@click.command()
@click.option("--batch_size", default=16, show_default=True)
@click.option("--updates", default=20, show_default=True, help="Timed updates of each side, after 3 that are not.")
def main(batch_size: int, updates: int) -> None:
    """Print the tables and write them to benchmarks/results."""
    config = LoopConfig(num_iters=10**6, batch_size=batch_size, lr=1e-4, compile=False)
    engine = build_engine(config)
    images = torch.randint(0, 256, (batch_size, 3, SIZE, SIZE), dtype=torch.uint8)
    speed = product_gigaflops_per_second(engine.device, torch.float32)
    where = f"{machine()}; a plain matrix product: {speed:,.0f} GFLOP/s"
    cases = {"none": (), **{name: (name,) for name in CHANGES}, "all": tuple(CHANGES)}
    sides = {name: build(engine, config, names) for name, names in cases.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for step in range(updates + 3):
        for name, update in sides.items():
            times[name].append(milliseconds(update, step, images))
    found = {name: (statistics.median(each[3:]), min(each[3:])) for name, each in times.items()}
    what = f"{SIZE}×{SIZE}, batch {batch_size}, {engine.description}"
    rows = [
        [name, f"{ms:.0f}", f"{least:.0f}", f"{least - found['none'][1]:+.0f}"] for name, (ms, least) in found.items()
    ]
    columns = ["undone", "ms, median", "ms, fastest", "more"]
    write_report("training_changes", f"An update without its changes: {what}", columns, rows, where)
    columns = ["operation", "calls, all undone", "ms", "calls, as it is", "ms", "share"]
    rows = beside(profiled(sides["all"], images), profiled(sides["none"], images))
    write_report("training_profile", f"Where an update spends its time: {what}", columns, rows, where)


if __name__ == "__main__":
    main()
