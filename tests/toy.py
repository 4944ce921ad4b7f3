"""Runs of a fraction of a second: a few images of a few pixels, a network of a few channels, a reporter that acts."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.oracles import randn
from vdiff.data.store import DatasetMeta, StoreWriter
from vdiff.models.checkpoint import (
    WEIGHTS,
    CheckpointConfig,
    read_config,
    read_metadata,
    read_tensors,
    save_checkpoint,
)
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet_config import UNetConfig
from vdiff.training.base import describe
from vdiff.training.base_training import train
from vdiff.training.config import DistillConfig, TrainConfig, resolve
from vdiff.training.dataset import TrainingData, open_images
from vdiff.training.engine import build_engine
from vdiff.training.ladder import run_stages
from vdiff.training.loop import Run, fit
from vdiff.training.objectives import DenoisingObjective
from vdiff.training.stages import Stage, plan_stages
from vdiff.training.state import state_path

SIZE, COUNT = 4, 10
UNET: dict[str, Any] = {
    "channels": 4,
    "embedding_channels": 8,
    "multipliers": [1],
    "num_blocks": 1,
    "attention_strides": [],
}


class Watcher:
    """A reporter that keeps every line and every update, and acts where it is told to.

    Args:
        act: called with (description, completed) at each update of a bar.
    """

    def __init__(self, act: Callable[[str, int], object] = lambda *_: None) -> None:
        self.act = act
        self.lines: list[str] = []
        self.seen: list[tuple[str, int]] = []
        self.bars: list[tuple[str, int, int]] = []

    def line(self, text: str) -> None:
        self.lines.append(text)

    @contextmanager
    def progress(self, description: str, total: int, unit: str, *, start: int = 0) -> Iterator[Bar]:
        assert unit
        self.bars.append((description, total, start))
        yield Bar(self, description)


class Bar:
    """A bar of a `Watcher`."""

    def __init__(self, watcher: Watcher, description: str) -> None:
        self.watcher, self.description = watcher, description

    def update(self, completed: int, note: str = "") -> None:
        assert isinstance(note, str)
        self.watcher.seen.append((self.description, completed))
        self.watcher.act(self.description, completed)


def signal_at(update: int, number: signal.Signals = signal.SIGINT, *, bar: str | None = None) -> Watcher:
    """A reporter that sends this process a signal at one update (of one bar)."""

    def act(description: str, completed: int) -> None:
        if completed == update and bar in (None, description):
            os.kill(os.getpid(), number)

    return Watcher(act)


def write_dataset(
    folder: Path, *, count: int = COUNT, channels: int = 1, classes: Sequence[str] = (), size: int = SIZE
) -> Path:
    """A dataset of random pictures of 4 × 4 pixels, or of another size."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(count)
    writer = StoreWriter(folder, DatasetMeta("toy", (size,), channels, class_names=tuple(classes)))
    for k in range(count):
        pixels = generator.integers(0, 256, (size, size, channels), dtype=np.uint8)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels.squeeze()).save(buffer, format="PNG")
        writer.add({size: buffer.getvalue()}, k % len(classes) if classes else None)
    writer.finish({"images": count})
    return folder


def train_config(data: Path, **changes: Any) -> TrainConfig:
    """Six updates with everything switched on that has a state or draws numbers."""
    values: dict[str, Any] = {
        "data": str(data),
        "preset": "toy",
        "image_size": SIZE,
        "class_conditional": False,
        "num_iters": 6,
        "batch_size": 4,
        "lr": 1e-2,
        "warmup_iters": 2,
        "weight_decay": 1e-3,
        "ema": 0.9,
        "dropout": 0.2,
        "flip": True,
        "num_timesteps": 8,
        "device": "cpu",
        "num_workers": 0,
        "unet": UNET,
    }
    return TrainConfig(**values | changes)


def distill_config(data: Path, base: Path, **changes: Any) -> DistillConfig:
    """Four updates a stage."""
    values: dict[str, Any] = {
        "data": str(data),
        "base": base.as_posix(),
        "preset": "toy",
        "num_iters": 4,
        "batch_size": 4,
        "lr": 5e-3,
        "device": "cpu",
        "num_workers": 0,
    }
    return resolve(
        DistillConfig, {"a test": {key: value for key, value in (values | changes).items() if value is not None}}
    )


