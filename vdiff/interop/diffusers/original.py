"""The original names of Stable Diffusion's tensors, from those of diffusers and transformers, and A1111's YAML.

model.diffusion_model.                the UNet, by the names of CompVis' code
first_stage_model.                    the autoencoder
cond_stage_model.transformer.         the text encoder of 1.5, by the names of transformers
cond_stage_model.model.               that of 2, by the names of OpenCLIP
conditioner.embedders.0.transformer.  the first text encoder of XL, conditioner.embedders.1.model. the second one
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vdiff.interop.modelspec import SD1, SD2, Family

UNET, VAE = "model.diffusion_model.", "first_stage_model."
OUTER = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
VAE_PARTS = {
    "down_blocks": "down", "conv_norm_out": "norm_out", "downsamplers.0": "downsample", "upsamplers.0": "upsample",
    "mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2", "mid_block.attentions.0": "mid.attn_1",
    "resnets": "block", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v",
    "to_out.0": "proj_out",
}  # fmt: skip
OPEN_CLIP = {
    "encoder.layers": "transformer.resblocks", "embeddings.token_embedding": "token_embedding",
    "embeddings.position_embedding.weight": "positional_embedding", "final_layer_norm": "ln_final",
    "layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")


def encoder_prefixes(family: Family) -> tuple[str, ...]:
    """The prefixes of the text encoders; those that end with `.model.` are named as in OpenCLIP."""
    if family is SD1:
        return ("cond_stage_model.transformer.text_model.",)
    if family is SD2:
        return ("cond_stage_model.model.",)
    return ("conditioner.embedders.0.transformer.text_model.", "conditioner.embedders.1.model.")


def original_names(
    family: Family,
    unet: Mapping[str, Tensor],
    config: Mapping[str, Any],
    encoders: Sequence[Mapping[str, Tensor]],
    autoencoder: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """All tensors of a model by their original names.

    Args:
        unet: those of the UNet by diffusers' names, `config` its configuration.
        encoders: those of each text encoder by the names of transformers.
        autoencoder: those of the autoencoder by diffusers' names.
    """
    places = dict(_unet_places(config))
    found = {f"{UNET}{_moved(name, places)}": tensor for name, tensor in unet.items()}
    found |= {f"{VAE}{name}": tensor for name, tensor in _autoencoder(autoencoder)}
    for prefix, weights in zip(encoder_prefixes(family), encoders, strict=True):
        plain = {name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
        named = _open_clip(plain) if prefix.endswith(".model.") else plain.items()
        found |= {f"{prefix}{name}": tensor for name, tensor in named}
    return found


def _moved(name: str, places: Mapping[str, str]) -> str:
    """A tensor's original name: the longest known beginning is replaced."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        if (place := places.get(".".join(parts[:count]))) is not None:
            return ".".join([place, *parts[count:]])
    raise ValueError(f"the original code has no tensor {name!r}")


