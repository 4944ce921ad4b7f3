"""Device, precision and processes of a run, by Accelerate."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vdiff.distributed import Processes, leave_at_exit, pick_device
from vdiff.errors import OptionError
from vdiff.models.denoiser import Denoiser
from vdiff.training.config import LoopConfig, check_packages
from vdiff.training.weights import is_sharded

MIXED = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}
# the others wait while one process draws and saves
PATIENCE = timedelta(hours=2)
# on a GPU, asking the other processes for a signal waits for the device
UPDATES_BETWEEN_QUESTIONS = {"cpu": 1, "cuda": 10}
REMEDIES = "give --grad_accum 2 (or more), --checkpointing True, --precision bf16 or a smaller --batch_size"


@dataclass(frozen=True, kw_only=True)
class Engine(Processes):
    """The processes that train together, their accelerator, and whether networks are compiled."""

    accelerator: Accelerator
    compile: bool

    def place(self, denoiser: Denoiser) -> Denoiser:
        """Move a denoiser to the device, in the fastest memory format for its convolutions."""
        denoiser = denoiser.to(self.device)
        return denoiser.to(memory_format=torch.channels_last) if self.device.type == "cuda" else denoiser

    def compiled(self, denoiser: Denoiser) -> Denoiser:
        """Compile its network in place, if the settings say so."""
        if self.compile:
            denoiser.network.compile(dynamic=False)
        return denoiser

    def wrapped(self, denoiser: Denoiser) -> nn.Module:
        """The module to call in training: it applies the precision and averages gradients over all processes."""
        if is_sharded(denoiser):  # FSDP averages gradients itself
            return denoiser
        model: nn.Module = self.accelerator.prepare(denoiser)
        return model

    @contextmanager
    def synchronised(self, model: nn.Module, now: bool) -> Iterator[None]:
        """In the block, a backward pass averages gradients over all processes only if `now` is true."""
        network = getattr(model, "network", None)
        if isinstance(network, FSDPModule):
            network.set_requires_gradient_sync(now)
            yield
        else:
            with nullcontext() if now else self.accelerator.no_sync(model):
                yield

    def clip(self, weights: Sequence[nn.Parameter], max_norm: float) -> Tensor:
        """Clip the gradient of weights to `max_norm`; returns its norm before, over all processes."""
        self.accelerator.unscale_gradients()
        total = nn.utils.clip_grad_norm_(weights, max_norm)
        return total.full_tensor() if isinstance(total, DTensor) else total

    def sum(self, values: Tensor) -> Tensor:
        """The sum over all processes, the same in each."""
        if self.world_size == 1:
            return values
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total

    def agreed(self, code: int | None, done: int) -> int | None:
        """The exit code of a signal to any process; all processes learn it after the same update.

        `done` is the number of finished updates."""
        if self.world_size == 1:
            return code
        if done % UPDATES_BETWEEN_QUESTIONS.get(self.device.type, 1):
            return None
        codes: Tensor = self.accelerator.gather(torch.tensor([code or 0], device=self.device))
        return int(codes.max()) or None

    def wait(self) -> None:
        """Wait for all processes."""
        self.accelerator.wait_for_everyone()

    @property
    def description(self) -> str:
        """`cpu, fp32` or `2 processes, cuda, bf16, TF32, compiled`, and an overridden setting of Accelerate."""
        precision = {value: key for key, value in MIXED.items()}[self.accelerator.mixed_precision]
        many = [f"{self.world_size} processes"] if self.world_size > 1 else []
        tf32 = ["TF32"] if self.device.type == "cuda" else []
        theirs = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
        unused = (
            [f"not Accelerate's {theirs}, which --precision overrides"]
            if theirs not in ("no", MIXED[precision])
            else []
        )
        return ", ".join([*many, self.device.type, precision, *unused, *tf32, *(["compiled"] if self.compile else [])])


def build_engine(config: LoopConfig) -> Engine:
    """The engine for `device`, `precision` and `compile`, in one process or under a launcher.

    Raises:
        OptionError: device, precision or optimiser is not available, or the batch or the weights cannot be shared.
    """
    check_packages(config)
    picked = pick_device(config.device).type
    if config.threads:
        torch.set_num_threads(config.threads)
    on_cuda = picked == "cuda"
    precision = config.precision if config.precision != "auto" else ("bf16" if on_cuda else "fp32")
    if precision == "fp16" and not on_cuda:
        raise OptionError("--precision fp16 needs a CUDA device", "give --precision bf16 or fp32")
    accelerator = Accelerator(
        mixed_precision=MIXED[precision],
        cpu=picked == "cpu",  # needed without a GPU, or several processes would train separately
        kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)],
    )
    if config.device not in ("auto", accelerator.device.type):
        raise OptionError(f"--device {config.device}: Accelerate chose {accelerator.device.type}", "give --device auto")
    parts = accelerator.num_processes * config.grad_accum
    if config.batch_size % parts:
        raise OptionError(
            f"a batch of {config.batch_size} cannot be shared equally by {accelerator.num_processes} processes "
            f"in {config.grad_accum} parts",
            f"give --batch_size a multiple of {parts}",
        )
    if config.fsdp and accelerator.num_processes == 1:
        raise OptionError("--fsdp needs several processes", "start them with torchrun")
    if config.fsdp and precision == "fp16":
        raise OptionError("--fsdp does not support --precision fp16", "give --precision bf16")
    if on_cuda:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True  # shapes never change
    if accelerator.num_processes > 1:
        leave_at_exit()
    return Engine(
        accelerator.device,
        accelerator.process_index,
        accelerator.num_processes,
        accelerator=accelerator,
        compile=on_cuda if config.compile is None else config.compile,
    )


def effective_batch(config: LoopConfig, engine: Engine) -> str:
    """`batch 64`, or `batch 64 = 2 processes × 4 parts × 8 samples`."""
    processes, parts = engine.world_size, config.grad_accum
    if processes * parts == 1:
        return f"batch {config.batch_size}"
    factors = [f"{processes} processes"] * (processes > 1) + [f"{parts} parts"] * (parts > 1)
    return f"batch {config.batch_size} = {' × '.join(factors)} × {config.batch_size // (processes * parts)} samples"
