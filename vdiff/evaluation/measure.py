"""An evaluation: samples of checkpoints measured against a dataset, streamed, in pieces that survive a kill."""

from __future__ import annotations

import datetime
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vdiff.data.images import PICTURE
from vdiff.distributed import Processes, pick_device
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.evaluation.drawn import STATE
from vdiff.evaluation.features import PIXELS, Features, load_features
from vdiff.evaluation.memorisation import save_pairs, with_nearest
from vdiff.evaluation.notes import notes_for
from vdiff.evaluation.pieces import WorkFolder, key_of
from vdiff.evaluation.plan import (
    Request,
    check_guidance,
    check_kind,
    check_numbers,
    chosen_metrics,
    requests_for,
    shared_kind,
)
from vdiff.evaluation.reference import Images, cache_folder, statistics
from vdiff.evaluation.results import EVALUATION, Evaluation
from vdiff.evaluation.rows import RowMaker, Style, finished_rows
from vdiff.models.checkpoint import CheckpointConfig, read_config, weights_fingerprint
from vdiff.models.speed import pick_precision
from vdiff.replacing import check_free, check_ours, discard, is_free, locked
from vdiff.reporting import DOUBTFUL_TIMES, Reporter, Silent

FORMAT = 2
WORK = ".work"


@dataclass(frozen=True)
class Order:
    """What is to be measured of each request, and how.

    Attributes:
        n, seed: samples 0 … n − 1 of the seed.
        metrics: names from `plan.METRICS`; empty: all that there can be.
        teacher, teacher_steps: whose images of the same noise samples are compared with, None: nobody's; drawn by ddim
            in so many steps, None: its own.
        guidance: the weight w of classifier-free guidance.
        batch_size: drawn at once by each process.
        precision: what networks compute in.
    """

    n: int = 2000
    seed: int = 0
    metrics: tuple[str, ...] = ()
    teacher: Path | None = None
    teacher_steps: int | None = None
    guidance: float = 0.0
    batch_size: int = 64
    precision: str = "auto"


def evaluate(
    checkpoints: Sequence[Path],
    dataset: Path | str,
    *,
    num_timesteps: Sequence[int] = (),
    samplers: Sequence[str] = ("ddim",),
    grid: str = "uniform",
    raw: bool = False,
    n: int = 2000,
    seed: int = 0,
    features: str = PIXELS,
    metrics: Sequence[str] = (),
    teacher: Path | None = None,
    teacher_steps: int | None = None,
    guidance: float = 0.0,
    weights: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    batch_size: int = 64,
    out: Path | None = None,
    overwrite: bool = False,
    cache: Path | None = None,
    processes: Processes | None = None,
    reporter: Reporter | None = None,
    command: str = "",
) -> Evaluation:
    """Measure every checkpoint, in every number of steps (none given: its own), with every sampler.

    Raises:
        VdiffError, Interrupted: see `measure`.
    """
    reporter = reporter or Silent()
    requests, left_out = requests_for(checkpoints, num_timesteps=num_timesteps, samplers=samplers, grid=grid, raw=raw)
    for line in left_out:
        reporter.line(line)
    return measure(
        requests,
        dataset,
        Order(n, seed, tuple(metrics), teacher, teacher_steps, guidance, batch_size, precision),
        features=features,
        weights=weights,
        out=out,
        overwrite=overwrite,
        cache=cache,
        processes=processes or Processes(pick_device(device)),
        reporter=reporter,
        command=command,
    )


