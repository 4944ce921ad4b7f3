"""Where a run computes: Accelerate's device, precision and processes, chosen by three settings."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from accelerate import Accelerator

from vdiff.errors import OptionError
from vdiff.models.denoiser import Denoiser
from vdiff.models.device import pick_device
from vdiff.training.config import LoopConfig

MIXED = {"fp32": "no", "bf16": "bf16"}


@dataclass(frozen=True)
class Engine:
    """An accelerator, and what its device is best given."""

    accelerator: Accelerator
    compile: bool

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        device: torch.device = self.accelerator.device
        return device

    def place(self, denoiser: Denoiser) -> Denoiser:
        """Move a denoiser to the device, in the memory format that its convolutions are fastest in."""
        denoiser = denoiser.to(self.device)
        return denoiser.to(memory_format=torch.channels_last) if self.device.type == "cuda" else denoiser

    def compiled(self, denoiser: Denoiser) -> Denoiser:
        """Compile its network in place, where that is asked for."""
        if self.compile:
            denoiser.network.compile()
        return denoiser

    @property
    def description(self) -> str:
        """`cpu, fp32` or `cuda, bf16, compiled`."""
        precision = {value: key for key, value in MIXED.items()}[self.accelerator.mixed_precision]
        return ", ".join([self.device.type, precision, *(["compiled"] if self.compile else [])])


def build_engine(config: LoopConfig) -> Engine:
    """The engine that `device`, `precision` and `compile` ask for.

    Raises:
        OptionError: this machine has no such device, or the device no such precision.
    """
    on_cuda = pick_device(config.device).type == "cuda"
    precision = config.precision if config.precision != "auto" else ("bf16" if on_cuda else "fp32")
    accelerator = Accelerator(mixed_precision=MIXED[precision], cpu=config.device == "cpu")
    if config.device not in ("auto", accelerator.device.type):
        raise OptionError(f"--device {config.device}: Accelerate chose {accelerator.device.type}", "give --device auto")
    if accelerator.num_processes > 1:
        raise OptionError(f"{accelerator.num_processes} processes: vdiff trains in one", "start it without a launcher")
    return Engine(accelerator, compile=on_cuda if config.compile is None else config.compile)
