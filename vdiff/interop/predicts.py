"""Whether a UNet predicts ε or v, by evaluating it at its noisiest level.

There z is almost only noise ε. So an ε-prediction F returns z itself, whatever the text is: the coefficient b = ⟨F,
z⟩/⟨z, z⟩ is about 1. A prediction of v = α ε − σ x returns −x̂, which depends little on z: b is about α or less. The
same holds for an untrained network and for a prediction of x. So b is measured at an earlier level too, where a
prediction of v has about α/σ of the finest noise.

With α > 0 the mean of z tells a network something of the brightness of the image, x̂ ≈ z/α, so the answer's mean follows
that of z by about −1/α; with zero terminal SNR it tells nothing. This slope is measured at the last level and at an
earlier one, where every trained network follows the mean.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.errors import VdiffError, explained
from vdiff.interop.modelspec import SD1, SD2, SDXL
from vdiff.interop.recognition import Foreign, Said
from vdiff.models.components import text_libraries

TOKENS, SAMPLES, LARGEST = 77, 8, 32
LEAST_OF_EPS, MOST_OF_V, LEAST_EARLIER = 0.75, 0.4, 0.15
"""Bounds of b at the last level, and of b at the earlier level for a prediction of v."""
MID_LEVEL = 0.6
FOLLOWS, STILL, LEAK = -1.0, 0.35, 1.25
"""Slopes of the mean: a network follows the mean at the earlier level if its slope there is below the first. It has
zero terminal SNR if its slope at the last level is less than the second times that, and none if it is more than the
third times that, as 1/α is larger there. In between, it may have learned nothing about the last level."""
SOURCE = "test"
XL_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D")
CONFIGS: dict[str, dict[str, Any]] = {
    SD1.name: {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    SD2.name: {
        "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 96,
        "use_linear_projection": True,
    },
    SDXL.name: {
        "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "sample_size": 128,
        "use_linear_projection": True, "block_out_channels": [320, 640, 1280],
        "down_block_types": list(XL_BLOCKS), "up_block_types": [name.replace("Down", "Up") for name in XL_BLOCKS[::-1]],
        "transformer_layers_per_block": [1, 2, 10], "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
    },
}  # fmt: skip
"""Configurations of the UNets; a file does not say how many heads they have."""


@dataclass(frozen=True)
class EpsOrV:
    """What the test found.

    Attributes:
        prediction: "eps" or "v"; None: it cannot tell.
        zero_snr: None: it cannot tell, or the network predicts ε.
        coefficient, error: b and its standard error.
        before: b at the earlier level.
        slope, earlier: slopes of the mean at the last level and at the earlier one.
    """

    prediction: str | None
    zero_snr: bool | None
    coefficient: float
    error: float
    before: float
    slope: float
    earlier: float

    @property
    def said(self) -> Said:
        """As a source."""
        return Said(SOURCE, self.prediction, self.zero_snr)

    def __str__(self) -> str:
        """The verdict, how sure it is, and the reason."""
        measured = f"the answer to noise has {self.coefficient:.3f} ± {self.error:.3f} of it; eps has 1, v about 0"
        if self.prediction is None and self.coefficient < MOST_OF_V:
            return f"cannot tell: {measured}; but at an earlier level, where v has more, it has {self.before:.3f}"
        if self.prediction is None:
            return f"cannot tell eps from v: {measured}"
        words = f"{self.prediction}: {measured}"
        if self.prediction == "eps":
            return words
        slopes = f"its mean follows that of the noise by {self.slope:.2f}, at an earlier level by {self.earlier:.2f}"
        if self.zero_snr is None:
            return f"{words}; cannot tell zero terminal SNR: {slopes}"
        return f"{words}; {'zero terminal SNR' if self.zero_snr else 'no zero terminal SNR'}: {slopes}"


@torch.no_grad()
def measure(unet: Any, levels: int = 1000) -> EpsOrV:
    """Evaluate a `UNet2DConditionModel` at its noisiest level, with zero text embeddings, and at an earlier level."""
    config, dtype = unet.config, next(unet.parameters()).dtype
    size = config.sample_size if isinstance(config.sample_size, int) else LARGEST
    shape = (SAMPLES, config.in_channels, *[min(size, LARGEST)] * 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def answer(z: Tensor, level: int) -> Tensor:
        text = torch.zeros(len(z), TOKENS, config.cross_attention_dim, dtype=dtype)
        more = None
        if config.addition_embed_type == "text_time":
            pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
            side = 8.0 * size
            sizes = torch.tensor([side, side, 0, 0, side, side]).repeat(len(z), 1)
            more = {"text_embeds": torch.zeros(len(z), pooled, dtype=dtype), "time_ids": sizes.to(dtype)}
        times = torch.full((len(z),), level)
        output: Tensor = unet(z.to(dtype), times, text, added_cond_kwargs=more, return_dict=False)[0]
        return output.float()

    def slope(level: int) -> float:
        """The change of the answer's mean for a change of the mean of z, over all channels at once."""
        step = 2 / (shape[2] * shape[3]) ** 0.5
        change = answer(noise + step, level) - answer(noise - step, level)
        return float(change.mean()) / (2 * step)

    def share(level: int) -> Tensor:
        """⟨F, z⟩/⟨z, z⟩ of each sample, without the mean, which is the other test's."""
        found = answer(noise, level)
        if not found.isfinite().all():
            raise VdiffError("the UNet's answer to noise is not finite", "the file is damaged: download it again")
        centred = noise - noise.mean(dim=(2, 3), keepdim=True)
        return (found * centred).sum(dim=(1, 2, 3)) / centred.square().sum(dim=(1, 2, 3))

    middle = round(MID_LEVEL * levels)
    each, before = share(levels - 1), float(share(middle).mean())
    coefficient, error = float(each.mean()), float(each.std()) / SAMPLES**0.5
    last, earlier = slope(levels - 1), slope(middle)
    prediction = None
    if coefficient > LEAST_OF_EPS:
        prediction = "eps"
    elif coefficient < MOST_OF_V and before > LEAST_EARLIER:
        prediction = "v"
    zero_snr, ratio = None, last / earlier if earlier < FOLLOWS else 1.0
    if prediction == "v" and not STILL <= ratio <= LEAK:
        zero_snr = ratio < STILL
    return EpsOrV(prediction, zero_snr, coefficient, error, before, last, earlier)


