"""Names of classes of diffusers: networks that may stand alone, or in a text-to-image network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

DIT, TEXT_UNET, PIXART = "DiTTransformer2DModel", "UNet2DConditionModel", "PixArtTransformer2DModel"
SD3, FLUX = "SD3Transformer2DModel", "FluxTransformer2DModel"


def diffusers_class(config: Mapping[str, Any]) -> str:
    """The class of a network of diffusers, alone or with text encoders; empty for other networks."""
    return str(config.get("unet", config).get("class", ""))


def diffusers_part(config: Mapping[str, Any]) -> str:
    """What pipelines of diffusers call a network: "transformer" or "unet"."""
    return "transformer" if diffusers_class(config) in (DIT, PIXART, SD3, FLUX) else "unet"
