"""Sampling of those images 0 … n − 1 that an output lacks, in batches, by all processes.

Batch j always holds the images j·B … j·B + B − 1, no matter which exist already and which process computes it. So every
image results from the same arithmetic after any interruption.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from vdiff.data.conditions import ConditionFiles
from vdiff.data.images import MAX_GRID, grid_picture, num_shown, prompt_picture, save_png
from vdiff.diffusion.samplers import SAMPLERS
from vdiff.distributed import Processes, memory_errors_named
from vdiff.errors import VdiffError, stop_explained
from vdiff.models.checkpoint import CheckpointConfig, load_checkpoint
from vdiff.models.codec import from_uint8
from vdiff.models.condition import CLASSES, IMAGE, Condition
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import EVERYWHERE, draw_from
from vdiff.models.prompting import Prompting, has_surroundings
from vdiff.models.speed import FastNetwork, ready_to_draw
from vdiff.reporting import Progress, Reporter
from vdiff.sampling.outputs import ANIMATION, GRID, STRIP, Output
from vdiff.sampling.pictures import TrajectoryRecorder, path_picture, spread
from vdiff.sampling.spec import SampleSpec
from vdiff.text import plural

PATH = (STRIP, ANIMATION)
MAX_ENCODERS = 8


@dataclass(frozen=True)
class RunOptions:
    """Options of sampling that do not affect the images.

    Attributes:
        num: number of images.
        batch_size: images in a batch of each process.
        precision: as given; the specification holds the resolved one.
        compiled: whether to compile the network.
        overwrite: whether to replace the output of an earlier call.
        trajectory: whether to save the trajectory of the first images too.
        components, vae: folders to use instead of those that a text-to-image model names.
        conditions: the condition images, one for each image.
    """

    num: int
    batch_size: int
    precision: str = "auto"
    compiled: bool = False
    overwrite: bool = False
    trajectory: bool = False
    components: Path | None = None
    vae: Path | None = None
    conditions: ConditionFiles | None = None


@dataclass(frozen=True)
class SampleReport:
    """The report of a call.

    Attributes:
        num, drawn: number of images in the output, and of images that this call drew, in all processes.
        evaluations: counted network evaluations per image; None if no image was drawn.
        seconds: from loading the model to the last picture.
        picture, trajectory: the paths of the grid, and of the strip and the animation.
    """

    out: Path
    num: int
    drawn: int
    evaluations: float | None
    seconds: float
    picture: Path
    trajectory: tuple[Path, ...] = ()

    @property
    def images_per_second(self) -> float | None:
        """The speed of this call; None if it drew no images."""
        return self.drawn / self.seconds if self.drawn else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as for JSON."""
        paths = {"out": str(self.out), "picture": str(self.picture), "trajectory": [str(p) for p in self.trajectory]}
        return {**asdict(self), **paths, "images_per_second": self.images_per_second}


def draw_images(
    spec: SampleSpec, output: Output, options: RunOptions, *, processes: Processes, reporter: Reporter
) -> SampleReport:
    """Draw the images 0 … num − 1 that `output` lacks, then its pictures, and finish it.

    Raises:
        Interrupted: by a signal; the images so far are kept.
        VdiffError: the output holds something else, the model cannot be read, or an image is not finite.
    """
    with ExitStack() as lock:
        with processes.together():
            lock.enter_context(output.locked(mine=processes.is_main))
        began = time.monotonic()
        with processes.together():
            state = output.check(spec, options.num, overwrite=options.overwrite)
            output.check_pictures()
            has_path = state != "anew" and all(output.picture_in_work(name).exists() for name in PATH)
        wants_path = options.trajectory and not has_path
        shown = tuple(output.picture(name) for name in PATH) if options.trajectory else ()
        report = SampleReport(output.path, options.num, 0, None, 0.0, output.picture(GRID), shown)
        if state == "finished" and not wants_path:
            if processes.is_main:
                output.begin(spec, state)
            return report
        with processes.together():  # before anything is replaced, as it may be damaged
            components, vae = options.components, options.vae
            denoiser, config = load_checkpoint(Path(spec.checkpoint), processes.device, components=components)
            read = partial(Prompting.read, config, processes.device, components=components, vae=vae)
            prompting = read() if has_surroundings(config) else None
            denoiser = ready_to_draw(denoiser, precision=options.precision, compiled=options.compiled)
        with processes.together():
            if processes.is_main:
                output.begin(spec, state)
        with processes.together():
            held = np.ones(options.num, bool) if state == "finished" else output.held(options.num)
        job = _Job(spec, output, options, processes, denoiser, config, prompting)

        def explain(_: str) -> str:
            held = int(output.held(options.num).sum())
            return (
                f"stopped: {output.place} holds {held} of {options.num} {output.kind.noun}s; the same command continues"
            )

        with stop_explained(explain):
            with processes.together():
                job.draw(held, wants_path=wants_path and processes.is_main, reporter=reporter)
            if processes.is_main and state != "finished":
                job.finish()
        seconds = max(time.monotonic() - began, 1e-9)
        return replace(report, drawn=int((~held).sum()), evaluations=job.evaluations, seconds=seconds)


