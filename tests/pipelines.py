"""Tiny pipelines of Stable Diffusion with random weights: every folder, file and key of the real ones."""

from __future__ import annotations

import atexit
import functools
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

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
        "transformer_layers_per_block": (1, 2, 3), "cross_attention_dim": 32 + 48, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 48 + 6 * 8,
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


def text_encoder(tokenizer: CLIPTokenizer, *, size: int = 32, projected: bool = False, **more: Any) -> Any:
    """A text encoder of CLIP with random weights."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=size, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        max_position_embeddings=77, projection_dim=size, eos_token_id=2, bos_token_id=0, pad_token_id=1, **more,
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
    place = tempfile.mkdtemp(prefix=f"vdiff-{kind}-")
    atexit.register(shutil.rmtree, place)
    folder = Path(place) / kind
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
            parts |= {
                "tokenizer_2": second,
                "text_encoder_2": text_encoder(second, size=48, projected=True, hidden_act="gelu"),
            }
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


BLOCKS: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "patch_size": 2}
PIXART: dict[str, Any] = {
    **BLOCKS, "in_channels": 4, "out_channels": 8, "cross_attention_dim": 24, "caption_channels": 48,
    "norm_num_groups": 4,
}  # fmt: skip
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "sd3": ("StableDiffusion3Pipeline", "SD3Transformer2DModel", {
        **BLOCKS, "sample_size": 8, "in_channels": 4, "out_channels": 4, "pos_embed_max_size": 12,
        "caption_projection_dim": 24, "joint_attention_dim": 48, "pooled_projection_dim": 16 + 24,
        "dual_attention_layers": (0,), "qk_norm": "rms_norm",
    }),
    "flux": ("FluxPipeline", "FluxTransformer2DModel", {
        **BLOCKS, "patch_size": 1, "in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 48,
        "pooled_projection_dim": 16, "guidance_embeds": True, "axes_dims_rope": (4, 4, 4),
    }),
    "alpha": ("PixArtAlphaPipeline", "PixArtTransformer2DModel", {**PIXART, "sample_size": 128}),
    "sigma": ("PixArtSigmaPipeline", "PixArtTransformer2DModel", {**PIXART, "sample_size": 8}),
}  # fmt: skip
"""Tiny pipelines of transformers: their class, and class and configuration of the network."""


def t5() -> tuple[T5Tokenizer, T5EncoderModel]:
    """A tokenizer of T5 that knows ASCII and `WORDS`, and a text encoder with random weights."""
    pieces = [f"▁{word}" for word in WORDS.split()] + [chr(k) for k in range(33, 127)]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    tokenizer = T5Tokenizer(vocab=[*vocabulary, *((piece, -4.0) for piece in dict.fromkeys(pieces))], extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=48,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return tokenizer, T5EncoderModel(config)


@functools.cache
def transformer_pipeline(kind: str, *, has_t5: bool = True, shards: bool = False) -> Path:
    """The folder of a tiny pipeline of `TRANSFORMERS`; written once in a test session: change a copy.

    Args:
        has_t5: an SD3 may lack it.
        shards: T5 is written in parts, as the published ones are.
    """
    place = tempfile.mkdtemp(prefix=f"vdiff-{kind}-")
    atexit.register(shutil.rmtree, place)
    folder = Path(place) / kind
    pipeline_name, network_name, settings = TRANSFORMERS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = getattr(diffusers, network_name)(**settings)
        for parameter in network.parameters():  # the output of new networks is nearly 0
            torch.nn.init.normal_(parameter, std=0.1)
        parts: dict[str, Any] = {"transformer": network}
        clips = {"sd3": (16, 24), "flux": (16,)}.get(kind, ())
        for name, size in zip(("", "_2"), clips, strict=False):
            tokenizer = write_tokenizer(folder / f"tokenizer{name}", pad="!" if name else END)
            parts |= {f"tokenizer{name}": tokenizer}
            parts |= {f"text_encoder{name}": text_encoder(tokenizer, size=size, projected=kind == "sd3")}
        last = {"sd3": "_3", "flux": "_2"}.get(kind, "")
        parts[f"tokenizer{last}"], parts[f"text_encoder{last}"] = t5() if has_t5 else (None, None)
        if kind in ("sd3", "flux"):
            dynamic = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
            options = {"shift": 3.0} if kind == "sd3" else dynamic
            parts["scheduler"] = diffusers.FlowMatchEulerDiscreteScheduler(**options)
            parts["vae"] = autoencoder(scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False)
        else:
            options = {"beta_start": 1e-4, "beta_end": 0.02, "timestep_spacing": "trailing", "clip_sample": False}
            parts["scheduler"] = diffusers.DDIMScheduler(**options)
            parts["vae"] = autoencoder()
        whole = getattr(diffusers, pipeline_name)(**parts)
    whole.save_pretrained(folder, max_shard_size="20KB" if shards else "5GB")
    return folder


def single_file(kind: str, path: Path) -> None:
    """The weights of a tiny pipeline in one file, by the names that Stability AI's own code gives them.

    The names are those that diffusers' conversion script to that format writes.
    """
    folder = pipeline(kind)
    tensors = {f"model.diffusion_model.{_ldm_unet(name, kind)}": x for name, x in _weights(folder / "unet").items()}
    tensors |= {f"first_stage_model.{_ldm_vae(name)}": x for name, x in _weights(folder / "vae").items()}
    for name, x in list(tensors.items()):
        if name.startswith("first_stage_model") and ".attn_1." in name and x.ndim == 2:
            tensors[name] = x[:, :, None, None].contiguous()
    first = {name.removeprefix("text_model."): x for name, x in _weights(folder / "text_encoder").items()}
    if kind == "sd2":
        tensors |= _open_clip(first, "cond_stage_model.model.")
    else:
        prefix = {"sd15": "cond_stage_model.transformer", "sdxl": "conditioner.embedders.0.transformer"}[kind]
        tensors |= {f"{prefix}.text_model.{name}": x for name, x in first.items()}
    if kind == "sdxl":
        second = {name.removeprefix("text_model."): x for name, x in _weights(folder / "text_encoder_2").items()}
        tensors |= _open_clip(second, "conditioner.embedders.1.model.")
    save_file(tensors, path, {"format": "pt"})


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def _ldm_unet(name: str, kind: str) -> str:
    """`down_blocks.1.resnets.0.norm1.weight` → `input_blocks.3.0.in_layers.0.weight`."""
    outer = {
        "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
    }  # fmt: skip
    for theirs, ours in outer.items():
        if name.startswith(f"{theirs}."):
            return name.replace(theirs, ours, 1)
    resnet = {
        "norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection",
    }  # fmt: skip
    block, *rest = name.split(".")
    if block == "mid_block":
        part, number, *inner = rest
        place = f"middle_block.{1 if part == 'attentions' else 2 * int(number)}"
    else:
        level, part, number, *inner = rest
        layers = UNETS[kind]["layers_per_block"]
        attends = (
            "CrossAttn" in UNETS[kind]["down_block_types" if block == "down_blocks" else "up_block_types"][int(level)]
        )
        if block == "down_blocks":
            if part == "downsamplers":
                return f"input_blocks.{(int(level) + 1) * (layers + 1)}.0.op.{inner[-1]}"
            place = f"input_blocks.{int(level) * (layers + 1) + int(number) + 1}.{int(part == 'attentions')}"
        else:
            if part == "upsamplers":
                return f"output_blocks.{int(level) * (layers + 1) + layers}.{1 + attends}.conv.{inner[-1]}"
            place = f"output_blocks.{int(level) * (layers + 1) + int(number)}.{int(part == 'attentions')}"
    if part == "resnets":
        inner[0] = resnet[inner[0]]
    return ".".join([place, *inner])


def _ldm_vae(name: str) -> str:
    """`encoder.down_blocks.1.resnets.0.norm1.weight` → `encoder.down.1.block.0.norm1.weight`."""
    levels = 4
    name = re.sub(r"decoder\.up_blocks\.(\d)", lambda found: f"decoder.up.{levels - 1 - int(found[1])}", name)
    name = name.replace("down_blocks", "down").replace("conv_norm_out", "norm_out")
    name = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    name = name.replace("mid_block.attentions.0", "mid.attn_1").replace(".resnets.", ".block.")
    for theirs, ours in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
        name = name.replace(f"attn_1.{theirs}.", f"attn_1.{ours}.")
    return name.replace("conv_shortcut", "nin_shortcut")


def _open_clip(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """A text encoder by the names of OpenCLIP, which keeps q, k and v in one tensor."""
    found: dict[str, torch.Tensor] = {}
    for name, x in weights.items():
        if "self_attn.q_proj" in name:
            joined = [weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")]
            key = name.replace("encoder.layers", "transformer.resblocks").replace("self_attn.q_proj.", "attn.in_proj_")
            found[key] = torch.cat(joined)
        elif "_proj." in name and ("k_proj" in name or "v_proj" in name):
            continue
        elif name == "text_projection.weight":
            found["text_projection"] = x.T.contiguous()
        elif name == "embeddings.position_embedding.weight":
            found["positional_embedding"] = x
        else:
            for theirs, ours in {
                "embeddings.token_embedding": "token_embedding", "encoder.layers": "transformer.resblocks",
                "self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2",
                "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj", "final_layer_norm": "ln_final",
            }.items():  # fmt: skip
                name = name.replace(theirs, ours)
            found[name] = x
    return {f"{prefix}{name}": x for name, x in found.items()}
