"""Whether a training on a CPU compiles its network: tried if the run is long, and kept if it saves time.

Compiled code rounds differently, so the decision is recorded in the run, and a resumed run keeps it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from vdiff.reporting import Reporter
from vdiff.text import cause_of, duration, plural
from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine

SECONDS_TO_COMPILE = 60.0
"""A typical time: 56 s were measured for 6.5 million parameters on two cores. It only decides whether to try."""
TRY_FROM = 30
"""Compiling is tried if the run takes this many times as long."""


def may_compile(config: LoopConfig, engine: Engine, seconds: float) -> bool:
    """Whether a run of `seconds` is worth the trial; never on a GPU, which always compiles, or under a launcher."""
    is_alone_on_cpu = engine.device.type == "cpu" and engine.world_size == 1
    return config.compile is None and is_alone_on_cpu and seconds >= TRY_FROM * SECONDS_TO_COMPILE


def settled_compile(
    config: LoopConfig,
    engine: Engine,
    times: Callable[[Engine], tuple[float, float]],
    *,
    updates: int,
    seconds: float,
    num_networks: int,
    reporter: Reporter,
) -> bool | None:
    """Whether to compile: as the settings say; else, in a long run on a CPU, whether it saves time.

    Args:
        times: the seconds of the first and of a later update of the run, on an engine.
        updates: of the run.
        seconds: of an update that is not compiled.
        num_networks: how often a network is compiled in the run.
    """
    if not may_compile(config, engine, updates * seconds):
        return config.compile
    reporter.line("compiling the network, to see whether this run takes less time; --compile False skips this")
    try:
        first, usual = times(replace(engine, compile=True))
    except Exception as error:  # the compiler and its tools raise errors of many classes
        reporter.line(f"not compiled: {cause_of(error)}")
        return False
    is_faster = updates * (seconds - usual) > num_networks * first
    word = "compiled" if is_faster else "not compiled"
    reporter.line(
        f"{word}: an update takes {usual:.2g} s compiled and {seconds:.2g} s otherwise, and compiling takes "
        f"{duration(num_networks * first)} for {plural(num_networks, 'network')}; --compile overrides this"
    )
    return is_faster