def _unet_places(config: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Names of layers in diffusers' UNet and in the original one, whose blocks are numbered through."""
    yield from OUTER.items()
    per_level, levels = config["layers_per_block"], len(config["block_out_channels"])
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    yield "mid_block.attentions.0", "middle_block.1"
    for level in range(levels):
        for k in range(per_level + 1):
            place = level * (per_level + 1) + k
            resnets[f"down_blocks.{level}.resnets.{k}"] = f"input_blocks.{place + 1}.0"
            resnets[f"up_blocks.{level}.resnets.{k}"] = f"output_blocks.{place}.0"
            yield f"down_blocks.{level}.attentions.{k}", f"input_blocks.{place + 1}.1"
            yield f"up_blocks.{level}.attentions.{k}", f"output_blocks.{place}.1"
        last = (level + 1) * (per_level + 1)
        yield f"down_blocks.{level}.downsamplers.0.conv", f"input_blocks.{last}.0.op"
        behind = 2 if "CrossAttn" in config["up_block_types"][level] else 1
        yield f"up_blocks.{level}.upsamplers.0.conv", f"output_blocks.{last - 1}.{behind}.conv"
    for theirs, original in resnets.items():
        for inner, own in RESNET.items():
            yield f"{theirs}.{inner}", f"{original}.{own}"


def _autoencoder(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The autoencoder: levels of the decoder are numbered from the image, and attention is 1 × 1 convolutions."""
    levels = 1 + max(int(name.split(".")[2]) for name in weights if name.startswith("decoder.up_blocks."))
    for name, tensor in weights.items():
        for k in range(levels):
            if name.startswith(f"decoder.up_blocks.{k}."):
                name = name.replace(f"up_blocks.{k}", f"up.{levels - 1 - k}", 1)
                break
        for theirs, original in VAE_PARTS.items():
            name = f".{name}.".replace(f".{theirs}.", f".{original}.").strip(".")
        yield name, tensor[:, :, None, None] if ".attn_1." in name and tensor.ndim == 2 else tensor


def _open_clip(weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A text encoder by the names of OpenCLIP: q, k and v are one tensor, and the projection is transposed."""
    for name, tensor in weights.items():
        layer, _, part = name.partition(".self_attn.")
        if part.startswith(QKV[1:]):
            continue
        if part.startswith(QKV[0]):
            tensor = torch.cat([weights[f"{layer}.self_attn.{each}.{part.rpartition('.')[2]}"] for each in QKV])
            name = f"{layer}.attn.in_proj_{part.rpartition('.')[2]}"
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for theirs, original in OPEN_CLIP.items():
            name = name.replace(theirs, original)
        yield name, tensor


# The configuration that A1111 reads


def configuration(family: Family, unet: Mapping[str, Any], vae: Mapping[str, Any], *, is_v: bool) -> dict[str, Any]:
    """What A1111 builds a model from, in the file NAME.yaml beside NAME.safetensors.

    Args:
        unet, vae: configurations of diffusers.
        is_v: whether the model predicts v; the key `ztsnr` of the weights says whether it has zero terminal SNR.
    """
    widths, heads = unet["block_out_channels"], unet["attention_head_dim"]
    number = heads if isinstance(heads, int) else heads[0]
    attends = ["CrossAttn" in name for name in unet["down_block_types"]]
    network = {
        "image_size": 32, "in_channels": unet["in_channels"], "out_channels": unet["out_channels"],
        "model_channels": widths[0], "num_res_blocks": unet["layers_per_block"],
        "attention_resolutions": [2**level for level in reversed(range(len(widths))) if attends[level]],
        "channel_mult": [width // widths[0] for width in widths], "use_spatial_transformer": True,
        "context_dim": unet["cross_attention_dim"], "use_checkpoint": False, "legacy": False,
    }  # fmt: skip
    if family is SD1:
        network |= {"num_heads": number, "transformer_depth": 1}
    else:
        network |= {"num_head_channels": widths[0] // number, "use_linear_in_transformer": True}
    first_stage = {
        "embed_dim": vae["latent_channels"], "monitor": "val/rec_loss", "lossconfig": {"target": "torch.nn.Identity"},
        "ddconfig": {
            "double_z": True, "z_channels": vae["latent_channels"], "resolution": 256, "in_channels": 3, "out_ch": 3,
            "ch": vae["block_out_channels"][0], "num_res_blocks": vae["layers_per_block"], "attn_resolutions": [],
            "ch_mult": [width // vae["block_out_channels"][0] for width in vae["block_out_channels"]], "dropout": 0.0,
        },
    }  # fmt: skip
    if family in (SD1, SD2):
        return {"model": _ldm(family, network, first_stage, vae["scaling_factor"], is_v=is_v)}
    depths = unet["transformer_layers_per_block"]
    network |= {
        "transformer_depth": list(depths) if isinstance(depths, list | tuple) else [depths] * len(widths),
        "adm_in_channels": unet["projection_class_embeddings_input_dim"], "num_classes": "sequential",
        "spatial_transformer_attn_type": "softmax-xformers",
    }  # fmt: skip
    return {"model": _sgm(network, first_stage, vae["scaling_factor"], unet["addition_time_embed_dim"], is_v=is_v)}


def _ldm(
    family: Family, network: dict[str, Any], first_stage: dict[str, Any], scale: float, *, is_v: bool
) -> dict[str, Any]:
    """The model of CompVis' code, for 1.5 and 2."""
    text: dict[str, Any] = {"target": "ldm.modules.encoders.modules.FrozenCLIPEmbedder"}
    if family is SD2:
        network = {**network, "transformer_depth": 1}
        text = {
            "target": "ldm.modules.encoders.modules.FrozenOpenCLIPEmbedder",
            "params": {"freeze": True, "layer": "penultimate"},
        }
    return {
        "target": "ldm.models.diffusion.ddpm.LatentDiffusion",
        "params": {
            "parameterization": "v" if is_v else "eps", "linear_start": 0.00085, "linear_end": 0.012,
            "num_timesteps_cond": 1, "timesteps": 1000, "first_stage_key": "jpg", "cond_stage_key": "txt",
            "image_size": 64, "channels": network["in_channels"], "cond_stage_trainable": False,
            "conditioning_key": "crossattn", "scale_factor": scale, "use_ema": False,
            "unet_config": {"target": "ldm.modules.diffusionmodules.openaimodel.UNetModel", "params": network},
            "first_stage_config": {"target": "ldm.models.autoencoder.AutoencoderKL", "params": first_stage},
            "cond_stage_config": text,
        },
    }  # fmt: skip


def _sgm(
    network: dict[str, Any], first_stage: dict[str, Any], scale: float, time_channels: int, *, is_v: bool
) -> dict[str, Any]:
    """The model of Stability AI's code, for XL."""
    inside, kind = "sgm.modules.diffusionmodules", "V" if is_v else "Eps"
    encoders = [
        ("FrozenCLIPEmbedder", "txt", {"layer": "hidden", "layer_idx": 11}),
        (
            "FrozenOpenCLIPEmbedder2", "txt",
            {"arch": "ViT-bigG-14", "version": "laion2b_s39b_b160k", "freeze": True, "layer": "penultimate",
             "always_return_pooled": True, "legacy": False},
        ),
        *(
            ("ConcatTimestepEmbedderND", key, {"outdim": time_channels})
            for key in ("original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple")
        ),
    ]  # fmt: skip
    conditions = [
        {"is_trainable": False, "input_key": key, "target": f"sgm.modules.encoders.modules.{name}", "params": params}
        for name, key, params in encoders
    ]
    denoiser = {
        "num_idx": 1000, "weighting_config": {"target": f"{inside}.denoiser_weighting.{kind}Weighting"},
        "scaling_config": {"target": f"{inside}.denoiser_scaling.{kind}Scaling"},
        "discretization_config": {"target": f"{inside}.discretizer.LegacyDDPMDiscretization"},
    }  # fmt: skip
    return {
        "target": "sgm.models.diffusion.DiffusionEngine",
        "params": {
            "scale_factor": scale, "disable_first_stage_autocast": True,
            "denoiser_config": {"target": f"{inside}.denoiser.DiscreteDenoiser", "params": denoiser},
            "network_config": {"target": f"{inside}.openaimodel.UNetModel", "params": network},
            "conditioner_config": {"target": "sgm.modules.GeneralConditioner", "params": {"emb_models": conditions}},
            "first_stage_config": {
                "target": "sgm.models.autoencoder.AutoencoderKLInferenceWrapper", "params": first_stage,
            },
        },
    }  # fmt: skip
