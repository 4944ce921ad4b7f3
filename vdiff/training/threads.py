"""The number of threads of a run: timed before it begins, and recorded, because it changes rounding errors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from vdiff.models.backbone import example_condition
from vdiff.models.denoiser import Denoiser
from vdiff.reporting import Reporter
from vdiff.text import plural
from vdiff.training.config import LoopConfig

PASS_SECONDS, ROUNDS, ENOUGH_SECONDS = 0.1, 3, 1.0
"""Least time of a timed pass, and the time for each number of threads: slower passes get fewer rounds."""
WORTH_WHILE = 1.2
"""bf16 is suggested if it is at least this many times as fast."""


def settled_threads(
    config: LoopConfig, build: Callable[[], Denoiser], shape: tuple[int, ...], reporter: Reporter, recorded: int | None
) -> int | None:
    """The number of threads: of the settings, else of the run's record, else the fastest; None: torch's default.

    Nothing is timed if OMP_NUM_THREADS is set, under a launcher or on a GPU. On a busy machine one thread may be
    several times as fast as two, which wait for each other.

    Args:
        build: makes a network like the trained one.
        recorded: the number in the record of a resumed run.
    """
    threads = config.threads or recorded
    is_given = "OMP_NUM_THREADS" in os.environ or int(os.environ.get("WORLD_SIZE", "1")) > 1
    if threads or is_given or config.device == "cuda" or (config.device == "auto" and torch.cuda.is_available()):
        return threads
    most = torch.get_num_threads()
    if most == 1:
        return None
    denoiser = build().train()
    z = timed_batch(denoiser, shape, config.batch_size)
    times = seconds_by_threads(denoiser, z, sorted({1, (most + 1) // 2, most}))
    best = min(times, key=lambda number: times[number])
    others = ", ".join(f"{seconds:.2g} s with {number}" for number, seconds in times.items())
    reporter.line(f"threads {best}: a pass of {plural(len(z), 'sample')} takes {others}; --threads sets the number")
    if config.precision == "auto" and computes_bf16():
        torch.set_num_threads(best)
        faster = times[best] / seconds_of_pass(denoiser, z, torch.autocast("cpu", dtype=torch.bfloat16))
        if faster > WORTH_WHILE:
            reporter.line(f"--precision bf16 is {faster:.1f} times as fast here; its effect on quality is not measured")
    return best


def timed_batch(denoiser: Denoiser, shape: tuple[int, ...], batch_size: int) -> torch.Tensor:
    """Zeros for a pass of `PASS_SECONDS`, at most a batch: in shorter passes, starting the threads costs the most."""
    z = torch.zeros(1, *shape)
    seconds_of_pass(denoiser, z, nullcontext())  # warm-up: kernels are chosen
    while len(z) < batch_size and seconds_of_pass(denoiser, z, nullcontext()) < PASS_SECONDS:
        z = torch.zeros(min(2 * len(z), batch_size), *shape)
    return z


def seconds_by_threads(denoiser: Denoiser, z: torch.Tensor, numbers: list[int]) -> dict[int, float]:
    """Threads → mean seconds of a forward and backward pass, in alternating rounds, as the load may change."""
    totals = dict.fromkeys(numbers, 0.0)
    rounds = 0
    while rounds < ROUNDS and max(totals.values()) < ENOUGH_SECONDS:
        rounds += 1
        for number in numbers:
            torch.set_num_threads(number)
            totals[number] += seconds_of_pass(denoiser, z, nullcontext())
    return {number: total / rounds for number, total in totals.items()}


def seconds_of_pass(denoiser: Denoiser, z: torch.Tensor, precision: AbstractContextManager[object]) -> float:
    """The time of a forward and a backward pass."""
    began = time.monotonic()
    condition = example_condition(denoiser.network.signature, len(z), z.shape[1:])
    with precision:
        v = denoiser(z, torch.full((len(z),), 0.5, dtype=torch.float64), condition).v
    v.square().mean().backward()
    denoiser.zero_grad()
    return time.monotonic() - began


def computes_bf16() -> bool:
    """Whether this processor has instructions for bf16 (AVX-512-BF16, AMX)."""
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, lambda: False)() for name in known)
