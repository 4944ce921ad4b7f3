"""An evaluation: samples of checkpoints measured against a dataset, in pieces that survive a kill."""

from __future__ import annotations

import datetime
import json
import math
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.data.images import PICTURE
from vdiff.distributed import Processes, pick_device
from vdiff.errors import OptionError, VdiffError, stop_explained
from vdiff.evaluation import metrics as m
from vdiff.evaluation.clip import ClipScore
from vdiff.evaluation.features import INCEPTION, PIXELS, Features, ScaledFeatures, load_features
from vdiff.evaluation.nearest import MAX_QUERIES, NearestSearch, add_nearest, save_pairs
from vdiff.evaluation.plan import (
    EXTRAPOLATED_FROM,
    MAX_PAIRED,
    EvalPlan,
    RowSpec,
    check_plan,
    common_shape,
    notes_for,
    plan_rows,
    takes_prompts,
    why_not,
)
from vdiff.evaluation.reference import (
    MAX_KEPT,
    MOMENTS,
    DataStats,
    ReferenceImages,
    data_stats,
    random_subset,
    scale_of,
)
from vdiff.evaluation.results import (
    EVALUATION,
    QUALITY,
    EvalRow,
    Evaluation,
    Metric,
    Quality,
    Scale,
    plain,
    read_quality,
    with_infinity,
)
from vdiff.evaluation.samples import CLASS_STATS, PIECE_IMAGES, Generator, SampleBlocks, sample_stats, weights_file
from vdiff.evaluation.work import WorkFolder, key_of, write_arrays
from vdiff.files import parse, read_text, write_text
from vdiff.models.autoencoder import vae_weights
from vdiff.models.checkpoint import read_config, weights_fingerprint
from vdiff.models.checks import default_guidance
from vdiff.models.codec import LATENTS
from vdiff.models.components import check_components
from vdiff.models.prompting import has_surroundings
from vdiff.models.reading import file_fingerprint
from vdiff.models.speed import impossible_times, pick_precision
from vdiff.models.tokenizing import Tokenizers
from vdiff.records import record_of
from vdiff.replacing import check_free, check_ours, discard, is_free, locked
from vdiff.reporting import DOUBTFUL_TIMES, Progress, Reporter, Silent

FORMAT = 2
QUALITY_IMAGES, QUALITY_STEPS, QUALITY_DATA = 500, 32, 10_000
"""At most this many samples, steps and images of the data for a model's quality."""
RANGE = 2.0
"""From black to white."""
ROW, THUMBS, TEACHER, PROMPTS = "row-{:03d}.json", "row-{:03d}-small.npz", "teacher-{:04d}.npz", "prompts.json"
"""Files of the work folder: a row's metrics, the thumbnails of its first samples, the teacher's images of a piece."""


