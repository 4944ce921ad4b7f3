"""The kinds of networks that a checkpoint may name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from vdiff.errors import VdiffError, suggestion
from vdiff.models.backbone import Backbone, Signature
from vdiff.models.unet import UNet, UNetConfig
from vdiff.models.wrapped import PythonBackbone, build_diffusers, diffusers_signature, python_signature

UNET, DIFFUSERS, PYTHON = "unet", "diffusers", "python"


@dataclass(frozen=True)
class NetworkKind:
    """How a network of a kind is built from the `config` of a checkpoint, and what it takes."""

    build: Callable[[Mapping[str, Any]], Backbone]
    signature: Callable[[Mapping[str, Any]], Signature]


def _needs_module(config: Mapping[str, Any]) -> Backbone:
    raise VdiffError(
        f"these are the weights of a network in Python, {config.get('class')}: its code is not in the folder",
        "load it in Python, with vdiff.load(FOLDER, network=...)",
    )


KINDS: dict[str, NetworkKind] = {
    UNET: NetworkKind(
        lambda config: UNet(UNetConfig.from_dict(config)), lambda config: UNetConfig.from_dict(config).signature
    ),
    DIFFUSERS: NetworkKind(build_diffusers, diffusers_signature),
    PYTHON: NetworkKind(_needs_module, python_signature),
}


def kind_of(name: str) -> NetworkKind:
    """The kind of a name.

    Raises:
        ValueError: there is none.
    """
    if name not in KINDS:
        raise ValueError(f"unknown kind of network {name!r}; {suggestion(name, KINDS)}")
    return KINDS[name]


def build_network(kind: str, config: Mapping[str, Any], module: nn.Module | None = None) -> Backbone:
    """A network with fresh weights, or `module` for a kind that has its code outside.

    Raises:
        VdiffError: the kind needs a module, or a library that is not installed.
        ValueError, TypeError, KeyError: values that do not fit together.
    """
    if kind == PYTHON and module is not None:
        return module if isinstance(module, Backbone) else PythonBackbone(module, python_signature(config))
    return kind_of(kind).build(config)
