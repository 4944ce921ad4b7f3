"""Networks whose code is not part of vdiff, used unchanged: a user's own module, and classes of diffusers."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.errors import VdiffError, suggestion
from vdiff.models.backbone import Backbone
from vdiff.models.condition import CLASSES, GUIDANCE, POOLED, TEXT, TEXT_MASK, TIME_IDS, Signature
from vdiff.models.diffusers_names import DIT, FLUX, PIXART, SD3, TEXT_UNET

CLASSES_OF_DIFFUSERS = ("UNet2DModel", DIT, TEXT_UNET, PIXART, SD3, FLUX, "UNet1DModel")
"""The classes of diffusers that may be used."""
MAX_NUMBER = 2**20
"""Far above any number in the description of an existing network."""


class PythonBackbone(Backbone):
    """A user's own module: module(z, timestep, **condition) → output. A checkpoint holds only its weights."""

    kind = "python"

    def __init__(self, model: nn.Module, signature: Signature) -> None:
        super().__init__()
        self.model, self.signature = model, signature

    def forward(self, z: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        with self.own_precision(z.device):
            return self.evaluate(z, timestep, condition)

    def evaluate(self, z: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The output of the module itself."""
        output: Tensor = self.model(z, timestep, **condition)
        return output

    def describe(self) -> dict[str, Any]:
        """The name of its class, which is compared when a checkpoint is loaded, and its signature."""
        takes, kind = self.signature, type(self.model)
        values = {"channels": takes.channels, "out_channels": takes.out_channels, "names": list(takes.names)}
        values |= {"null": dict(takes.null), "num_classes": takes.num_classes, "size_multiple": takes.size_multiple}
        return {"class": f"{kind.__module__}.{kind.__qualname__}", "signature": values}

    def blocks(self) -> list[nn.Module]:
        """The members of the module's lists of modules."""
        return [block for part in self.model.children() if isinstance(part, nn.ModuleList) for block in part]


class DiffusersBackbone(PythonBackbone):
    """A network of diffusers, of one of the classes `CLASSES_OF_DIFFUSERS`.

    Conditions have vdiff's names (`classes`, `text`, …). If the network has twice as many output channels as samples
    have, and `drops_variance` is set, the second half, a learned variance, is omitted. A DiT never drops classes by
    itself; the training does.
    """

    kind = "diffusers"
    attention_layers = (
        *("to_q", "to_k", "to_v", "to_out.0", "query", "key", "value", "proj_attn"),
        *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),  # of the text, in SD3 and FLUX
    )

    def __init__(self, model: nn.Module, *, null_class: bool = False, drops_variance: bool = False) -> None:
        self.class_name = type(model).__name__
        self.options = {"null_class": null_class, "drops_variance": drops_variance}
        super().__init__(model, diffusers_signature(self._description(model)))
        for part in model.modules():
            if type(part).__name__ == "LabelEmbedding":
                vars(part)["dropout_prob"] = 0.0
        if self.class_name == DIT:
            model.get_submodule("proj_out_2").register_forward_hook(_as_patches)

    def _description(self, model: nn.Module) -> dict[str, Any]:
        config: Any = model.config
        known = inspect.signature(type(model).__init__).parameters  # files of other versions have more
        values = {key: value for key, value in dict(config).items() if key in known}
        described: dict[str, Any] = json.loads(json.dumps({"class": self.class_name, **self.options, "config": values}))
        return described

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration of the network, by diffusers' names."""
        config: Any = self.model.config
        return dict(config)

    def describe(self) -> dict[str, Any]:
        """The class and its configuration."""
        return self._description(self.model)

    def evaluate(self, z: Tensor, timestep: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """The `sample` of its output."""
        given = {name: value.to(z.dtype) if value.is_floating_point() else value for name, value in condition.items()}
        config: Any = self.model.config
        is_flux = self.class_name == FLUX
        arguments = _flux_arguments(z, given, config) if is_flux else _arguments(self.class_name, given, config)
        if (channels := config.get("time_cond_proj_dim")) and GUIDANCE in condition:
            arguments["timestep_cond"] = guidance_embedding(condition[GUIDANCE], channels).to(z.dtype)
        received = F.pixel_unshuffle(z, 2).flatten(2).transpose(1, 2) if is_flux else z  # (B, H·W/4, 4·C)
        output: Tensor = self.model(received, timestep=timestep, **arguments, return_dict=False)[0]
        if self.class_name == DIT:
            output = _joined(output, z)
        if is_flux:
            output = F.pixel_shuffle(output.transpose(1, 2).unflatten(2, (z.shape[2] // 2, z.shape[3] // 2)), 2)
        return output[:, : z.shape[1]] if self.options["drops_variance"] else output

    @property
    def output_layer(self) -> nn.Module | None:
        """The last projection."""
        names = ("conv_out", "proj_out_2", "proj_out")
        return next((self.model.get_submodule(name) for name in names if hasattr(self.model, name)), None)

    @property
    def checkpointing(self) -> bool:
        """Whether diffusers' own gradient checkpointing is on."""
        return bool(getattr(self.model, "is_gradient_checkpointing", False))

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        """Switch it on or off."""
        model: Any = self.model
        if value and not self.checkpointing:
            model.enable_gradient_checkpointing()
        elif self.checkpointing and not value:
            model.disable_gradient_checkpointing()


def guidance_embedding(weight: Tensor, channels: int) -> Tensor:
    """The embedding of weights w (B,) in pipelines of diffusers: (B, channels), sines and cosines of 1000 w f_i.

    f_i = 10⁴^(−i/(h − 1)), i = 0 … h − 1, h = channels/2. It is `get_guidance_scale_embedding` of the scale less 1.
    """
    half = channels // 2
    frequencies = torch.exp(torch.arange(half, device=weight.device) * (-math.log(10000.0) / (half - 1)))
    angles = 1000.0 * weight.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def _as_patches(module: nn.Module, inputs: object, tokens: Tensor) -> Tensor:
    """A DiT arranges its tokens as a square; as images of one patch each they keep their order (B·N, 1, …)."""
    del module, inputs
    return tokens.reshape(-1, 1, tokens.shape[-1])


def _joined(patches: Tensor, z: Tensor) -> Tensor:
    """Patches (B·N, C, p, p), row by row, as images (B, C, H, W) of the size of z."""
    _, channels, p, _ = patches.shape
    rows, columns = z.shape[-2] // p, z.shape[-1] // p
    grid = patches.reshape(-1, rows, columns, channels, p, p)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, rows * p, columns * p)


def _arguments(name: str, condition: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions by vdiff's names → arguments by the names of diffusers."""
    if name in ("UNet2DModel", DIT):
        return {"class_labels": condition.get(CLASSES)}
    if name == "UNet1DModel":
        return {}
    if name == SD3:
        return {"encoder_hidden_states": condition.get(TEXT), "pooled_projections": condition.get(POOLED)}
    added: dict[str, Any] = {"text_embeds": condition.get(POOLED), "time_ids": condition.get(TIME_IDS)}
    added = {key: value for key, value in added.items() if value is not None}
    if name == PIXART:
        sizes = condition.get(TIME_IDS)
        added = {"resolution": None, "aspect_ratio": None}
        if sizes is not None:  # height and width of the picture
            added = {"resolution": sizes[:, 4:], "aspect_ratio": sizes[:, 4:5] / sizes[:, 5:]}
    return {
        "encoder_hidden_states": condition.get(TEXT),
        "encoder_attention_mask": condition.get(TEXT_MASK),
        "added_cond_kwargs": added or None,
        **({"class_labels": condition[CLASSES]} if config.get("num_class_embeds") and CLASSES in condition else {}),
    }


def _flux_arguments(z: Tensor, condition: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Any]:
    """Those of FLUX: also the places of tokens, (0, row, column) and 0 for text, and the scale of guidance, w + 1."""
    rows, columns = (torch.arange(size // 2, device=z.device, dtype=z.dtype) for size in z.shape[2:])
    row, column = torch.meshgrid(rows, columns, indexing="ij")
    text = condition.get(TEXT)
    arguments = {
        **_arguments(SD3, condition, config),
        "img_ids": torch.stack([torch.zeros_like(row), row, column], dim=-1).flatten(0, 1),
        "txt_ids": z.new_zeros(0 if text is None else text.shape[1], 3),
    }
    if config["guidance_embeds"]:
        arguments["guidance"] = condition.get(GUIDANCE, z.new_zeros(len(z))) + 1
    return arguments


def diffusers_signature(config: Mapping[str, Any]) -> Signature:
    """The inputs of a network of diffusers, from its `DiffusersBackbone.describe`; diffusers itself is not needed.

    Raises:
        ValueError, TypeError: the class is not allowed, or the values describe no network.
    """
    if (name := config.get("class")) not in CLASSES_OF_DIFFUSERS:
        raise ValueError(
            f"the class {name!r} of diffusers cannot be used; {suggestion(str(name), CLASSES_OF_DIFFUSERS)}"
        )
    values = config["config"]
    _check_numbers(values)
    channels = int(values["in_channels"])
    out_channels = channels if config.get("drops_variance") else int(values.get("out_channels") or channels)
    is_dit, is_text = name == DIT, name in (TEXT_UNET, PIXART)
    classes = int(values.get("num_embeds_ada_norm" if is_dit else "num_class_embeds") or 0)
    is_unet = "block_out_channels" in values
    null: dict[str, float] = {CLASSES: classes} if is_dit else {}
    if classes and config.get("null_class") and not is_dit:  # the last row of the table is "no class"
        classes, null = classes - 1, {CLASSES: classes - 1}
    names = (CLASSES,) * bool(classes and name != PIXART)
    if name in (SD3, FLUX):
        names += (TEXT, POOLED) + (GUIDANCE,) * bool(values.get("guidance_embeds"))
    if is_text:
        names += (TEXT, TEXT_MASK) + (POOLED, TIME_IDS) * (values.get("addition_embed_type") == "text_time")
        names += (TIME_IDS,) * (name == PIXART and takes_sizes(values))
        names += (GUIDANCE,) * bool(values.get("time_cond_proj_dim"))
    halvings = len(values["block_out_channels"]) - (name != "UNet1DModel") if is_unet else 0
    multiple = 2**halvings if is_unet else int(values.get("patch_size") or 1)
    if name == FLUX:  # a token is a square of 2 × 2
        channels, out_channels, multiple = channels // 4, out_channels // 4, 2
    return Signature(channels, out_channels, names, null if classes else {}, classes, multiple)


def takes_sizes(values: Mapping[str, Any]) -> bool:
    """Whether a PixArt takes the height and the width of the picture; by default that of 1024 pixels does."""
    said = values.get("use_additional_conditions")
    return bool(values.get("sample_size", 128) == 128 if said is None else said)


def _check_numbers(values: Any) -> None:
    """Refuse impossible numbers of blocks and channels."""
    for value in values.values() if isinstance(values, dict) else values if isinstance(values, list | tuple) else ():
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise ValueError(f"{value} is more than any network has")
        _check_numbers(value)


def build_diffusers(config: Mapping[str, Any]) -> DiffusersBackbone:
    """The network, with new weights.

    Raises:
        VdiffError: diffusers is not installed.
        ValueError, TypeError: values that do not fit together.
    """
    diffusers_signature(config)
    try:
        import diffusers
    except ImportError:
        raise VdiffError("this network is one of diffusers, which is not installed", "pip install diffusers") from None
    model = getattr(diffusers, config["class"]).from_config(dict(config["config"]))
    options = {key: bool(config.get(key, False)) for key in ("null_class", "drops_variance")}
    return DiffusersBackbone(model, **options)


def wrapped(network: nn.Module, signature: Signature, **options: bool) -> Backbone:
    """A backbone of any module: a backbone itself, a class of diffusers, or a user's own module with this `signature`.

    Args:
        options: of `DiffusersBackbone`.
    """
    if type(network) is PythonBackbone:  # it may be wrapped again with another signature
        network = network.model
    if isinstance(network, Backbone):
        return network
    kind = type(network)
    is_theirs = kind.__module__.startswith("diffusers.") and kind.__name__ in CLASSES_OF_DIFFUSERS
    return DiffusersBackbone(network, **options) if is_theirs else PythonBackbone(network, signature)
