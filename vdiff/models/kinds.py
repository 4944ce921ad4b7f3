"""The kinds of networks that a checkpoint may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from vdiff.errors import VdiffError, suggestion
from vdiff.models.backbone import Backbone, Signature
from vdiff.models.unet import UNet, UNetConfig
from vdiff.models.wrapped import PythonBackbone, build_diffusers, diffusers_signature, python_signature

UNET, DIFFUSERS, PYTHON = "unet", "diffusers", "python"


def _needs_module(config: Mapping[str, Any]) -> Backbone:
    raise VdiffError(
        f"these are the weights of a network in Python, {config.get('class')}: its code is not in the folder",
        "load it in Python, with vdiff.load(FOLDER, network=...)",
    )


BUILD: dict[str, Callable[[Mapping[str, Any]], Backbone]] = {
    UNET: lambda config: UNet(UNetConfig.from_dict(config)),
    DIFFUSERS: build_diffusers,
    PYTHON: _needs_module,
}
SIGNATURE: dict[str, Callable[[Mapping[str, Any]], Signature]] = {
    UNET: lambda config: UNetConfig.from_dict(config).signature,
    DIFFUSERS: diffusers_signature,
    PYTHON: python_signature,
}
"""How a network of a kind is built from the `config` of a checkpoint, and what it takes."""


def signature_of(kind: str, config: Mapping[str, Any]) -> Signature:
    """What a network takes and answers.

    Raises:
        ValueError, TypeError, KeyError: no such kind, or values that describe no network.
    """
    if kind not in SIGNATURE:
        raise ValueError(f"unknown kind of network {kind!r}; {suggestion(kind, SIGNATURE)}")
    return SIGNATURE[kind](config)


def build_network(kind: str, config: Mapping[str, Any], module: nn.Module | None = None) -> Backbone:
    """A network with fresh weights, or `module` for a kind that has its code outside.

    Raises:
        VdiffError: the kind needs a module, or a library that is not installed.
        ValueError, TypeError, KeyError: values that do not fit together.
    """
    if kind == PYTHON and module is not None:
        return module if isinstance(module, Backbone) else PythonBackbone(module, python_signature(config))
    signature_of(kind, config)
    return BUILD[kind](config)
