"""The losses of a run, as its TensorBoard log has them."""

from __future__ import annotations

import logging
import math
from pathlib import Path

LOG, LOSS = "log", "loss"
MAX_POINTS = 400


def read_losses(folder: Path) -> list[tuple[int, float]]:
    """(update, loss) in the order of the updates; what a resumed run did again is taken once, the last.

    Empty where nothing was logged there, or nothing that can be read. Of very many, every k-th and the last.
    """
    if not any((folder / LOG).glob("events.out.tfevents.*")):
        return []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    talk = logging.getLogger("tensorboard")
    before, talk.disabled = talk.disabled, True  # a log that a kill cut short is no news to who reads the page
    try:
        events = EventAccumulator(str(folder / LOG), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
        events.Reload()
        told = events.Scalars(LOSS) if LOSS in events.Tags()["scalars"] else []
    finally:
        talk.disabled = before
    losses = {event.step: event.value for event in told if math.isfinite(event.value)}
    return thinned(sorted(losses.items()))


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """At most `MAX_POINTS` points and the last one."""
    step = -(-len(points) // MAX_POINTS)
    return points if step <= 1 else [*points[:-1:step], points[-1]]
