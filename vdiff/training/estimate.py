"""Estimates before a run: memory and disk, derived from its network, and time, measured on a few updates."""

from __future__ import annotations

import math
import os
import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vdiff.data.batches import Batch, cache_limit
from vdiff.distributed import free_memory
from vdiff.errors import VdiffError
from vdiff.models.autoencoder import Autoencoder
from vdiff.models.backbone import example_condition, parameter_count
from vdiff.models.condition import SECOND_TIME, Condition, Signature
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import images_at_once
from vdiff.text import DAY, duration
from vdiff.training.averages import profiles_of
from vdiff.training.config import FLOATS_PER_WEIGHT, Config, LoopConfig
from vdiff.training.engine import Engine
from vdiff.training.inputs import Inputs
from vdiff.training.objectives import StudentState, TrainBatch
from vdiff.training.posthoc import NUM_SNAPSHOTS
from vdiff.training.step import Task, TrainStep, part_losses
from vdiff.training.weights import trainable

FLOAT = 4
LIBRARIES, COPIES = 80 * 2**20, 6
"""Memory of kernels besides the tensors: compiled code and, on CPUs, this many copies of the largest tensor in another
layout. Both are fitted to the peaks in benchmarks/results/memory.md."""
TIMED_UPDATES, LONG_UPDATE = 3, 4.0
"""Updates that are timed after the first one. A first one of this many seconds counts for all, unless it compiled."""
FEW_UPDATES = 100
"""A run with at most this many updates is not timed before it begins."""
NEED_VALUES = (DataDependentOutputException, DynamicOutputShapeException, UnsupportedOperatorException)


