"""Metrics of updates: means since the last reading, kept on the device until they are read."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.training.config import LoopConfig
from vdiff.training.engine import Engine
from vdiff.training.optimisation import learning_rate

LOGSNR_EDGES = (-20, -15, -10, -5, 0, 5, 10, 15, 20)
NUM_BINS = len(LOGSNR_EDGES) - 1
MAX_STEPS = 32


@dataclass(frozen=True)
class Position:
    """The progress of a run: finished updates, and the seconds spent on them."""

    step: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class StepResult:
    """The results of one update, on the device, without waiting for it.

    `losses` (b,) are the weighted errors of this process's images, `t` (b,) their times and `logsnr` (b,) their noise
    levels. `norm` () is the norm of the gradient over all processes; `is_bad` () bool: it is not finite, and the
    update changed nothing. `counts` (b,) are the weights of the images; None: all 1.
    """

    losses: Tensor
    t: Tensor
    logsnr: Tensor
    norm: Tensor
    is_bad: Tensor
    counts: Tensor | None = None


class Meter:
    """The progress of a run, and the sums of its updates' results since the last reading.

    Reading waits for the device; every process must read after the same updates.

    Attributes:
        bad_in_a_row: consecutive bad updates up to now; on CUDA up to the previous update, so that reading does not
        wait for the newest one.

    Args:
        step_bins: the number of steps of a few-step model, to log a loss for each step; None: no such losses.
        noun: what a sample is called.
    """

    def __init__(
        self, start: Position, config: LoopConfig, engine: Engine, step_bins: int | None = None, noun: str = "image"
    ) -> None:
        self.position, self.config, self.engine, self.noun = start, config, engine, noun
        self.began = self.read_at = time.monotonic()
        self.start = start
        self.note = ""
        self.waited = 0.0
        self._updates = 0
        self.steps = step_bins if step_bins is not None and step_bins <= MAX_STEPS else 0
        # losses, then image counts: for each noise level, then for each step
        self._sums = torch.zeros(2 * (NUM_BINS + self.steps), dtype=torch.float64, device="cpu")
        self._sums = self._sums.to(engine.device, torch.float32 if engine.device.type == "mps" else torch.float64)
        self._norms = torch.zeros((), device=engine.device)
        self._bad = torch.zeros((), device=engine.device)
        self._row = torch.zeros((), device=engine.device)
        self.bad_in_a_row = 0
        self._late: tuple[Tensor, torch.cuda.Event] | None = None

    def add(self, result: StepResult, waited: float) -> None:
        """Add one update, and the seconds that it waited for its images."""
        good = ~result.is_bad
        low, high = LOGSNR_EDGES[0], LOGSNR_EDGES[-1]
        width = (high - low) / NUM_BINS
        bins = ((result.logsnr.to(self._sums) - low) / width).floor().clamp(0, NUM_BINS - 1).long()
        # 0 · NaN is NaN
        counts = good.to(self._sums).expand_as(result.losses)
        counts = counts if result.counts is None else counts * result.counts.to(self._sums)
        losses = torch.where(good, result.losses.to(self._sums), 0) * counts
        groups = [bins]
        if self.steps:  # t = i/N is recognised exactly; a t in between belongs to the step that begins above it
            step = (result.t.to(self._sums) * self.steps - 1e-5).ceil().clamp(1, self.steps).long() - 1
            groups.append(NUM_BINS + step)
        for group in groups:
            self._sums.index_add_(0, group, losses)
            self._sums.index_add_(0, group + NUM_BINS + self.steps, counts)
        self._norms += torch.where(good, result.norm, 0)
        self._bad += result.is_bad
        self._row = (self._row + 1) * result.is_bad
        self.bad_in_a_row = int(self._read_late())
        self._updates += 1
        self.waited += waited
        self.position = Position(self.position.step + 1, self.start.seconds + time.monotonic() - self.began)

    @property
    def has_diverged(self) -> bool:
        """Whether there were too many consecutive bad updates."""
        return self.bad_in_a_row >= max(self.config.max_bad_steps, 1)

    def seconds_left_of_update(self) -> float:
        """The time that the current update still needs, if it takes as long as the mean so far; 0 in the first one."""
        spent, done = self.position.seconds - self.start.seconds, self.position.step - self.start.step
        return max(0.0, spent / done - (time.monotonic() - self.began - spent)) if done else 0.0

    def catch_up(self) -> None:
        """Wait for the newest update, so that `bad_in_a_row` includes it."""
        self.bad_in_a_row = int(self._row.item())

    def _read_late(self) -> float:
        """The number of consecutive bad updates: now, or on CUDA one update ago (the same in every process)."""
        if self._row.device.type != "cuda":
            return self._row.item()
        count, event = torch.empty((), pin_memory=True), torch.cuda.Event()
        count.copy_(self._row, non_blocking=True)
        event.record()
        before, self._late = self._late, (count, event)
        if before is None:
            return 0
        before[1].synchronize()
        return before[0].item()

    def read(self) -> dict[str, float]:
        """The scalars of the updates since the last reading; loss and gradient are NaN if all of them were bad."""
        sums = self.engine.sum(self._sums).tolist()
        norms, bad = torch.stack([self._norms, self._bad]).tolist()
        now = time.monotonic()
        elapsed = max(now - self.read_at, 1e-9)
        totals, counts = sums[: len(sums) // 2], sums[len(sums) // 2 :]
        by_level, images = totals[:NUM_BINS], counts[:NUM_BINS]
        good = self._updates - bad
        loss = sum(by_level) / sum(images) if sum(images) else math.nan
        rate = self._updates * self.config.batch_size / elapsed
        scalars = {
            "loss": loss,
            "grad_norm": norms / good if good else math.nan,
            "lr": learning_rate(self.config, self.position.step - 1),
            "images_per_second": rate,
            "update_ms": 1000 * elapsed / self._updates,
            "data_wait": self.waited / elapsed,
            "bad_updates": bad,
        }
        edges = zip(LOGSNR_EDGES, LOGSNR_EDGES[1:], by_level, images, strict=False)
        scalars |= {f"loss_by_logsnr/{low}_{high}": total / count for low, high, total, count in edges if count}
        by_step = zip(totals[NUM_BINS:], counts[NUM_BINS:], strict=True)
        scalars |= {f"loss_by_step/{i}": total / count for i, (total, count) in enumerate(by_step, 1) if count}
        memory = memory_bytes(self.engine.device)
        scalars |= {"memory_gib": memory / 2**30} if memory else {}
        self.note = f"loss {loss:.4g}, {rate:.3g} {self.noun}s/s, {100 * scalars['data_wait']:.0f} % waiting for data"
        self.note += f", {memory / 2**30:.2g} GiB" if memory else ""
        self.note += f", {bad:.0f} bad" if bad else ""
        for sum_ in (self._sums, self._norms, self._bad):
            sum_.zero_()
        self._updates, self.waited, self.read_at = 0, 0.0, now
        return scalars


def memory_bytes(device: torch.device) -> int:
    """The peak memory so far, of the GPU or else of this process; 0 if unknown."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
