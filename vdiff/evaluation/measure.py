"""An evaluation: samples of checkpoints measured against a dataset, in pieces that survive a kill."""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.data.images import PICTURE
from vdiff.distributed import Processes, pick_device
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.evaluation.features import INCEPTION, PIXELS, Features, load_features
from vdiff.evaluation.metrics import (
    Arrays,
    ClassStats,
    FrechetDistance,
    KernelDistance,
    Manifold,
    Moments,
    from_arrays,
    inception_score,
    mean_metric,
    median_metric,
    precision_recall,
)
from vdiff.evaluation.nearest import MAX_QUERIES, NearestSearch, add_nearest, save_pairs
from vdiff.evaluation.plan import (
    EXTRAPOLATED_FROM,
    MAX_PAIRED,
    EvalPlan,
    RowSpec,
    check_kind,
    check_numbers,
    choose_metrics,
    notes_for,
    plan_rows,
    shared_kind,
)
from vdiff.evaluation.reference import (
    MAX_KEPT,
    MOMENTS,
    DataStats,
    ReferenceImages,
    cache_folder,
    data_stats,
    random_subset,
)
from vdiff.evaluation.results import EVALUATION, EvalRow, Evaluation, Metric, plain, row_from
from vdiff.evaluation.samples import CLASS_STATS, STATE, Generator, SampleBlocks, sample_stats
from vdiff.evaluation.work import WorkFolder, key_of, write_arrays
from vdiff.files import parse, read_text, write_text
from vdiff.models.checkpoint import CheckpointConfig, read_config, weights_fingerprint
from vdiff.models.checks import check_guidance
from vdiff.models.speed import impossible_times, pick_precision
from vdiff.replacing import check_free, check_ours, discard, is_free, locked
from vdiff.reporting import DOUBTFUL_TIMES, Progress, Reporter, Silent

FORMAT = 2
RANGE = 2.0
"""From black to white."""


def evaluate(
    checkpoints: Sequence[Path],
    dataset: Path | str,
    *,
    num_timesteps: Sequence[int] = (),
    samplers: Sequence[str] = ("ddim",),
    grid: str = "uniform",
    raw: bool = False,
    device: str = "auto",
    processes: Processes | None = None,
    reporter: Reporter | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    cache: Path | None = None,
    command: str = "",
    **plan: Any,
) -> Evaluation:
    """Measure every checkpoint, in every number of steps (none given: its own), with every sampler.

    Args:
        plan: the attributes of `EvalPlan`, such as `n=10_000`.
        out, overwrite, cache, command: see `evaluate_rows`.

    Raises:
        VdiffError, Interrupted: see `plan_rows` and `evaluate_rows`.
    """
    reporter = reporter or Silent()
    rows, left_out = plan_rows(checkpoints, num_timesteps=num_timesteps, samplers=samplers, grid=grid, raw=raw)
    for line in left_out:
        reporter.line(line)
    return evaluate_rows(
        rows,
        dataset,
        EvalPlan(**plan),
        processes=processes or Processes(pick_device(device)),
        reporter=reporter,
        out=out,
        overwrite=overwrite,
        cache=cache,
        command=command,
    )