def run_training(
    config: TrainConfig, folder: Path, *, reporter: Watcher | None = None, resume: bool = False, overwrite: bool = False
) -> CheckpointConfig:
    """`train` with the images that the configuration names."""
    images = open_images(config.data, config.image_size)
    return train(config, images, folder=folder, resume=resume, overwrite=overwrite, reporter=reporter or Watcher())


def run_of(config: TrainConfig, folder: Path, **changes: Any) -> Run:
    """The run that `train` would make, to be changed and handed to `fit`."""
    images = open_images(config.data, config.image_size)
    torch.manual_seed(config.seed)
    denoiser = describe(config, images).build()
    run = Run(
        denoiser=denoiser,
        objective=DenoisingObjective(denoiser.schedule),
        batches=images.batches(config, build_engine(config)),
        config=config,
        description=describe(config, images),
        folder=folder,
    )
    return replace(run, **changes)


def fit_run(run: Run, reporter: Watcher | None = None) -> Denoiser:
    """`fit` on the CPU."""
    return fit(run, build_engine(run.config), reporter or Watcher())


def run_ladder(
    config: DistillConfig,
    teacher: CheckpointConfig,
    *,
    out: Path | None = None,
    reporter: Watcher | None = None,
    overwrite: bool = False,
) -> list[Stage]:
    """`plan_stages`, then `run_stages`."""
    stages = plan_stages(config, teacher, out)
    images: TrainingData = open_images(config.data, teacher.image_size)
    run_stages(stages, config, images, build_engine(config), overwrite=overwrite, reporter=reporter or Watcher())
    return stages


def write_checkpoint(folder: Path, *, seed: int = 0, channels: int = 1, classes: int = 0, **changes: Any) -> Denoiser:
    """A checkpoint with random weights everywhere; returns its denoiser."""
    prediction = changes.get("prediction", "v")
    unet = UNetConfig.from_dict(
        {
            **UNET,
            "in_channels": channels,
            "out_channels": channels * (2 if prediction == "both" else 1),
            "num_classes": classes,
        }
    )
    values: dict[str, Any] = {
        "unet": unet.to_dict(),
        "schedule": {"name": "cosine"},
        "prediction": prediction,
        "num_timesteps": 8,
        "image_size": SIZE,
        "method": "base",
        "weights": "raw",
        "num_iters": 1,
        "target_iters": 1,
        "num_images": 4,
        "dataset": "toy",
        "dataset_fingerprint": "abc",
        "class_names": [str(k) for k in range(classes)],
    }
    described = CheckpointConfig(**values | changes)
    denoiser = described.build().eval()
    for i, parameter in enumerate(denoiser.parameters()):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=seed + i))
    save_checkpoint(folder, denoiser.state_dict(), described)
    return denoiser


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder` and what it holds."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def assert_equal_bits(first: Path, second: Path) -> None:
    """Two safetensors files with the same names and the same bits, none of them NaN."""
    a, b = read_tensors(first), read_tensors(second)
    assert_equal_tensors(a, b)


def assert_equal_tensors(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> None:
    """The same names and the same bits, none of them NaN."""
    assert a.keys() == b.keys()
    differing = [name for name in a if not torch.equal(a[name], b[name])]
    assert not differing, f"{len(differing)} of {len(a)} tensors differ: {differing[0]}"


def assert_same_run(first: Path, second: Path) -> None:
    """Weights and state (raw weights, their average, Adam's moments) bit for bit, and descriptions but for the time."""
    assert_equal_bits(first / WEIGHTS, second / WEIGHTS)
    assert state_path(first).exists() == state_path(second).exists()
    if state_path(first).exists():
        assert_equal_bits(state_path(first), state_path(second))
        assert read_metadata(state_path(first))["step"] == read_metadata(state_path(second))["step"]
    a, b = (replace(read_config(folder), train_seconds=0.0) for folder in (first, second))
    assert a == b


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: name → update → value; an update that is told twice fails."""
    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    shown: dict[str, dict[int, float]] = {}
    for name in events.Tags()["scalars"]:
        steps = [event.step for event in events.Scalars(name)]
        assert len(set(steps)) == len(steps), f"{name} is told twice"
        shown[name] = {event.step: event.value for event in events.Scalars(name)}
    return shown


def logged_pictures(folder: Path) -> dict[str, list[int]]:
    """The pictures that TensorBoard shows: name → updates."""
    events = EventAccumulator(str(folder / "log"))
    events.Reload()
    return {name: [event.step for event in events.Images(name)] for name in events.Tags()["images"]}
