"""What a safetensors file of Stable Diffusion says of itself: families, and metadata that other programs read.

The keys `modelspec.…` are those of Stability AI's model metadata standard 1.0.0. The keys `ss_…` are those of kohya's
scripts; A1111 hides a LoRA whose `ss_base_model_version` is not that of the model in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import LATENTS
from vdiff.models.diffusers_names import diffusers_part
from vdiff.models.kinds import TEXT

SPEC = "modelspec."
STEPS, SAMPLER, ZERO_SNR = "vdiff.num_timesteps", "vdiff.sampler", "vdiff.zero_snr"
GUIDANCE, LEARNED = "vdiff.guidance_scale", "vdiff.learned_guidance_scale"
"""Our own keys, for which there is no standard: the scale to sample with, and the one that a student has learned."""
MADE_BY = {"made_by": "vdiff"}
WORDS = {"eps": "epsilon", "v": "v", "x": "sample"}
"""Our names of predictions and those of `modelspec.prediction_type`."""
LATENT_FACTOR, SIDE = 8, 128
"""Pixels for each side of a latent, and the side of latents in FLUX's pipeline, whose network does not say it."""
USUAL_SCHEDULE = {"name": "scaled_linear", "num_levels": 1000, "first_beta": 0.00085, "last_beta": 0.012}
"""The schedule that ComfyUI and A1111 assume for every model of these families."""


@dataclass(frozen=True)
class Family:
    """A family of Stable Diffusion.

    Attributes:
        architecture: its `modelspec.architecture`.
        code: its `modelspec.implementation`, if the tensors have their original names.
        kohya: its `ss_base_model_version`.
        width: channels of the text that the UNet takes.
        channels: channels of the first level of the UNet.
        pipeline: its class in diffusers.
        hub: a pipeline of the hub, from which diffusers takes the configuration of a single file.
        hub_prediction: what that pipeline's scheduler is set to.
    """

    name: str
    architecture: str
    code: str
    kohya: str
    width: int
    channels: int
    pipeline: str
    hub: str
    hub_prediction: str


SD1 = Family(
    "Stable Diffusion 1.5", "stable-diffusion-v1", "https://github.com/CompVis/stable-diffusion", "sd_v1", 768, 320,
    "StableDiffusionPipeline", "stable-diffusion-v1-5/stable-diffusion-v1-5", "eps",
)  # fmt: skip
SD2 = Family(
    "Stable Diffusion 2", "stable-diffusion-v2-512", "https://github.com/Stability-AI/stablediffusion", "sd_v2", 1024,
    320, "StableDiffusionPipeline", "stabilityai/stable-diffusion-2-1", "v",
)  # fmt: skip
SDXL = Family(
    "Stable Diffusion XL", "stable-diffusion-xl-v1-base", "https://github.com/Stability-AI/generative-models",
    "sdxl_base_v1-0", 2048, 320, "StableDiffusionXLPipeline", "stabilityai/stable-diffusion-xl-base-1.0", "eps",
)  # fmt: skip
FAMILIES = (SD1, SD2, SDXL)


def family_of(config: CheckpointConfig) -> Family | None:
    """The family of a text-to-image model of latents, by the structure of its UNet; None for other models."""
    if config.kind != TEXT or config.codec != LATENTS.name or diffusers_part(config.network_config) != "unet":
        return None
    unet = config.network_config["unet"]["config"]
    if unet.get("addition_embed_type") == "text_time":
        return SDXL
    return SD2 if unet.get("use_linear_projection") else SD1


def is_student(config: CheckpointConfig) -> bool:
    """Whether a model was distilled: it has its guidance inside, and its number of steps is fixed."""
    return config.method != "base"


def guidance_hint(config: CheckpointConfig) -> str:
    """`exactly 4 steps, trailing timesteps, guidance scale 0 in diffusers, CFG 1 in ComfyUI and A1111`.

    Diffusers' pipelines give a network that takes the weight of guidance their guidance scale − 1.
    """
    if not is_student(config):
        return "trailing timesteps"
    steps = f"exactly {config.num_timesteps} step{'s' * (config.num_timesteps > 1)}"
    if config.guidance_range:
        low, high = (weight + 1 for weight in config.guidance_range)
        return f"{steps}, trailing timesteps, guidance scale {low:g} to {high:g} in diffusers"
    return f"{steps}, trailing timesteps, guidance scale 0 in diffusers, CFG 1 in ComfyUI and A1111"


def metadata_of(
    config: CheckpointConfig, title: str, *, license_name: str | None, implementation: str | None = None
) -> dict[str, str]:
    """The metadata of an exported file.

    Args:
        title: the name of the model.
        license_name: an identifier; None: unknown.
        implementation: whose names the tensors have; None: those of the family's original code.
    """
    family, is_lora = family_of(config), config.adapter is not None
    prediction, zero_snr = WORDS.get(config.prediction, config.prediction), bool(config.schedule.get("zero_snr"))
    found = {"format": "pt", **MADE_BY, f"{SPEC}prediction_type": prediction, ZERO_SNR: _flag(zero_snr)}
    if is_student(config):
        found |= {STEPS: str(config.num_timesteps), SAMPLER: "ddim, trailing timesteps", GUIDANCE: "1"}
    if config.guidance_scale:
        found[LEARNED] = f"{config.guidance_scale:g}"
    if family is not None:
        height, width = (LATENT_FACTOR * size for size in config.shape[1:])
        found |= {
            f"{SPEC}sai_model_spec": "1.0.0",
            f"{SPEC}architecture": architecture_of(family, config.prediction) + ("/lora" if is_lora else ""),
            f"{SPEC}implementation": implementation or family.code,
            f"{SPEC}title": title,
            f"{SPEC}resolution": f"{width}x{height}",
            f"{SPEC}usage_hint": guidance_hint(config),
            **({f"{SPEC}license": license_name} if license_name else {}),
        }
    if config.adapter is not None and family is not None:
        found |= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": str(config.adapter.rank),
            "ss_network_alpha": f"{config.adapter.alpha:g}",
            "ss_base_model_version": family.kohya,
            "ss_v2": _flag(family is SD2),
            "ss_v_parameterization": _flag(config.prediction == "v"),
            "ss_zero_terminal_snr": _flag(zero_snr),
        }
    return found


def _flag(value: bool) -> str:
    """A truth value as kohya's scripts write it."""
    return "True" if value else "False"


def architecture_of(family: Family, prediction: str | None) -> str:
    """The `modelspec.architecture` of a model; that of Stable Diffusion 2 depends on what it predicts."""
    return "stable-diffusion-v2-768-v" if family is SD2 and prediction == "v" else family.architecture


def differs_from_usual(schedule: Mapping[str, Any]) -> bool:
    """Whether a schedule has other noise levels than ComfyUI and A1111 assume, apart from zero terminal SNR."""
    return any(schedule.get(key) != value for key, value in USUAL_SCHEDULE.items())