def evaluate(
    checkpoints: Sequence[Path | RowSpec],
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
    """Measure every checkpoint against a dataset, with each number of steps (default: its own) and each sampler.

    The same call continues after an interruption, from the folder `.OUT.work` beside the file. If `out` already holds
    this evaluation, it is returned. Every process of a launcher calls this and gets the same results.

    Args:
        checkpoints: folders, or rows to draw.
        plan: the attributes of `EvalPlan`, such as `n=10_000`.
        out: the file for the results; None: only return them.

    Raises:
        Interrupted: by a signal; the samples so far are kept.
        VdiffError: the plan is impossible, or `out` exists and is something else.
    """
    reporter, processes = reporter or Silent(), processes or Processes(pick_device(device))
    folders = [each for each in checkpoints if not isinstance(each, RowSpec)]
    rows, left_out = plan_rows(folders, num_timesteps=num_timesteps, samplers=samplers, grid=grid, raw=raw)
    rows += [each for each in checkpoints if isinstance(each, RowSpec)]
    if not rows:
        raise ValueError("no rows")
    for line in left_out:
        reporter.line(line)
    if out is None and processes.world_size > 1:
        raise OptionError("several processes need a shared output file", "give --out FILE")
    kept = "nothing is kept" if out is None else "the samples so far are kept; the same command continues"
    with ExitStack() as stack, stop_explained(lambda _: f"stopped: {kept}"):
        scratch = "" if out else stack.enter_context(tempfile.TemporaryDirectory(prefix="vdiff-"))
        place = out.with_name(f".{out.name}.work") if out else Path(scratch, "work")
        with processes.together():
            run = _Run(rows, dataset, EvalPlan(**plan), processes.device)
            pairs = out.with_name(f"{out.stem}-nearest.png") if out and run.compares_pictures else None
            if out is not None:
                stack.enter_context(locked(out, place, *([pairs] if pairs else []), mine=processes.is_main))
                if pairs is not None and not place.exists() and not EVALUATION.files(out):
                    check_free(pairs, PICTURE, overwrite=True)
        with processes.together():
            finished = _finished(out, run.key, overwrite)
            if finished is not None and processes.is_main:
                discard(place)
        if finished is not None:
            return finished
        work = WorkFolder(place, run.key, processes, reporter, run.images.store.meta.noun)
        found, thumbs = run.measure(data_stats(run.images, run.features, cache, work), work)
        results = run.results(found, processes, pairs, command)
        with processes.together():
            if processes.is_main:
                if pairs is not None:
                    save_pairs(found, thumbs, run.images, pairs)
                if out is not None:
                    results.write(out)
        work.remove()
    return results


def measure_quality(
    folder: Path, dataset: Path | str, budget: int, *, processes: Processes, reporter: Reporter
) -> Quality | None:
    """The quality of a model, from few samples in few steps; cached in its folder until its weights change.

    A text-to-image model uses captions of the data as prompts.

    Args:
        budget: how many network evaluations this may use.

    Returns:
        the quality; None: the budget is too small.

    Raises:
        Interrupted, VdiffError: as in `evaluate`.
    """
    config = read_config(folder)
    if found := read_quality(folder, weights_fingerprint(folder)):
        return found
    most = min(config.num_timesteps, QUALITY_STEPS)
    steps = next(steps for steps in range(most, 0, -1) if not why_not(config, "uniform", steps))
    is_guided = default_guidance(config) and not config.signature.takes_guidance
    n = min(QUALITY_IMAGES, budget // (2 * steps if is_guided else steps))
    channels, size = common_shape(EvalPlan(), {folder: config})
    if n < load_features(PIXELS, image_size=size, channels=channels, rate=config.sample_rate).dim:
        return None
    row = RowSpec(folder, "ddim" if config.is_distilled else "dpmpp_2m", steps)
    plan: dict[str, Any] = {"n": n, "metrics": ("fd", "nearest"), "most_images": QUALITY_DATA}
    evaluate([row], dataset, processes=processes, reporter=reporter, out=folder / QUALITY, overwrite=True, **plan)
    return read_quality(folder, weights_fingerprint(folder))


def _finished(out: Path | None, key: str, overwrite: bool) -> Evaluation | None:
    """The results that `out` already holds, if they are of this evaluation."""
    if out is None or is_free(out):
        return None
    check_ours(out, EVALUATION)
    if overwrite:
        return None
    found = Evaluation.read(out)
    if found.job != key:
        raise VdiffError(
            f"{out} holds another evaluation", "give another --out to keep both, or --overwrite to replace it"
        )
    return found


class _Run:
    """One evaluation: its plan, which is checked before anything is drawn, and the measurement of its rows.

    Attributes:
        plan: the plan, with "auto" resolved.
        key: the hash of everything that determines the metrics.
    """

    def __init__(self, rows: Sequence[RowSpec], dataset: Path | str, plan: EvalPlan, device: torch.device) -> None:
        self.rows = rows
        folders = [row.checkpoint for row in rows] + ([plan.teacher] if plan.teacher else [])
        self.configs = {folder: read_config(folder) for folder in dict.fromkeys(folders)}
        channels, size = common_shape(plan, self.configs)
        self.images = images = ReferenceImages(dataset, size, plan.most_images)
        self.features = features = load_features(
            plan.features,
            image_size=size,
            channels=channels,
            rate=images.store.meta.rate,
            loudness=images.store.meta.loudness,
            device=device,
            weights=plan.weights,
        )
        metrics = check_plan(plan, self.configs, images, features, channels)
        self.plan = replace(plan, metrics=metrics, precision=pick_precision(plan.precision, device))
        self.clip = ClipScore(plan.clip, device) if plan.clip and "clip" in metrics else None
        self.teacher: RowSpec | None = None
        if plan.teacher is not None:
            steps = plan.teacher_steps or self.configs[plan.teacher].num_timesteps
            (self.teacher,), _ = plan_rows([plan.teacher], num_timesteps=[steps])
        every = [*rows, *([self.teacher] if self.teacher else [])]
        self.fingerprints = {row: file_fingerprint(weights_file(row)) for row in every}
        asked = [[self.fingerprints[row], row.sampler, row.num_steps, row.grid] for row in rows]
        of_teacher = [self.fingerprints[self.teacher], self.teacher.num_steps] if self.teacher else []
        kind = [FORMAT, images.identity, features.fingerprint, features.dim]
        of_text = self._text_settings()
        guidance = 0.0 if of_text else plan.guidance or 0.0
        values = [*kind, asked, of_teacher, plan.n, plan.seed, metrics, guidance, self.plan.precision]
        self.key = key_of([*values, *([of_text] if of_text else [])])
        self.blocks = SampleBlocks(
            plan.n, features.dim, are_slow=any(config.codec == LATENTS.name for config in self.configs.values())
        )
        self.scale: Scale | None = None
        self.prompts, self.notes = "", tuple[str, ...]()
        self.captioned: list[int] = []

    @property
    def compares_pictures(self) -> bool:
        """Whether samples are compared with the nearest images of the data as pictures; sounds only by features."""
        return "nearest" in self.plan.metrics and not self.images.store.meta.rate

    def _text_settings(self) -> list[Any]:
        """What determines the samples of models of text or latents, besides their weights; empty without such."""
        plan, found = self.plan, []
        for config in filter(has_surroundings, self.configs.values()):
            components = check_components(config.components, plan.components)["fingerprint"]
            found.append([components, (config.base or {}).get("fingerprint")])
        guidances = list(map(plan.guidance_of, self.configs.values()))
        vae = file_fingerprint(vae_weights(plan.vae)) if plan.vae else None
        values = [found, guidances, vae, plan.prompts, plan.negative_prompt]
        return [*values, *([self.clip.fingerprint] if self.clip else [])] if found else []

    def _find_prompts(self, work: WorkFolder) -> None:
        """Choose the prompts in the first process, and count those that are cut."""
        config = next(filter(takes_prompts, self.configs.values()), None)
        if config is None:
            return
        own = self.plan.prompts
        if not work.has(PROMPTS):
            with work.processes.together():
                if work.processes.is_main:
                    captions = {} if own else self.images.captions(self.plan.n, self.plan.seed)
                    write_text(work.file(PROMPTS), json.dumps([list(captions.values()), list(captions)]))
        with work.processes.together():
            texts, self.captioned = parse(read_text(work.file(PROMPTS)))
            self.plan = replace(self.plan, prompts=own or tuple(texts))
        drawn = self.plan.prompts[: self.plan.n]
        kind = "prompts in turn" if own else "captions of the data, in random order"
        self.prompts = f"{len(drawn):,} {kind}"
        folder = check_components(config.components, self.plan.components)["path"]
        tokenizers = Tokenizers.read(folder, config.network_config)
        if long := sum(map(bool, map(tokenizers.cut, drawn))):
            self.notes = (
                f"{long:,} of {len(drawn):,} prompts are longer than {tokenizers.length} tokens and are cut.",
            )

    def measure(self, data: DataStats, work: WorkFolder) -> tuple[list[EvalRow], list[NDArray[np.uint8]]]:
        """The rows, and thumbnails of the first samples of each; finished parts are in the work folder."""
        calculator = MetricCalculator(data, self.features, self.plan, work.processes.device)
        if isinstance(self.features, ScaledFeatures) and "fd" in self.plan.metrics:
            self.scale = scale_of(data, self.plan.n, self.features)
        self._find_prompts(work)
        if self.teacher is not None:
            self._draw_teacher(self.teacher, work)
        for number, row in enumerate(self.rows):
            if not work.has(ROW.format(number)):
                self._measure_row(number, row, calculator, work)
        numbers = range(len(self.rows))
        found = self._time_again([_read_row(work, number) for number in numbers], work)
        if self.clip is not None and self.captioned:
            score = self._score_data(self.clip, work)
            found = [replace(row, metrics={**row.metrics, "clip_data": score}) for row in found]
        if not self.compares_pictures:
            return found, []
        thumbs = [work.read(THUMBS.format(number))["small"] for number in numbers]
        return add_nearest(found, thumbs, self.images, work), thumbs

    def _score_data(self, clip: ClipScore, work: WorkFolder) -> Metric:
        """The CLIP score of images of the data and their captions, of at most `MAX_QUERIES` captions that are drawn."""
        captions = dict(zip(self.captioned[:MAX_QUERIES], self.plan.prompts, strict=False))
        numbers = np.sort(np.array(list(captions)))
        parts = np.array_split(numbers, -(-len(numbers) // PIECE_IMAGES))

        def compute(number: int, bar: Progress, done: int) -> m.Arrays:
            scores = []
            for index, image in zip(parts[number].tolist(), self.images.some(parts[number]), strict=True):
                scores.append(clip(image[None], [captions[index]]))
                bar.update(done + len(scores))
            return {"scores": np.concatenate(scores)}

        sizes = {f"clip-{k}.npz": len(part) for k, part in enumerate(parts)}
        work.compute("CLIP score of the data", sizes, compute)
        return m.mean_metric(np.concatenate([work.read(name)["scores"] for name in sizes]))

    def _draw_teacher(self, teacher: RowSpec, work: WorkFolder) -> None:
        """Draw the images that samples are compared with."""
        samples = [self.blocks.samples(piece) for piece in self.blocks.pieces()]
        paired = [range(each.start, min(each.stop, MAX_PAIRED)) for each in samples if each.start < MAX_PAIRED]
        generator = Generator(teacher, self.plan, work.processes.device, self.images)

        def compute(piece: int, bar: Progress, done: int) -> m.Arrays:
            parts: list[Tensor] = []
            for batch in generator.batches(paired[piece]):
                parts.append(generator.draw(batch, bar, done))
                done += len(batch)
                bar.update(done)
            return {"images": torch.cat(parts).numpy()}

        sizes = {TEACHER.format(piece): len(samples) for piece, samples in enumerate(paired)}
        work.compute(f"teacher, {teacher.steps}", sizes, compute)

    def _measure_row(self, number: int, row: RowSpec, calculator: MetricCalculator, work: WorkFolder) -> None:
        """Draw the samples of a row, and compute its metrics in the first process."""
        generator, pieces = Generator(row, self.plan, work.processes.device, self.images), self.blocks.pieces()

        def compute(piece: int, bar: Progress, done: int) -> m.Arrays:
            name = TEACHER.format(piece)
            of_teacher = torch.from_numpy(work.read(name)["images"]) if work.file(name).exists() else None
            return sample_stats(generator, self.blocks, pieces[piece], self.features, of_teacher, self.clip, bar, done)

        sizes = {f"row-{number:03d}-piece-{k:04d}.npz": len(self.blocks.samples(p)) for k, p in enumerate(pieces)}
        work.compute(f"{row.checkpoint.name}, {row.sampler}, {row.steps}", sizes, compute)
        with work.processes.together():
            if not work.processes.is_main:
                return
            stats, began, n = [work.read(name) for name in sizes], time.monotonic(), self.plan.n
            metrics = calculator.calculate_metrics(stats)
            write_arrays(work.file(THUMBS.format(number)), {"small": np.concatenate([each["small"] for each in stats])})
            found = EvalRow(
                checkpoint=row.checkpoint.as_posix(),
                checkpoint_fingerprint=self.fingerprints[row],
                weights="raw" if row.raw else self.configs[row.checkpoint].weights,
                sampler=row.sampler,
                grid=row.grid,
                num_steps=row.num_steps,
                evaluations=sum(int(each["evaluations"]) for each in stats) / n,
                n=n,
                seed=self.plan.seed,
                seconds=sum(float(each["seconds"]) for each in stats) + time.monotonic() - began,
                ms_per_image=1000 * sum(float(each["drawing"]) for each in stats) / n,
                metrics=metrics,
                guidance=self.plan.guidance_of(self.configs[row.checkpoint]),
            )
            write_text(work.file(ROW.format(number)), json.dumps(plain(asdict(found))) + "\n")
            for name in sizes:
                work.file(name).unlink()

    def _time_again(self, found: list[EvalRow], work: WorkFolder) -> list[EvalRow]:
        """The rows; implausible times are measured again on one batch, and marked if they remain implausible."""
        networks = [self.configs[row.checkpoint].network_id() for row in self.rows]

        def doubtful() -> list[int]:
            each = zip(networks, found, strict=True)
            return impossible_times([((name, row.sampler), row.evaluations, row.ms_per_image) for name, row in each])

        with work.processes.together():
            for k in doubtful() if work.processes.is_main else []:
                generator = Generator(self.rows[k], self.plan, work.processes.device, self.images)
                batch = generator.batches(range(self.plan.n))[0]
                with work.reporter.progress("timing again", 2 * len(batch), f"{work.noun}s") as bar:
                    generator.draw(batch, bar, 0)  # to warm up
                    began = time.monotonic()
                    generator.draw(batch, bar, len(batch))
                    again = 1000 * (time.monotonic() - began) / len(batch)
                    bar.update(2 * len(batch))
                found[k] = replace(found[k], ms_per_image=min(found[k].ms_per_image, again))
        marked = doubtful()
        return [replace(row, is_time_doubtful=k in marked) for k, row in enumerate(found)]

    def results(self, found: Sequence[EvalRow], processes: Processes, pairs: Path | None, command: str) -> Evaluation:
        """The results: the rows, with all information that a reader needs."""
        device, plan = processes.device, self.plan
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        notes = notes_for(self.images, self.configs, self.features, plan.n, plan.metrics)
        return Evaluation(
            features=self.features.name,
            device=name if processes.world_size == 1 else f"{processes.world_size} × {name}",
            date=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
            command=command,
            reference=self.images.describe(),
            rows=tuple(found),
            pairs=pairs.name if pairs else None,
            teacher=plan.teacher.as_posix() if plan.teacher else "",
            teacher_steps=self.teacher.num_steps if self.teacher else None,
            notes=(*notes, *self.notes, *([DOUBTFUL_TIMES] if any(row.is_time_doubtful for row in found) else [])),
            job=self.key,
            scale=self.scale,
            prompts=self.prompts,
            negative_prompt=plan.negative_prompt,
        )


class MetricCalculator:
    """Computes the metrics of rows; computes what all rows share only once."""

    def __init__(self, data: DataStats, features: Features, plan: EvalPlan, device: torch.device) -> None:
        self.data, self.features, self.plan, self.device = data, features, plan, device
        self.num_pairs = min(plan.n, MAX_KEPT, len(data.kept))

    @cached_property
    def _frechet(self) -> m.FrechetDistance:
        return m.FrechetDistance(self.data.moments)

    @cached_property
    def _kernel(self) -> m.KernelDistance:
        return m.KernelDistance(self.data.kept, self.device)

    @cached_property
    def _manifold(self) -> m.Manifold:
        return m.Manifold(self.data.kept[random_subset(len(self.data.kept), self.num_pairs)], self.device)

    @cached_property
    def _nearest_data(self) -> Metric:
        own = random_subset(len(self.data.kept), MAX_QUERIES)
        return self._nearest(self.data.kept[own], own)

    def _nearest(self, vectors: NDArray[np.float32], own: NDArray[np.int64] | None = None) -> Metric:
        search = NearestSearch(vectors, own, self.device)
        search.add(0, self.data.kept)
        return m.median_metric(search.distances)

    def calculate_metrics(self, stats: Sequence[m.Arrays]) -> dict[str, Metric]:
        """The metrics of samples from their `sample_stats`, except the nearest images in pixels."""
        wanted, features = self.plan.metrics, self.features
        kept, errors = (np.concatenate([piece[name] for piece in stats]) for name in ("kept", "errors"))
        fd, kd = ("fid", "kid") if features.name == INCEPTION else ("fd", "kd")
        found: dict[str, Metric] = {}
        if "fd" in wanted:
            blocks = [block for piece in stats for block in m.from_arrays(m.Moments, piece, MOMENTS)]
            found[fd], at_infinity = self._frechet.measure(blocks)
            if self.plan.n >= EXTRAPOLATED_FROM * features.dim:
                found[f"{fd}_inf"] = at_infinity
        if "kd" in wanted:
            found[kd] = self._kernel(kept)
        if "precision" in wanted or "recall" in wanted:
            both = zip(("precision", "recall"), m.precision_recall(kept[: self.num_pairs], self._manifold), strict=True)
            found |= {name: metric for name, metric in both if name in wanted}
        if "isc" in wanted:
            classes = [block for piece in stats for block in m.from_arrays(m.ClassStats, piece, CLASS_STATS)]
            found["isc"] = m.inception_score(classes)
        if "clip" in wanted and len(scores := np.concatenate([piece["scores"] for piece in stats])):
            found["clip"] = m.mean_metric(scores)
        if len(errors):
            squared = m.mean_metric(errors)
            found |= {name: f(squared) for name, f in (("rmse", rmse), ("psnr", psnr)) if name in wanted}
        if "lsd" in wanted and len(spectral := np.concatenate([piece["spectral"] for piece in stats])):
            found["lsd"] = m.mean_metric(spectral)
        if "psnr_truth" in wanted and len(to_truth := np.concatenate([piece["truth_errors"] for piece in stats])):
            found["psnr_truth"] = psnr(m.mean_metric(to_truth))
        if "nearest" in wanted and features.name != PIXELS:
            found["nearest_features"] = self._nearest(kept[:MAX_QUERIES])
            found["nearest_data_features"] = self._nearest_data
        return found


def rmse(squared: Metric) -> Metric:
    """The square root of the mean of `vdiff.models.drawing.squared_errors`, and of its bounds."""
    low, high = (None if bound is None else math.sqrt(max(bound, 0.0)) for bound in (squared.low, squared.high))
    return Metric(math.sqrt(squared.value), low, high)


def psnr(squared: Metric) -> Metric:
    """10 log₁₀ (2² / e) of a mean squared error e, in dB; the bounds are swapped."""

    def decibels(error: float) -> float:
        return 10 * math.log10(RANGE**2 / error) if error > 0 else math.inf

    low, high = (None if bound is None else decibels(bound) for bound in (squared.high, squared.low))
    return Metric(decibels(squared.value), low, high)


def _read_row(work: WorkFolder, number: int) -> EvalRow:
    path = work.file(ROW.format(number))
    try:
        return record_of(EvalRow, with_infinity(parse(read_text(path))), "a row", "")
    except (OSError, ValueError, VdiffError):
        raise VdiffError(f"{path} cannot be read", f"remove {work.path}, then run the command again") from None