def measure(
    requests: Sequence[Request],
    dataset: Path | str,
    order: Order,
    *,
    processes: Processes,
    features: str = PIXELS,
    weights: Path | None = None,
    out: Path | None = None,
    overwrite: bool = False,
    cache: Path | None = None,
    reporter: Reporter | None = None,
    command: str = "",
) -> Evaluation:
    """A row for each request, all from the same noise, against one dataset; written to `out` if that is given.

    The same call goes on where it was stopped, from the folder `.OUT.work` beside the file; where `out` holds this very
    evaluation already, that is the answer. Every process that a launcher started calls this and gets the same.

    Raises:
        Interrupted: a signal came; what was drawn is kept.
        VdiffError: something that was asked for cannot be; `out` exists and is something else.
    """
    reporter = reporter or Silent()
    if not requests:
        raise ValueError("no requests")
    if out is None and processes.world_size > 1:
        raise OptionError("several processes need a file that all of them see", "give --out FILE")
    with _place(out) as place, ExitStack() as lock, _said_when_stopped(out):
        with processes.together():
            job = _prepare(requests, dataset, order, features, weights, processes)
            pairs = out.with_name(f"{out.stem}-nearest.png") if out is not None and "nearest" in job.metrics else None
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
        work = WorkFolder(place, job.key, processes)
        known = statistics(
            job.images,
            job.features,
            cache=cache or cache_folder(),
            spare=work.path,
            processes=processes,
            reporter=reporter,
        )
        style = Style(order.n, order.seed, job.metrics, order.guidance, order.batch_size, job.precision)
        maker = RowMaker(known, job.features, style, work, processes, reporter)
        if job.teacher is not None:
            maker.draw_teacher(job.teacher)
        for number, request in enumerate(requests):
            maker.make(number, request, job.configs[request.checkpoint], job.fingerprints[request])
        networks = [json.dumps(job.configs[request.checkpoint].unet, sort_keys=True) for request in requests]
        rows = maker.time_again(finished_rows(work, len(requests)), requests, networks)
        if "nearest" in job.metrics:
            rows = with_nearest(rows, job.images, work, processes, reporter)
        evaluation = Evaluation(
            features=job.features.name,
            device=_device_name(processes),
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=command,
            reference=job.images.describe(),
            rows=tuple(rows),
            pairs=pairs.name if pairs else None,
            teacher=order.teacher.as_posix() if order.teacher else "",
            teacher_steps=job.teacher.num_steps if job.teacher else None,
            notes=(
                *notes_for(job.images, job.configs, job.features, order.n, job.metrics),
                *([DOUBTFUL_TIMES] if any(row.is_time_doubtful for row in rows) else []),
            ),
            job=job.key,
        )
        with processes.together():
            if processes.is_main:
                if pairs is not None:
                    save_pairs(rows, job.images, work, pairs)
                if out is not None:
                    evaluation.write(out)
                work.remove()
    return evaluation


@dataclass(frozen=True)
class _Job:
    """All that decides the figures, looked at before anything is drawn."""

    key: str
    images: Images
    features: Features
    metrics: tuple[str, ...]
    precision: str
    configs: dict[Path, CheckpointConfig]
    fingerprints: dict[Request, str]
    teacher: Request | None


def _prepare(
    requests: Sequence[Request],
    dataset: Path | str,
    order: Order,
    features: str,
    weights: Path | None,
    processes: Processes,
) -> _Job:
    folders = dict.fromkeys(request.checkpoint for request in requests)
    if order.teacher is not None:
        folders[order.teacher] = None
    configs = {folder: read_config(folder) for folder in folders}
    size, channels = shared_kind(configs)
    for folder, config in configs.items():
        check_guidance(folder, config, order.guidance)
    images = Images(dataset, size)
    check_kind((size, channels), (images.image_size, images.channels), images.store.path)
    extractor = load_features(features, image_size=size, channels=channels, device=processes.device, weights=weights)
    metrics = chosen_metrics(order.metrics, extractor, order.teacher is not None)
    check_numbers(order.n, len(images), extractor, metrics, images.store.path)
    teacher = None
    if order.teacher is not None:
        steps = order.teacher_steps or configs[order.teacher].num_timesteps
        (teacher,), _ = requests_for([order.teacher], num_timesteps=[steps])
    fingerprints = {request: _weights_of(request) for request in [*requests, *([teacher] if teacher else [])]}
    precision = pick_precision(order.precision, processes.device)
    asked = [[fingerprints[each], each.sampler, each.num_steps, each.grid] for each in requests]
    theirs = [fingerprints[teacher], teacher.num_steps] if teacher else []
    key = key_of(
        [
            *(FORMAT, images.identity, extractor.fingerprint, extractor.dim, asked, theirs),
            *(order.n, order.seed, metrics, order.guidance, precision),
        ]
    )
    return _Job(key, images, extractor, metrics, precision, configs, fingerprints, teacher)


def _weights_of(request: Request) -> str:
    """The SHA-256 of the weights that a request draws with."""
    if not request.raw or read_config(request.checkpoint).weights == "raw":
        return weights_fingerprint(request.checkpoint)
    import hashlib

    path = request.checkpoint / STATE
    if not path.exists():
        raise VdiffError(f"{request.checkpoint} keeps no raw weights: there is no {STATE}", "leave --raw out")
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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
def _place(out: Path | None) -> Iterator[Path]:
    """Where pieces are kept until the end."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="vdiff-") as folder:
            yield Path(folder) / "work"
        return
    yield out.with_name(f".{out.name}{WORK}")


@contextmanager
def _said_when_stopped(out: Path | None) -> Iterator[None]:
    """Say what a signal leaves."""
    try:
        yield
    except (KeyboardInterrupt, Interrupted) as stop:
        code = stop.exit_code if isinstance(stop, Interrupted) else 130
        kept = "nothing is kept" if out is None else "what was drawn is kept; the same command goes on"
        raise Interrupted(f"stopped: {kept}", code) from None


def _device_name(processes: Processes) -> str:
    device = processes.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return name if processes.world_size == 1 else f"{processes.world_size} × {name}"
