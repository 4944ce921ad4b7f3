"""Tiny pipelines of Stable Diffusion with random weights: every folder, file and key of the real ones."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

diffusers.utils.logging.disable_progress_bar()
transformers.utils.logging.disable_progress_bar()

WORDS = (
    "a an the of in on with and photo drawing watercolour painting emoji red green blue yellow black white brown small "
    "large happy sad face cat dog fox bird fish horse tree flower house car boat sun moon star cloud rain snow sea hill"
)
START, END = "<|startoftext|>", "<|endoftext|>"
SCALED = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OFFSET = {"steps_offset": 1, "set_alpha_to_one": False, "clip_sample": False}
UNET: dict[str, Any] = {
    "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "norm_num_groups": 8,
    "block_out_channels": (16, 16, 32, 32), "attention_head_dim": 2, "cross_attention_dim": 32,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
}  # fmt: skip
UNETS: dict[str, dict[str, Any]] = {
    "sd15": UNET,
    "sd2": {**UNET, "attention_head_dim": (1, 2, 2, 2), "use_linear_projection": True},
    "sdxl": {
        **UNET, "block_out_channels": (16, 32, 32), "attention_head_dim": (1, 2, 2), "use_linear_projection": True,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 3), "cross_attention_dim": 64, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 32 + 6 * 8,
    },
}  # fmt: skip
SCHEDULERS: dict[str, Any] = {
    "sd15": diffusers.PNDMScheduler(
        **SCALED, steps_offset=1, set_alpha_to_one=False, skip_prk_steps=True, prediction_type="epsilon"
    ),
    "sd2": diffusers.DDIMScheduler(**SCALED, **OFFSET, prediction_type="v_prediction"),
    "sdxl": diffusers.EulerDiscreteScheduler(
        **SCALED, steps_offset=1, timestep_spacing="leading", prediction_type="epsilon"
    ),
}


def write_tokenizer(folder: Path, *, pad: str = END) -> CLIPTokenizer:
    """A tokenizer of CLIP that knows all bytes and `WORDS`, in the four files that the real ones have.

    As there, the end of a text is the highest number, and "!" the number 0.
    """
    letters = sorted(ByteLevel.alphabet())
    vocabulary, merges = letters + [f"{letter}</w>" for letter in letters], []
    for word in WORDS.split():
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts[:2] = [parts[0] + parts[1]]
            vocabulary.append(parts[0])
    numbers = {token: k for k, token in enumerate(dict.fromkeys([*vocabulary, START, END]))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(numbers))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *dict.fromkeys(merges)]) + "\n")
    tokens = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(tokens))
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True, **tokens}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(folder)
    return tokenizer


def text_encoder(tokenizer: CLIPTokenizer, *, projected: bool = False, **more: Any) -> Any:
    """A text encoder of CLIP with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=32, eos_token_id=2, bos_token_id=0, pad_token_id=1, **more,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)


def autoencoder(**more: Any) -> diffusers.AutoencoderKL:
    """An autoencoder of three halvings with random weights."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=4, latent_channels=4, sample_size=64,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4, **more,
    )  # fmt: skip


@functools.cache
def pipeline(kind: str) -> Path:
    """The folder of a tiny pipeline "sd15", "sd2" (v) or "sdxl"; written once in a test session: change a copy."""
    folder = Path(tempfile.mkdtemp(prefix=f"vdiff-{kind}-")) / kind
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pad = "!" if kind == "sd2" else END
        tokenizer = write_tokenizer(folder / "tokenizer", pad=pad)
        act = "quick_gelu" if kind != "sd2" else "gelu"
        parts = {
            "unet": diffusers.UNet2DConditionModel(**UNETS[kind]),
            "scheduler": SCHEDULERS[kind],
            "tokenizer": tokenizer,
            "text_encoder": text_encoder(tokenizer, hidden_act=act),
        }
        if kind == "sdxl":
            second = write_tokenizer(folder / "tokenizer_2", pad="!")
            parts |= {"tokenizer_2": second, "text_encoder_2": text_encoder(second, projected=True, hidden_act="gelu")}
            parts["vae"] = autoencoder(scaling_factor=0.13025, force_upcast=True)
            whole = diffusers.StableDiffusionXLPipeline(**parts, add_watermarker=False)
        else:
            parts |= {"vae": autoencoder(), "safety_checker": None, "feature_extractor": None}
            whole = diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    whole.save_pretrained(folder)
    for name, part in parts.items():
        if name.startswith("tokenizer"):
            write_tokenizer(folder / name, pad=part.pad_token)
            (folder / name / "tokenizer.json").unlink(missing_ok=True)
    return folder