def evaluated(model: Foreign, pipeline: Path | None) -> EpsOrV:
    """Load the UNet of a file or a folder, and `measure` it.

    Args:
        pipeline: a folder with the configuration of the UNet, if its sizes are unusual.

    Raises:
        VdiffError: it has no UNet, or its configuration is not known.
    """
    if model.kind == "LoRA":
        raise VdiffError(f"--test: {model.path} is a LoRA, which predicts what its base does", "inspect the base")
    if model.family is None or model.kind not in ("model", "pipeline"):
        raise VdiffError(
            f"--test: {model.path} is {model.what}: only UNets of Stable Diffusion can be tested", "leave it out"
        )
    with (
        _configuration(model, pipeline) as folder,
        text_libraries(),
        explained(
            f"the UNet of {model.path} cannot be loaded", "give --pipeline FOLDER of the same architecture", Exception
        ),
    ):
        import diffusers

        kind: Any = diffusers.UNet2DConditionModel
        if model.kind == "pipeline":
            unet = kind.from_pretrained(model.path / "unet", use_safetensors=True, local_files_only=True)
        else:
            unet = kind.from_single_file(str(model.path), config=str(folder), subfolder="unet", local_files_only=True)
        if unet.dtype == torch.float16:
            unet = unet.to(torch.bfloat16)  # processors compute in it
        return measure(unet.eval())


@contextmanager
def _configuration(model: Foreign, pipeline: Path | None) -> Iterator[Path]:
    """A folder with unet/config.json for a file."""
    if pipeline is not None or model.kind == "pipeline":
        yield pipeline or model.path
        return
    if not model.usual_sizes or model.family is None:
        raise VdiffError(
            f"--test: the UNet of {model.path} has unusual sizes, and a file does not say how many heads it has",
            "give --pipeline FOLDER: a pipeline of the same architecture",
        )
    with tempfile.TemporaryDirectory() as temporary:
        (Path(temporary) / "unet").mkdir()
        values = {"_class_name": "UNet2DConditionModel", **CONFIGS[model.family.name]}
        (Path(temporary) / "unet/config.json").write_text(json.dumps(values), encoding="utf-8")
        yield Path(temporary)