@dataclass(frozen=True)
class Memory:
    """Bytes that a process needs on its device.

    Attributes:
        weights: of the trained networks and their teachers, without `frozen`.
        frozen: the model's weights that do not learn; every process has all of them. Checkpoints hold them, unless
            they are the base of a LoRA.
        activations: the peak of forward and backward pass, without the gradients, of the check of a student, or of
            decoding a batch.
        images: decoded images that are kept.
        program: what the process uses already, and what libraries add.
        autoencoder: its weights; its activations are part of `activations`.
    """

    weights: int
    frozen: int
    gradients: int
    moments: int
    averages: int
    activations: int
    images: int
    program: int
    autoencoder: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return sum(getattr(self, item.name) for item in fields(self))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations create in this mode, while they are alive.

    Attributes:
        peak: the most bytes at once.
        largest: bytes of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self._known: set[int] = set()

    def known(self, tensor: Tensor) -> None:
        """Do not count this tensor or its views."""
        self._known.add(id(tensor.untyped_storage()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        del types
        answer = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(answer):
            if isinstance(tensor, Tensor) and id(storage := tensor.untyped_storage()) not in self._known:
                self.known(tensor)
                self.now += storage.nbytes()
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, storage.nbytes())
                weakref.finalize(storage, self._free, id(storage), storage.nbytes())
        return answer

    def _free(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self.now -= num_bytes


class WithoutValues(Engine):
    """An engine for networks without values, which are created on their device."""

    def place(self, denoiser: Denoiser) -> Denoiser:
        """Nothing."""
        return denoiser


class ExampleInputs(Inputs):
    """The given tensors are already x, and every condition is the same."""

    def condition(self, batch: Batch, takes: Signature) -> Condition:
        """`example_condition`."""
        return example_condition(takes, len(batch.images), batch.images.shape[1:])


def memory_of(
    build: Callable[[Engine], Task], shape: tuple[int, ...], num_images: int, engine: Engine, vae: Path | None = None
) -> Memory:
    """The memory of an update, counted in one update on tensors without values, so it holds for any network.

    Args:
        build: builds the task.
        shape: of a sample.
        num_images: size of the dataset.
        vae: the folder of the autoencoder that decodes samples; None: samples are pixels.

    Raises:
        one of `NEED_VALUES`: network or method depends on the values of tensors.
    """
    # processes of a launcher have the device cpu:0, which tensors without values distinguish from cpu
    device = torch.device("cpu") if engine.device.type == "cpu" else engine.device
    # Tensors without values cannot be moved, as peft does with layers, and have no forward derivative, which some
    # methods take. So layers stay where they are, and a second call takes the place of the derivative.
    stay = patch.object(nn.Module, "to", lambda module, *_, **__: module)
    evaluated = patch.object(torch.func, "jvp", lambda call, inputs, _: (call(*inputs), call(*inputs)))
    autoencoder = Autoencoder.read(vae, weights=False) if vae else None
    with FakeTensorMode(allow_non_fake_inputs=True), device, stay, evaluated:
        task = build(WithoutValues(**{**vars(engine), "device": device, "compile": False}))
        config, denoiser = task.config, task.denoiser.train()
        denoiser.network.checkpointing = config.checkpointing
        more = task.method.networks(denoiser) if task.method else None
        count = config.batch_size // (engine.world_size * config.grad_accum)
        images = torch.zeros(count, *shape)
        batch = TrainBatch(images, torch.zeros_like(images), torch.zeros(count).double(), _condition(denoiser, images))
        student = StudentState(denoiser, denoiser, 0.0, more)
        teacher = getattr(task.objective, "teacher", None)
        modules = [module for module in (denoiser, teacher, more) if module is not None]
        tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
        kept = list({id(tensor): tensor for tensor in tensors}.values())  # networks may share weights
        live, drawing, decoding = LiveBytes(), LiveBytes(), LiveBytes()
        held: list[Tensor] = []
        if autoencoder:
            allocate(autoencoder.to(device).model)
            held = list(autoencoder.model.parameters())
        for tensor in (*kept, *held):
            for counter in (live, drawing, decoding):
                counter.known(tensor)
        with live:
            losses, _, _ = part_losses(task, denoiser, batch, student, engine)
            losses.mean().backward()
        at_once = images_at_once(denoiser.network.signature, shape)
        if num := min(getattr(config, "check_images", 0), at_once):  # more images than a small batch has
            with drawing, torch.no_grad():
                drawn = torch.zeros(num, *shape)
                condition = _condition(denoiser, drawn)
                if SECOND_TIME in denoiser.network.signature.names:
                    condition = condition.with_tensors(second_time=torch.zeros(num).double())
                denoiser.eval()(drawn, torch.zeros(num).double(), condition)
        if autoencoder:
            with decoding:
                autoencoder.decode(images, check=False)
    learning = sum(weight.numel() for weight in trainable(denoiser).values()) * FLOAT
    fixed = num_bytes(weight for weight in denoiser.parameters() if not weight.requires_grad)
    gradients = learning + (parameter_count(more) * FLOAT if more else 0)
    shared = engine.world_size if config.fsdp else 1
    averages = num_averages(config) + (task.self_ema is not None)
    is_host = device.type != "cuda"
    return Memory(
        weights=learning // shared + num_bytes(kept) - learning - fixed,  # teachers are whole in every process
        frozen=fixed,
        gradients=gradients // shared,
        moments=int(FLOATS_PER_WEIGHT[config.optimizer] * learning + 2 * (gradients - learning)) // shared,
        averages=averages * learning // shared,
        activations=max(0, live.peak - gradients, drawing.peak, decoding.peak),
        images=min(num_images * math.prod(shape), cache_limit()) if is_host else 0,
        program=LIBRARIES
        + (psutil.Process().memory_info().rss + COPIES * max(live.largest, drawing.largest) if is_host else 0),
        autoencoder=num_bytes(held),
    )


def allocate(*networks: nn.Module) -> None:
    """Replace the weights and buffers of networks on the meta device by new ones; shared weights stay shared."""
    made: dict[int, nn.Parameter] = {}
    for module in (module for network in networks for module in network.modules()):
        for name, weight in module.named_parameters(recurse=False):
            if id(weight) not in made:
                own = nn.Parameter(torch.empty(weight.shape, dtype=weight.dtype), requires_grad=weight.requires_grad)
                made |= {id(weight): own, id(own): own}  # a module of two networks is met twice
            setattr(module, name, made[id(weight)])
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def _condition(denoiser: Denoiser, images: Tensor) -> Condition:
    """A condition for samples like `images`."""
    takes, count = denoiser.network.signature, len(images)
    condition = example_condition(takes, count, images.shape[1:])
    return condition.with_tensors(guidance=torch.zeros(count)) if takes.takes_guidance else condition


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """The size of tensors."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def num_averages(config: LoopConfig) -> int:
    """The number of averages of the weights in a run."""
    profile, further = profiles_of(
        ema=config.average_decay, ema_more=config.further_decays(), ema_profiles=config.ema_profiles
    )
    return len(further) + (profile is not None)


def disk_of(memory: Memory, config: LoopConfig, world_size: int) -> int:
    """The most bytes of a run's folder: a checkpoint and a state, twice while they are replaced, and kept checkpoints.

    Files hold whole tensors, even if each process holds only a shard of those that learn.
    """
    parts = world_size if config.fsdp else 1
    weights = parts * memory.gradients
    checkpoint = weights + (0 if config.lora_rank else memory.frozen)
    state = weights + parts * (memory.moments + memory.averages)
    kept = config.keep_last + (config.num_iters // config.keep_every if config.keep_every else 0)
    further = max(0, num_averages(config) - 1) * weights
    snapshots = math.ceil(config.num_iters / config.ema_interval) if config.ema_interval else NUM_SNAPSHOTS
    return 2 * (checkpoint + state) + kept * checkpoint + snapshots * further


def update_times(task: Task, shape: tuple[int, ...], engine: Engine) -> tuple[float, float]:
    """The seconds of the first update, which may compile, and of a later one.

    They are measured on a few updates with black images, whose results are discarded.
    """
    step = TrainStep(replace(task, inputs=ExampleInputs()), engine)
    share = engine.part(task.config.batch_size)
    size = (share.stop - share.start, *shape)
    batch = Batch(torch.zeros(size, dtype=torch.uint8), torch.zeros(size[:1], dtype=torch.int64))

    def seconds_of(n: int) -> float:
        began = time.monotonic()
        float(step(n, batch).norm)  # waits for the device
        return time.monotonic() - began

    first = usual = seconds_of(0)
    # all processes do the same number of updates, or some would wait forever
    longest = float(engine.accelerator.gather(torch.tensor([first], device=engine.device)).max())
    if longest < LONG_UPDATE or engine.compile:
        usual = min(seconds_of(n) for n in range(1, TIMED_UPDATES + 1))
    engine.accelerator.free_memory()  # it keeps references to all that it prepared
    return first, usual


def memory_left(memory: Memory, engine: Engine) -> int:
    """Bytes that remain free on the device; negative: the run does not fit."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if engine.device.type == "cpu" else 1
    resident = psutil.Process().memory_info().rss if engine.device.type != "cuda" else 0
    return free_memory(engine.device) - processes * (memory.total - resident)


def check_memory(
    build: Callable[[Config], Memory], config: Config, engine: Engine, smaller_preset: str = ""
) -> Memory | None:
    """The memory of a run, if the device has enough; None: unknown, as network or method depends on tensor values.

    Args:
        build: computes the memory for given settings.
        smaller_preset: a preset to suggest.

    Raises:
        VdiffError: the device has less; the error names flags that make the run fit.
    """
    try:
        memory = build(config)
    except NEED_VALUES:
        return None
    left = memory_left(memory, engine)
    if left >= 0:
        return memory
    share = config.batch_size // engine.world_size
    parts = [n for n in range(config.grad_accum + 1, share + 1) if share % n == 0]
    fits = (n for n in parts if left + memory.activations * (1 - config.grad_accum / n) >= 0)
    ways = [f"--preset {smaller_preset}"] if smaller_preset else []
    if number := next(fits, 0):
        ways.append(f"--grad_accum {number}")
        ways.append(f"--batch_size {config.batch_size * config.grad_accum // number}")
    if not config.checkpointing and memory_left(build(replace(config, checkpointing=True)), engine) >= 0:
        ways.append("--checkpointing True")
    hint = f"give {' or '.join(ways)}" if ways else "train on a device with more memory, or a smaller network"
    need, free = memory.total / 2**30, (memory.total + left) / 2**30
    raise VdiffError(f"the run needs {need:.1f} GiB of memory, and {engine.device.type} has {free:.1f} GiB", hint)


def facts(memory: Memory | None, config: LoopConfig, engine: Engine) -> dict[str, str]:
    """Memory and disk, as rows."""
    if memory is None:
        return {"memory": "unknown: the network or method depends on tensor values"}
    parts = {item.name: getattr(memory, item.name) for item in fields(memory)}
    named = ", ".join(f"{name} {gib(value)}" for name, value in parts.items() if value >= 0.01 * memory.total)
    free = memory.total + memory_left(memory, engine)
    return {
        "memory": f"{memory.total / 2**30:.3g} of {gib(free)} GiB: {named}",
        "disk": f"up to {gib(disk_of(memory, config, engine.world_size))} GiB",
    }


def time_facts(seconds: float, updates: int, device: str) -> dict[str, str]:
    """The time of a run, as rows, with advice if it is more than a day; `seconds` is for all updates."""
    rows = {"time": f"{duration(seconds)} on {device}: {updates:,} updates of {seconds / updates:.2g} s"}
    if seconds > DAY:
        rows["warning"] = "more than a day: fewer --num_iters, a smaller --preset or a GPU"
    return rows


def gib(num_bytes: float) -> str:
    """`0.35`: gibibytes."""
    return f"{num_bytes / 2**30:.2g}"
