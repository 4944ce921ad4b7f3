"""What a page needs besides the samplers of text-to-image models: text encoder, decoder and tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vdiff.errors import VdiffError
from vdiff.files import write_json
from vdiff.interop.onnx import export_module
from vdiff.models import checks
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.condition import POOLED, TEXT, TOKENS
from vdiff.models.denoiser import Denoiser
from vdiff.models.prompting import Prompting
from vdiff.models.text import TextBackbone
from vdiff.models.tokenizing import Tokenizers

MAX_BYTES = 2**30
"""Weights that a browser loads."""
TOKENIZER = "tokenizer.json"


class TextEncoder(nn.Module):
    """Tokens (B, N) int64 → text (B, N, C)."""

    def __init__(self, network: TextBackbone) -> None:
        super().__init__()
        self.network = network

    def forward(self, tokens: Tensor) -> Tensor:
        return self.network.embed(tokens)[TEXT]


class LatentDecoder(nn.Module):
    """Latents (B, C, h, w) → pictures (B, 3, H, W) in [−1, 1]."""

    def __init__(self, prompting: Prompting) -> None:
        super().__init__()
        assert prompting.autoencoder is not None
        self.model = prompting.autoencoder.model
        self.shift, self.scale = prompting.autoencoder.shift, prompting.autoencoder.scale

    def forward(self, latents: Tensor) -> Tensor:
        pictures: Tensor = self.model.decode(latents / self.scale + self.shift, return_dict=False)[0]
        return pictures.clamp(-1, 1)


def check_text(path: Path, denoiser: Denoiser, config: CheckpointConfig) -> None:
    """Refuse a text-to-image model that does not fit into a browser.

    Raises:
        VdiffError: it is too large, needs guidance by two evaluations, or takes more than the text.
    """
    served = "use `vdiff serve`, which draws on this machine"
    size = sum(tensor.numel() * tensor.element_size() for tensor in denoiser.state_dict().values())
    if size > MAX_BYTES:
        raise VdiffError(f"{path} has {size / 2**30:.1f} GiB of weights, too much for a browser", served)
    if POOLED in denoiser.network.signature.names:
        raise VdiffError(f"{path} has two text encoders, which a page does not run", served)
    if checks.default_guidance(config) or config.guidance_range:
        raise VdiffError(f"{path} draws with guidance, which a page does not have for prompts", served)


def write_text_parts(denoiser: Denoiser, prompting: Prompting, folder: Path, precision: str) -> dict[str, float]:
    """Write `text.onnx`, `decoder.onnx` (for latents) and the tokenizer; returns file → largest difference.

    Raises:
        VdiffError: results differ, or the tokenizer is none of byte pairs.
    """
    network, tokenizers = cast(TextBackbone, denoiser.network), prompting.tokenizers
    assert tokenizers is not None
    write_json(folder / TOKENIZER, tokenizer_of(tokenizers))
    tokens = tokenizers.tokens(["a red fox", "two cats"])
    differences = {"text.onnx": export_module(TextEncoder(network), {TOKENS: tokens}, folder / "text.onnx", precision)}
    if (autoencoder := prompting.autoencoder) is not None:
        sizes = (side // autoencoder.factor for side in prompting.shape[1:])
        latents = torch.randn(2, autoencoder.channels, *sizes, generator=torch.Generator().manual_seed(0))
        file = folder / "decoder.onnx"
        differences[file.name] = export_module(LatentDecoder(prompting), {"latents": latents}, file, precision)
    return differences


def tokenizer_of(tokenizers: Tokenizers) -> dict[str, Any]:
    """The tokenizer of CLIP as JSON: `vocab` and `special` word → number, `merges` in their order, and further numbers.

    Raises:
        VdiffError: it is of another kind.
    """
    [part] = tokenizers.parts
    described = json.loads(part.backend_tokenizer.to_str())
    model = described["model"]
    if model["type"] != "BPE" or model["end_of_word_suffix"] != "</w>":
        raise VdiffError(f"the tokenizer is a {model['type']}, not that of CLIP", "use `vdiff serve`")
    return {
        "vocab": model["vocab"],
        "merges": [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]],
        "special": {word["content"]: word["id"] for word in described["added_tokens"]},
        "start": part.bos_token_id,
        "end": part.eos_token_id,
        "unknown": part.unk_token_id,
        "padding": part.pad_token_id,
        "length": tokenizers.length,
    }
