"""Preparing a denoiser for fast sampling: precision, memory layout, compilation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import permutations

import torch
from torch import Tensor

from vdiff.errors import OptionError, VdiffError, suggestion
from vdiff.models.backbone import Backbone
from vdiff.models.condition import Condition
from vdiff.models.denoiser import Denoiser, device_of

CHANNELS_LAST_FROM = 64
"""On the CPU, channels-last takes 0.81 to 0.9 of the time from this many channels on, but 1.1 for 32 at 8×8 pixels."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_precision(name: str, device: torch.device) -> str:
    """`fp32`, `bf16` or `fp16`; `auto` is fp32, with products in TF32 on CUDA, so that images stay comparable.

    Raises:
        OptionError: the precision is unknown, or fp16 on the CPU, where it is slow.
    """
    if name != "auto" and name not in DTYPES:
        raise OptionError(f"unknown precision {name!r}", suggestion(str(name), ["auto", *DTYPES]))
    if name == "fp16" and device.type == "cpu":
        raise OptionError("--precision fp16 needs a GPU", "give --precision bf16 or fp32")
    return "fp32" if name == "auto" else name


def ready_to_draw(denoiser: Denoiser, *, precision: str = "auto", compiled: bool = False) -> Denoiser:
    """The denoiser with a `FastNetwork` around its network, which is changed in place, on its current device.

    In half precision the whole network computes in it, except for time and guidance inputs and for the use of its
    output. On CUDA this sets torch's switches for TF32: on for `auto`, off for `fp32`.

    Raises:
        OptionError: the device does not support the precision.
    """
    device = device_of(denoiser)
    dtype = DTYPES[pick_precision(precision, device)]
    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == "auto"
    network = FastNetwork(denoiser.network, dtype=dtype, compiled=compiled)
    return Denoiser(network, denoiser.schedule, denoiser.parameterisation).eval()


def layout_for(device: torch.device, channels: int) -> torch.memory_format:
    """The fastest memory layout for convolutions."""
    is_faster = device.type == "cuda" or (device.type == "cpu" and channels >= CHANNELS_LAST_FROM)
    return torch.channels_last if is_faster else torch.contiguous_format


class FastNetwork(Backbone):
    """A network in `dtype` and the fastest memory layout for its device; called like the network itself.

    On CUDA a compiled network is replayed as a CUDA graph, recorded once per shape: use a single batch size.

    Attributes:
        evaluations: number of evaluated images; with and without the class counts as two.
    """

    def __init__(self, network: Backbone, *, dtype: torch.dtype, compiled: bool) -> None:
        super().__init__()
        device, self.signature = device_of(network), network.signature
        is_flat = all(parameter.ndim < 5 for parameter in network.parameters())
        widths = [parameter.shape[0] for parameter in network.parameters() if parameter.ndim == 4]
        self.layout = layout_for(device, widths[0]) if widths and is_flat else torch.contiguous_format
        self.dtype = dtype
        self.network = network.to(dtype).to(memory_format=self.layout).eval()
        self.is_compiled, self.is_graph = compiled, compiled and device.type == "cuda"
        self.evaluations = 0
        if compiled:
            self.network.compile(dynamic=False, mode="reduce-overhead" if self.is_graph else None)

    def encode(self, condition: Condition) -> Condition:
        """Call the network."""
        return self.network.encode(condition)

    def forward(self, z: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        self.evaluations += len(z)
        if self.is_graph:
            torch.compiler.cudagraph_mark_step_begin()
        given = z.to(self.dtype).contiguous(memory_format=self.layout)
        try:
            output: Tensor = self.network(given, timestep, **condition)
        except Exception as error:
            if not self.is_compiled or not (reason := compiler_failure(error)):
                raise
            raise VdiffError(f"the network cannot be compiled here: {reason}", "leave --compile out") from None
        # the next replay of a graph overwrites the previous result, but samplers keep predictions
        return output.to(z.dtype, copy=self.is_graph)


def compiler_failure(error: Exception) -> str:
    """The first line of an error of torch's compiler; empty for other errors."""
    if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return ""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def impossible_times(times: Sequence[tuple[Hashable, float, float]]) -> list[int]:
    """Which (network, evaluations, ms per image) are implausible: more evaluations of a network in less time.

    Both sides of such a pair are returned, as other programs may have slowed down either.
    """
    pairs = [
        pair
        for pair in permutations(range(len(times)), 2)
        for (a, more, less), (b, fewer, longer) in [(times[pair[0]], times[pair[1]])]
        if a == b and more > fewer and less < longer
    ]
    return sorted({k for pair in pairs for k in pair})