def evaluate_rows(
    rows: Sequence[RowSpec],
    dataset: Path | str,
    plan: EvalPlan,
    *,
    processes: Processes,
    reporter: Reporter,
    out: Path | None = None,
    overwrite: bool = False,
    cache: Path | None = None,
    command: str = "",
) -> Evaluation:
    """Measure all rows from the same noise against one dataset; written to `out` if that is given.

    The same call goes on where it was stopped, from the folder `.OUT.work` beside the file; if `out` holds this very
    evaluation already, that is returned. Every process of a launcher calls this and gets the same results.

    Raises:
        Interrupted: a signal came; the samples so far are kept.
        VdiffError: something in the plan is impossible; `out` exists and is something else.
    """
    if not rows:
        raise ValueError("no rows")
    if out is None and processes.world_size > 1:
        raise OptionError("several processes need a file that all of them see", "give --out FILE")
    with _work_place(out) as place, ExitStack() as lock, _interruption_explained(out):
        with processes.together():
            job = _prepare(rows, dataset, plan, processes.device)
            pairs = out.with_name(f"{out.stem}-nearest.png") if out and "nearest" in job.plan.metrics else None
            if out is not None:
                lock.enter_context(locked(out, place, *([pairs] if pairs else []), mine=processes.is_main))
                if pairs is not None and not place.exists() and not EVALUATION.files(out):
                    check_free(pairs, PICTURE, overwrite=True)
        with processes.together():
            finished = _finished(out, job.key, overwrite)
            if finished is not None and processes.is_main:
                discard(place)
        if finished is not None:
            return finished
        work = WorkFolder(place, job.key, processes, reporter)
        data = data_stats(job.images, job.features, cache=cache or cache_folder(), work=work)
        run = _Rows(job, MetricCalculator(data, job.features, job.plan, processes.device), work)
        if job.teacher is not None:
            run.draw_teacher(job.teacher)
        for number, row in enumerate(rows):
            run.measure(number, row)
        found = run.time_again(rows, [_read_row(work, number) for number in range(len(rows))])
        thumbs: list[NDArray[np.uint8]] = []
        if "nearest" in job.plan.metrics:
            thumbs = [work.read(_thumbs_file(number))["small"] for number in range(len(rows))]
            found = add_nearest(found, thumbs, job.images, work)
        device = processes.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        notes = notes_for(job.images, job.configs, job.features, plan.n, job.plan.metrics)
        results = Evaluation(
            features=job.features.name,
            device=name if processes.world_size == 1 else f"{processes.world_size} × {name}",
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=command,
            reference=job.images.describe(),
            rows=tuple(found),
            pairs=pairs.name if pairs else None,
            teacher=plan.teacher.as_posix() if plan.teacher else "",
            teacher_steps=job.teacher.num_steps if job.teacher else None,
            notes=(*notes, *([DOUBTFUL_TIMES] if any(row.is_time_doubtful for row in found) else [])),
            job=job.key,
        )
        with processes.together():
            if processes.is_main:
                if pairs is not None:
                    save_pairs(found, thumbs, job.images, pairs)
                if out is not None:
                    results.write(out)
                work.remove()
    return results


@dataclass(frozen=True)
class _EvalJob:
    """Everything that determines the metrics, checked before anything is drawn; `plan` says what "auto" means."""

    key: str
    plan: EvalPlan
    images: ReferenceImages
    features: Features
    configs: dict[Path, CheckpointConfig]
    fingerprints: dict[RowSpec, str]
    teacher: RowSpec | None


def _prepare(rows: Sequence[RowSpec], dataset: Path | str, plan: EvalPlan, device: torch.device) -> _EvalJob:
    folders = [row.checkpoint for row in rows] + ([plan.teacher] if plan.teacher else [])
    configs = {folder: read_config(folder) for folder in dict.fromkeys(folders)}
    size, channels = shared_kind(configs)
    for folder, config in configs.items():
        try:
            check_guidance(config, plan.guidance)
        except VdiffError as error:
            raise OptionError(f"--guidance {plan.guidance:g}: {folder}: {error.cause}", error.hint) from None
    images = ReferenceImages(dataset, size)
    check_kind((size, channels), (images.image_size, images.channels), images.store.path)
    features = load_features(plan.features, image_size=size, channels=channels, device=device, weights=plan.weights)
    metrics = choose_metrics(plan.metrics, features, plan.teacher is not None)
    check_numbers(plan.n, len(images), features, metrics, images.store.path)
    teacher = None
    if plan.teacher is not None:
        (teacher,), _ = plan_rows(
            [plan.teacher], num_timesteps=[plan.teacher_steps or configs[plan.teacher].num_timesteps]
        )
    fingerprints = {row: _weights_of(row) for row in [*rows, *([teacher] if teacher else [])]}
    precision = pick_precision(plan.precision, device)
    asked = [[fingerprints[row], row.sampler, row.num_steps, row.grid] for row in rows]
    of_teacher = [fingerprints[teacher], teacher.num_steps] if teacher else []
    key = key_of(
        [
            *(FORMAT, images.identity, features.fingerprint, features.dim, asked, of_teacher),
            *(plan.n, plan.seed, metrics, plan.guidance, precision),
        ]
    )
    plan = replace(plan, metrics=metrics, precision=precision)
    return _EvalJob(key, plan, images, features, configs, fingerprints, teacher)


def _weights_of(row: RowSpec) -> str:
    """The SHA-256 of the weights that a row is drawn with."""
    if not row.raw or read_config(row.checkpoint).weights == "raw":
        return weights_fingerprint(row.checkpoint)
    path = row.checkpoint / STATE
    if not path.exists():
        raise VdiffError(f"{row.checkpoint} keeps no raw weights: there is no {STATE}", "leave --raw out")
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finished(out: Path | None, key: str, overwrite: bool) -> Evaluation | None:
    """What lies in `out` already, if it is this evaluation."""
    if out is None or is_free(out):
        return None
    check_ours(out, EVALUATION)
    if overwrite:
        return None
    found = Evaluation.read(out)
    if found.job != key:
        raise VdiffError(f"{out} holds another evaluation", "give --overwrite to replace it, or another --out")
    return found


