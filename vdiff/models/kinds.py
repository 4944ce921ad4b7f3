"""The kinds of networks that a checkpoint may name; torch is imported when a network is built or wrapped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from vdiff.errors import VdiffError, suggestion
from vdiff.models.condition import Signature
from vdiff.models.edm2_config import Edm2Config
from vdiff.models.image_v1_config import ImageV1Config
from vdiff.models.lucid_config import LucidConfig
from vdiff.models.song_config import SongConfig
from vdiff.models.unet_config import UNetConfig

if TYPE_CHECKING:
    from torch import nn

    from vdiff.models.backbone import Backbone

UNET, SONG, EDM2, LUCIDRAINS, IMAGE_V1 = "unet", "song", "edm2", "lucidrains", "image_v1"
DIFFUSERS, TEXT, PYTHON = "diffusers", "text", "python"


def _needs_module(config: Mapping[str, Any]) -> Backbone:
    raise VdiffError(
        f"these are the weights of a network in Python, {config.get('class')}: its code is not in the folder",
        "load it in Python, with vdiff.load(FOLDER, network=...)",
    )


def python_signature(config: Mapping[str, Any]) -> Signature:
    """The signature that `PythonBackbone.describe` described.

    Raises:
        ValueError, TypeError: the values describe no signature.
    """
    values = dict(config["signature"])
    return Signature(**{**values, "names": tuple(values["names"])})


def _diffusers_signature(config: Mapping[str, Any]) -> Signature:
    from vdiff.models.wrapped import diffusers_signature

    return diffusers_signature(config)


def _text_signature(config: Mapping[str, Any]) -> Signature:
    from vdiff.models.text import text_signature

    return text_signature(config)


def _build_unet(config: Mapping[str, Any]) -> Backbone:
    from vdiff.models.unet import UNet

    return UNet(UNetConfig.from_dict(config))


def _build_song(config: Mapping[str, Any]) -> Backbone:
    from vdiff.models.song_unet import SongUNet

    return SongUNet(SongConfig.from_dict(config))


def _build_edm2(config: Mapping[str, Any]) -> Backbone:
    from vdiff.models.edm2_unet import Edm2UNet

    return Edm2UNet(Edm2Config.from_dict(config))


def _build_lucidrains(config: Mapping[str, Any]) -> Backbone:
    from vdiff.models.lucid_unet import LucidUNet

    return LucidUNet(LucidConfig.from_dict(config))


def _build_image_v1(config: Mapping[str, Any]) -> Backbone:
    from vdiff.models.image_v1_unet import ImageV1UNet

    return ImageV1UNet(ImageV1Config.from_dict(config))


def _build_diffusers(config: Mapping[str, Any]) -> Backbone:
    from vdiff.models.wrapped import build_diffusers

    return build_diffusers(config)


def _build_text(config: Mapping[str, Any]) -> Backbone:
    from vdiff.models.text import build_text

    return build_text(config)


BUILD: dict[str, Callable[[Mapping[str, Any]], Backbone]] = {
    UNET: _build_unet,
    SONG: _build_song,
    EDM2: _build_edm2,
    LUCIDRAINS: _build_lucidrains,
    IMAGE_V1: _build_image_v1,
    DIFFUSERS: _build_diffusers,
    TEXT: _build_text,
    PYTHON: _needs_module,
}
SIGNATURE: dict[str, Callable[[Mapping[str, Any]], Signature]] = {
    UNET: lambda config: UNetConfig.from_dict(config).signature,
    SONG: lambda config: SongConfig.from_dict(config).signature,
    EDM2: lambda config: Edm2Config.from_dict(config).signature,
    LUCIDRAINS: lambda config: LucidConfig.from_dict(config).signature,
    IMAGE_V1: lambda config: ImageV1Config.from_dict(config).signature,
    DIFFUSERS: _diffusers_signature,
    TEXT: _text_signature,
    PYTHON: python_signature,
}
"""For each kind: how a network is built from the `config` of a checkpoint, and its signature."""


def signature_of(kind: str, config: Mapping[str, Any]) -> Signature:
    """The inputs and outputs of a network.

    Raises:
        ValueError, TypeError, KeyError: the kind is unknown, or the values describe no network.
    """
    if kind not in SIGNATURE:
        raise ValueError(f"unknown kind of network {kind!r}; {suggestion(kind, SIGNATURE)}")
    return SIGNATURE[kind](config)


def build_network(kind: str, config: Mapping[str, Any], module: nn.Module | None = None) -> Backbone:
    """A network with new weights; `module` itself for a kind whose code is not part of vdiff.

    Raises:
        VdiffError: the kind needs a module, or a library that is not installed.
        ValueError, TypeError, KeyError: values that do not fit together.
    """
    if kind == PYTHON and module is not None:
        from vdiff.models.backbone import Backbone
        from vdiff.models.wrapped import PythonBackbone

        return module if isinstance(module, Backbone) else PythonBackbone(module, python_signature(config))
    signature_of(kind, config)
    return BUILD[kind](config)
