"""The rows of an evaluation, one after another: samples drawn by all processes, figures made by the first."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from vdiff.distributed import Processes
from vdiff.errors import VdiffError
from vdiff.evaluation.drawn import MAX_PAIRED, Artist, Division, draw_piece
from vdiff.evaluation.features import Features
from vdiff.evaluation.figures import Figures
from vdiff.evaluation.pieces import Arrays, WorkFolder, write_arrays
from vdiff.evaluation.plan import Request
from vdiff.evaluation.reference import Statistics
from vdiff.evaluation.results import Row, plain, row_from
from vdiff.files import parse, read_text, write_text
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.speed import impossible_times
from vdiff.reporting import Progress, Reporter


@dataclass(frozen=True)
class Style:
    """How all rows are drawn and measured.

    Attributes:
        n, seed: samples 0 … n − 1 of the seed.
        metrics: names from `plan.METRICS`.
        guidance: the weight w of classifier-free guidance.
        batch_size: drawn at once by each process.
        precision: what networks compute in.
    """

    n: int
    seed: int
    metrics: tuple[str, ...]
    guidance: float
    batch_size: int
    precision: str


class RowMaker:
    """Makes the rows of one evaluation; what is done already is taken from the work folder."""

    def __init__(
        self,
        known: Statistics,
        features: Features,
        style: Style,
        work: WorkFolder,
        processes: Processes,
        reporter: Reporter,
    ) -> None:
        self.features, self.style = features, style
        self.work, self.processes, self.reporter = work, processes, reporter
        self.figures = Figures(known, features, style.n, style.metrics, processes.device)
        self.division = Division(style.n, features.dim)
        self.pieces = self.division.pieces()
        self.samples = [self.division.samples(piece) for piece in self.pieces]

    def draw_teacher(self, request: Request) -> None:
        """Draw the images that samples are compared with."""
        paired = [range(each.start, min(each.stop, MAX_PAIRED)) for each in self.samples if each.start < MAX_PAIRED]
        names = [teacher_file(k) for k in range(len(paired))]
        artist = self._artist(request)
        with self._bar(f"teacher, {_steps(request)}", names, paired) as bar:
            done = self._done(names, paired)

            def compute(name: str) -> Arrays:
                nonlocal done
                parts: list[Tensor] = []
                for batch in artist.batches(paired[names.index(name)]):
                    parts.append(artist.draw(batch, bar, done))
                    done += len(batch)
                    bar.update(done)
                return {"images": torch.cat(parts).numpy()}

            self.work.do(names, compute)

    def make(self, number: int, request: Request, config: CheckpointConfig, fingerprint: str) -> None:
        """Draw and measure one row."""
        with self.processes.together():
            is_done = self.work.file(row_file(number)).exists()
        if is_done:
            return
        names = [f"row-{number:03d}-piece-{k:04d}.npz" for k in range(len(self.pieces))]
        artist = self._artist(request)
        with self._bar(f"{request.checkpoint.name}, {request.sampler}, {_steps(request)}", names, self.samples) as bar:
            done = self._done(names, self.samples)

            def compute(name: str) -> Arrays:
                nonlocal done
                k = names.index(name)
                arrays = draw_piece(artist, self.division, self.pieces[k], self.features, self._theirs(k), bar, done)
                done += len(self.samples[k])
                return arrays

            self.work.do(names, compute)
        with self.processes.together():
            if self.processes.is_main:
                self._finish(number, request, config, fingerprint, [self.work.read(name) for name in names])
                for name in names:
                    self.work.file(name).unlink()

    def _finish(
        self, number: int, request: Request, config: CheckpointConfig, fingerprint: str, pieces: Sequence[Arrays]
    ) -> None:
        began, n = time.monotonic(), self.style.n
        metrics = self.figures(pieces)
        write_arrays(self.work.file(small_file(number)), {"small": np.concatenate([each["small"] for each in pieces])})
        seconds = sum(float(piece["seconds"]) for piece in pieces) + time.monotonic() - began
        row = Row(
            checkpoint=request.checkpoint.as_posix(),
            checkpoint_fingerprint=fingerprint,
            weights="raw" if request.raw else config.weights,
            sampler=request.sampler,
            grid=request.grid,
            num_steps=request.num_steps,
            evaluations=sum(int(piece["evaluations"]) for piece in pieces) / n,
            n=n,
            seed=self.style.seed,
            seconds=seconds,
            ms_per_image=1000 * sum(float(piece["drawing"]) for piece in pieces) / n,
            metrics=metrics,
            guidance=self.style.guidance,
        )
        write_text(self.work.file(row_file(number)), json.dumps(plain(asdict(row))) + "\n")

    def time_again(self, rows: Sequence[Row], requests: Sequence[Request], networks: Sequence[str]) -> list[Row]:
        """The rows; times that cannot be are measured again on one batch, and marked where they stay."""
        found = list(rows)

        def doubtful() -> list[int]:
            each = zip(networks, found, strict=True)
            return impossible_times([((name, row.sampler), row.evaluations, row.ms_per_image) for name, row in each])

        with self.processes.together():
            if self.processes.is_main:
                for k in doubtful():
                    artist, batch = self._artist(requests[k]), range(min(self.style.batch_size, self.style.n))
                    with self.reporter.progress("timing again", 2 * len(batch), "images") as bar:
                        artist.draw(batch, bar, 0)  # to warm up
                        began = time.monotonic()
                        artist.draw(batch, bar, len(batch))
                        again = 1000 * (time.monotonic() - began) / len(batch)
                    found[k] = replace(found[k], ms_per_image=min(found[k].ms_per_image, again))
        marked = doubtful()
        return [replace(row, is_time_doubtful=k in marked) for k, row in enumerate(found)]

    def _artist(self, request: Request) -> Artist:
        style = self.style
        return Artist(
            request,
            seed=style.seed,
            guidance=style.guidance,
            batch_size=style.batch_size,
            device=self.processes.device,
            precision=style.precision,
        )

    def _theirs(self, piece: int) -> Tensor | None:
        """The teacher's images of the first samples of a piece."""
        if not self.work.file(teacher_file(piece)).exists():
            return None
        return torch.from_numpy(self.work.read(teacher_file(piece))["images"])

    def _bar(self, description: str, names: Sequence[str], ranges: Sequence[range]) -> AbstractContextManager[Progress]:
        """A bar for what this process has to do; alone, for all, with what is done already."""
        start = self._done(names, ranges)
        missing = self.processes.share(self.work.missing(names))
        total = start + sum(len(ranges[names.index(name)]) for name in missing)
        return self.reporter.progress(description, total, "images", start=start)

    def _done(self, names: Sequence[str], ranges: Sequence[range]) -> int:
        """Images that need no more drawing, as this process's bar counts them."""
        if self.processes.world_size > 1:
            return 0
        missing = set(self.work.missing(names))
        return sum(len(drawn) for name, drawn in zip(names, ranges, strict=True) if name not in missing)


def finished_rows(work: WorkFolder, count: int) -> list[Row]:
    """The rows that are done.

    Raises:
        VdiffError: one cannot be read.
    """
    found = []
    for number in range(count):
        path = work.file(row_file(number))
        try:
            found.append(row_from(parse(read_text(path))))
        except (OSError, ValueError, VdiffError):
            raise VdiffError(f"{path} cannot be read", f"remove {work.path}, then give the command again") from None
    return found


def row_file(number: int) -> str:
    """What is known of a row when its samples are gone."""
    return f"row-{number:03d}.json"


def small_file(number: int) -> str:
    """Its first samples, small."""
    return f"row-{number:03d}-small.npz"


def teacher_file(piece: int) -> str:
    """The teacher's images of a piece."""
    return f"teacher-{piece:04d}.npz"


def _steps(request: Request) -> str:
    return f"{request.num_steps} step{'s' if request.num_steps > 1 else ''}"