@contextmanager
def _work_place(out: Path | None) -> Iterator[Path]:
    """Where results of the pieces are kept until the end."""
    if out is not None:
        yield out.with_name(f".{out.name}.work")
        return
    with tempfile.TemporaryDirectory(prefix="vdiff-") as folder:
        yield Path(folder) / "work"


@contextmanager
def _interruption_explained(out: Path | None) -> Iterator[None]:
    """Say what is kept after a signal."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
        kept = "nothing is kept" if out is None else "what was drawn is kept; the same command goes on"
        raise Interrupted(f"stopped: {kept}", code) from None


class MetricCalculator:
    """Computes the metrics of rows; what is the same for all rows is computed once."""

    def __init__(self, data: DataStats, features: Features, plan: EvalPlan, device: torch.device) -> None:
        self.data, self.features, self.plan, self.device = data, features, plan, device
        self.num_pairs = min(plan.n, MAX_KEPT, len(data.kept))

    @cached_property
    def _frechet(self) -> FrechetDistance:
        return FrechetDistance(self.data.moments)

    @cached_property
    def _kernel(self) -> KernelDistance:
        return KernelDistance(self.data.kept, self.device)

    @cached_property
    def _manifold(self) -> Manifold:
        return Manifold(self.data.kept[random_subset(len(self.data.kept), self.num_pairs)], self.device)

    @cached_property
    def _nearest_data(self) -> Metric:
        own = random_subset(len(self.data.kept), MAX_QUERIES)
        return self._nearest(self.data.kept[own], own)

    def _nearest(self, vectors: NDArray[np.float32], own: NDArray[np.int64] | None = None) -> Metric:
        search = NearestSearch(vectors, own, self.device)
        search.add(0, self.data.kept)
        return median_metric(search.distances)

    def calculate_metrics(self, stats: Sequence[Arrays]) -> dict[str, Metric]:
        """The metrics of the samples behind some `sample_stats`, except the nearest images in pixels."""
        wanted, features = self.plan.metrics, self.features
        kept, errors = (np.concatenate([piece[name] for piece in stats]) for name in ("kept", "errors"))
        fd, kd = ("fid", "kid") if features.name == INCEPTION else ("fd", "kd")
        found: dict[str, Metric] = {}
        if "fd" in wanted:
            blocks = [block for piece in stats for block in from_arrays(Moments, piece, MOMENTS)]
            found[fd], at_infinity = self._frechet.measure(blocks)
            if self.plan.n >= EXTRAPOLATED_FROM * features.dim:
                found[f"{fd}_inf"] = at_infinity
        if "kd" in wanted:
            found[kd] = self._kernel(kept)
        if "precision" in wanted or "recall" in wanted:
            both = zip(("precision", "recall"), precision_recall(kept[: self.num_pairs], self._manifold), strict=True)
            found |= {name: metric for name, metric in both if name in wanted}
        if "isc" in wanted:
            classes = [block for piece in stats for block in from_arrays(ClassStats, piece, CLASS_STATS)]
            found["isc"] = inception_score(classes)
        if len(errors):
            squared = mean_metric(errors)
            found |= {name: f(squared) for name, f in (("rmse", rmse), ("psnr", psnr)) if name in wanted}
        if "nearest" in wanted and features.name != PIXELS:
            found["nearest_features"] = self._nearest(kept[:MAX_QUERIES])
            found["nearest_data_features"] = self._nearest_data
        return found


def rmse(squared: Metric) -> Metric:
    """√ of the mean of `vdiff.models.drawing.squared_errors` and of its bounds."""
    low, high = (None if bound is None else math.sqrt(max(bound, 0.0)) for bound in (squared.low, squared.high))
    return Metric(math.sqrt(squared.value), low, high)


def psnr(squared: Metric) -> Metric:
    """10 log₁₀ (2² / e) of a mean squared error e, in dB; the bounds change places."""

    def decibels(error: float) -> float:
        return 10 * math.log10(RANGE**2 / error) if error > 0 else math.inf

    low, high = (None if bound is None else decibels(bound) for bound in (squared.high, squared.low))
    return Metric(decibels(squared.value), low, high)


class _Rows:
    """Draws and measures the rows of one evaluation; what is done already is taken from the work folder."""

    def __init__(self, job: _EvalJob, calculator: MetricCalculator, work: WorkFolder) -> None:
        self.job, self.plan, self.calculator, self.work = job, job.plan, calculator, work
        self.blocks = SampleBlocks(job.plan.n, job.features.dim)
        self.pieces = self.blocks.pieces()
        self.samples = [self.blocks.samples(piece) for piece in self.pieces]

    def _generator(self, row: RowSpec) -> Generator:
        return Generator(row, self.plan, self.work.processes.device)

    def draw_teacher(self, row: RowSpec) -> None:
        """Draw the images that samples are compared with."""
        paired = [range(each.start, min(each.stop, MAX_PAIRED)) for each in self.samples if each.start < MAX_PAIRED]
        generator = self._generator(row)

        def compute(piece: int, bar: Progress, done: int) -> Arrays:
            parts: list[Tensor] = []
            for batch in generator.batches(paired[piece]):
                parts.append(generator.draw(batch, bar, done))
                done += len(batch)
                bar.update(done)
            return {"images": torch.cat(parts).numpy()}

        sizes = {_teacher_file(piece): len(samples) for piece, samples in enumerate(paired)}
        self.work.compute(f"teacher, {row.steps}", sizes, compute)

    def measure(self, number: int, row: RowSpec) -> None:
        """Draw and measure one row."""
        if self.work.has(_row_file(number)):
            return
        generator = self._generator(row)

        def compute(piece: int, bar: Progress, done: int) -> Arrays:
            of_teacher = None
            if self.work.file(_teacher_file(piece)).exists():
                of_teacher = torch.from_numpy(self.work.read(_teacher_file(piece))["images"])
            blocks = self.pieces[piece]
            return sample_stats(generator, self.blocks, blocks, self.job.features, of_teacher, bar, done)

        sizes = {f"row-{number:03d}-piece-{k:04d}.npz": len(samples) for k, samples in enumerate(self.samples)}
        self.work.compute(f"{row.checkpoint.name}, {row.sampler}, {row.steps}", sizes, compute)
        with self.work.processes.together():
            if self.work.processes.is_main:
                self._finish(number, row, [self.work.read(name) for name in sizes])
                for name in sizes:
                    self.work.file(name).unlink()

    def _finish(self, number: int, row: RowSpec, stats: Sequence[Arrays]) -> None:
        began, n = time.monotonic(), self.plan.n
        metrics = self.calculator.calculate_metrics(stats)
        thumbs = np.concatenate([each["small"] for each in stats])
        write_arrays(self.work.file(_thumbs_file(number)), {"small": thumbs})
        found = EvalRow(
            checkpoint=row.checkpoint.as_posix(),
            checkpoint_fingerprint=self.job.fingerprints[row],
            weights="raw" if row.raw else self.job.configs[row.checkpoint].weights,
            sampler=row.sampler,
            grid=row.grid,
            num_steps=row.num_steps,
            evaluations=sum(int(each["evaluations"]) for each in stats) / n,
            n=n,
            seed=self.plan.seed,
            seconds=sum(float(each["seconds"]) for each in stats) + time.monotonic() - began,
            ms_per_image=1000 * sum(float(each["drawing"]) for each in stats) / n,
            metrics=metrics,
            guidance=self.plan.guidance,
        )
        write_text(self.work.file(_row_file(number)), json.dumps(plain(asdict(found))) + "\n")

    def time_again(self, rows: Sequence[RowSpec], measured: Sequence[EvalRow]) -> list[EvalRow]:
        """The rows; impossible times are measured again on one batch, and marked if they stay impossible."""
        found = list(measured)
        networks = [json.dumps(self.job.configs[row.checkpoint].unet, sort_keys=True) for row in rows]

        def doubtful() -> list[int]:
            each = zip(networks, found, strict=True)
            return impossible_times([((name, row.sampler), row.evaluations, row.ms_per_image) for name, row in each])

        with self.work.processes.together():
            for k in doubtful() if self.work.processes.is_main else []:
                generator, batch = self._generator(rows[k]), range(min(self.plan.batch_size, self.plan.n))
                with self.work.reporter.progress("timing again", 2 * len(batch), "images") as bar:
                    generator.draw(batch, bar, 0)  # to warm up
                    began = time.monotonic()
                    generator.draw(batch, bar, len(batch))
                    again = 1000 * (time.monotonic() - began) / len(batch)
                found[k] = replace(found[k], ms_per_image=min(found[k].ms_per_image, again))
        marked = doubtful()
        return [replace(row, is_time_doubtful=k in marked) for k, row in enumerate(found)]


def _read_row(work: WorkFolder, number: int) -> EvalRow:
    path = work.file(_row_file(number))
    try:
        return row_from(parse(read_text(path)))
    except (OSError, ValueError, VdiffError):
        raise VdiffError(f"{path} cannot be read", f"remove {work.path}, then give the command again") from None


def _row_file(number: int) -> str:
    """The metrics of a row."""
    return f"row-{number:03d}.json"


def _thumbs_file(number: int) -> str:
    """The thumbnails of a row's first samples."""
    return f"row-{number:03d}-small.npz"


def _teacher_file(piece: int) -> str:
    """The teacher's images of a piece."""
    return f"teacher-{piece:04d}.npz"