@dataclass
class _Job:
    """The work of one process."""

    spec: SampleSpec
    output: Output
    options: RunOptions
    processes: Processes
    denoiser: Denoiser
    config: CheckpointConfig
    prompting: Prompting | None = None
    asked: int = 0

    @property
    def network(self) -> FastNetwork:
        """The network, with a counter of its evaluations."""
        network = self.denoiser.network
        assert isinstance(network, FastNetwork)
        return network

    @property
    def evaluations(self) -> float | None:
        """Network evaluations per image."""
        return self.network.evaluations / self.asked if self.asked else None

    def draw(self, held: np.ndarray, *, wants_path: bool, reporter: Reporter) -> None:
        """This process's share of the batches with images that are not `held`, each encoded while the next is drawn."""
        size, num = self.options.batch_size, self.options.num
        batches = [range(first, min(first + size, num)) for first in range(0, num, size)]
        mine = list(self.processes.share([batch for batch in batches if not held[batch.start : batch.stop].all()]))
        if wants_path and batches[0] not in mine:
            mine.insert(0, batches[0])
        total = num if self.processes.world_size == 1 else sum(map(len, mine))
        done = total - sum(int((~held[batch.start : batch.stop]).sum()) for batch in mine)
        with (
            reporter.progress(self.output.path.name, total, f"{self.config.space.noun}s", start=done) as bar,
            AsyncWriter(self.output) as writer,
        ):
            for batch in mine:
                recorder = self._recorder() if wants_path and batch == batches[0] else None
                images = self._draw_batch(batch, bar, done, recorder)
                if recorder is not None:
                    strip, animation = (self.output.picture_in_work(name) for name in PATH)
                    recorder.save(
                        self.config.space.pictures(images),
                        strip,
                        animation,
                        self._class_names(batch) or self.spec.texts(batch),
                    )
                new = [(k, image) for k, image in zip(batch, images, strict=True) if not held[k]]
                writer.write(new)
                done += len(new)
                bar.update(done)

    def _recorder(self) -> TrajectoryRecorder:
        decode = partial(self.prompting.decode, check=False) if self.prompting else self.config.space.pictures
        return TrajectoryRecorder(self.spec.num_steps, decode)

    def _condition(self, indices: Sequence[int]) -> Condition:
        if self.prompting is None or not self.spec.prompts:
            return self.denoiser.condition(
                **{CLASSES: self.spec.labels(indices), IMAGE: self._condition_images(indices)}
            )
        takes = self.denoiser.network.signature.names
        return self.prompting.condition(takes, self.spec.texts(indices), self.spec.negative_prompt)

    def _condition_images(self, indices: Sequence[int]) -> Tensor | None:
        """The condition images of images `indices`, (B, C, H, W) in [−1, 1]; None: the model takes none."""
        conditions = self.options.conditions
        return None if conditions is None else from_uint8(torch.from_numpy(conditions.pixels(indices)))

    def _draw_batch(self, batch: range, bar: Progress, done: int, recorder: TrajectoryRecorder | None) -> Tensor:
        # a network is compiled for one shape: the last batch is padded, unless it is the only one
        is_filled = self.network.is_compiled and self.options.num > self.options.batch_size
        full = self.options.batch_size if is_filled else len(batch)
        indices = [*batch, *[batch[-1]] * (full - len(batch))]
        shape = self.config.shape
        interval = self.spec.guidance_interval
        with memory_errors_named():
            images = draw_from(
                self.denoiser,
                SAMPLERS[self.spec.sampler](**self.spec.options),
                noise=self.spec.noise(indices, shape, self.processes.device),
                condition=self._condition(indices),
                num_steps=self.spec.num_steps,
                guidance=self.spec.guidance,
                guidance_interval=(interval[0], interval[1]) if interval else EVERYWHERE,
                grid=self.spec.grid,
                on_step=lambda step: bar.update(done, f"step {step}/{self.spec.num_steps}"),
                on_state=recorder,
            )
            images = images[: len(batch)]
            images = self.prompting.decode(images) if self.prompting else images
        self.asked += full
        return images

    def finish(self) -> None:
        """Save the grid, then move the output to its place, after checking once more that no image is missing."""
        missing = int((~self.output.held(self.options.num)).sum())
        if missing:
            raise VdiffError(
                f"{missing} of {self.options.num} {self.config.space.noun}s are missing in {self.output.place}",
                "run the same command again",
            )
        save_png(self._grid(), self.output.picture_in_work(GRID))
        self.output.finish(self.spec, self.options.num)

    def _grid(self) -> PIL.Image.Image:
        """The grid of the first images, or of images along the whole path."""
        num, path, of_classes = self.options.num, self.spec.path, len(self.spec.classes)
        shown = spread(num, MAX_GRID) if path else range(num_shown(num, of_classes))
        images = self.config.space.pictures(torch.stack(list(self.output.read(shown))))
        if (given := self._condition_images(shown)) is not None:  # on the left of their images
            images = torch.cat([given, images], dim=-1)
        spec = self.spec
        facts = [Path(spec.checkpoint).name, spec.sampler, plural(spec.num_steps, "step"), f"seed {spec.seed}"]
        title = " · ".join([*facts, *([f"guidance {spec.guidance:g}"] if spec.guidance else [])])
        if spec.prompts and not path:
            return prompt_picture(images, spec.prompts, title)
        if not path:
            return grid_picture(images, self._class_names(shown), of_classes, title=title)
        ends = [f"{self.config.space.noun} {end}" for end in path[:2]]
        if names := self._class_names([0, num - 1]) or spec.texts([0, num - 1]):
            ends = [f"{end} ({name})" for end, name in zip(ends, names, strict=True)]
        return path_picture(images, f"From {ends[0]} to {ends[1]}\n{title}")

    def _class_names(self, indices: Sequence[int]) -> list[str]:
        """The class names of images `indices`; none for an unconditional model."""
        labels = self.spec.labels(indices)
        return [] if labels is None else [self.config.class_names[label] for label in labels]


class AsyncWriter:
    """Writes images while others are drawn; on exit, even after an error, all images passed to it are written."""

    def __init__(self, output: Output) -> None:
        self.output = output
        self.encoders = ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_ENCODERS))
        self.committer = ThreadPoolExecutor(1)
        self.last: Future[None] | None = None

    def __enter__(self) -> AsyncWriter:
        return self

    def __exit__(self, *_: object) -> None:
        with self.encoders, self.committer:
            self._wait()

    def write(self, images: Sequence[tuple[int, Tensor]]) -> None:
        """Accept images when those of the previous call are written: at most two batches are in memory."""
        self._wait()
        encoded = [(k, self.encoders.submit(self.output.encode, k, image)) for k, image in images]
        self.last = self.committer.submit(
            lambda: self.output.commit([(k, future.result()) for k, future in encoded]) if encoded else None
        )

    def _wait(self) -> None:
        if self.last is not None:
            self.last.result()
