"""Tiny text-to-image checkpoints and captioned datasets to train on."""

from __future__ import annotations

import io
from pathlib import Path

import diffusers
import numpy as np
import PIL.Image

from tests.pipelines import pipeline
from vdiff.data.store import DatasetMeta, StoreWriter
from vdiff.models.checkpoint import CheckpointConfig, save_checkpoint
from vdiff.models.components import ENCODERS, components_fingerprint, read_encoder
from vdiff.models.denoiser import Denoiser
from vdiff.models.text import TextBackbone
from vdiff.models.tokenizing import Tokenizers
from vdiff.models.wrapped import DiffusersBackbone

PIXELS = 64
TABLE = {"name": "scaled_linear", "num_levels": 1000, "first_beta": 0.00085, "last_beta": 0.012}
CAPTIONS = ("a red fox", "photo of a small house", "a happy face in the snow", "blue bird, watercolour", "a sad cat")


def write_text_checkpoint(folder: Path, kind: str) -> Denoiser:
    """A checkpoint of the tiny pipeline `kind`; returns its denoiser."""
    root = pipeline(kind)
    unet = DiffusersBackbone(diffusers.UNet2DConditionModel.from_pretrained(root / "unet"))
    encoders = [read_encoder(root, part) for part in ENCODERS if (root / part).is_dir()]
    empty = Tokenizers.read(root).tokens([""])[0].tolist()
    network = TextBackbone(unet, encoders, empty_tokens=empty, zero_empty=kind == "sdxl")
    config = CheckpointConfig(
        backbone={"kind": "text", "config": network.describe()}, sample_shape=[4, 8, 8], codec="autoencoder",
        schedule=TABLE, prediction="v" if kind == "sd2" else "eps", num_timesteps=50, method="base", weights="raw",
        num_iters=0, target_iters=0, num_images=0, dataset="imported:test", dataset_fingerprint="",
        components={"path": str(root), "fingerprint": components_fingerprint(root)},
    )  # fmt: skip
    denoiser = config.build()
    denoiser.network.load_state_dict(network.state_dict())
    save_checkpoint(folder, denoiser.state_dict(), config)
    return denoiser


def write_captioned(folder: Path, *, count: int = 10, captions: bool = True) -> Path:
    """A dataset of random pictures with captions."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(count)
    writer = StoreWriter(folder, DatasetMeta("captioned", (PIXELS,), 3))
    for k in range(count):
        pixels = generator.integers(0, 256, (PIXELS // 16, PIXELS // 16, 3), dtype=np.uint8).repeat(16, 0).repeat(16, 1)
        buffer = io.BytesIO()
        PIL.Image.fromarray(pixels).save(buffer, format="PNG")
        writer.add({PIXELS: buffer.getvalue()}, None, CAPTIONS[k % len(CAPTIONS)] if captions else "")
    writer.finish({"images": count, **({"captions": count} if captions else {})})
    return folder
