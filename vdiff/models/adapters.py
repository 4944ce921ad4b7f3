"""LoRA by peft: low-rank changes to layers of a network whose own weights are frozen.

A layer with weight W computes (W + (alpha/rank)·B A) x with A (rank, in) and B (out, rank); B is zero at first. The
checkpoint holds only A and B. Source: Hu et al. 2022, *LoRA: Low-Rank Adaptation of Large Language Models*.
Functions import torch and peft, so that `config.json` can be read without them.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from vdiff.errors import OptionError, VdiffError

if TYPE_CHECKING:
    from torch import nn

    from vdiff.models.backbone import Backbone

ATTENTION, LINEAR, CONV = "attention", "linear", "conv"
"""Names of groups of layers: the attention projections, all linear layers, all convolutions."""
ENCODERS = "text_encoders."
ENCODER_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The prefix of text encoders in a network, and the ends of the names of their layers with a LoRA."""
MAX_RANK = 2**12
OWN_NAME = re.compile(r"(?<=\.lora_[AB]\.)default\.")
"""The part that peft adds to the name of a weight, `LAYER.lora_A.default.weight`; files omit it."""


@dataclass(frozen=True)
class AdapterSettings:
    """Settings of a LoRA, as in `config.json`.

    Attributes:
        rank, alpha: the layer adds (alpha/rank)·B A to its weight; B A has this rank.
        dropout: probability of dropping an input of A in training.
        targets: suffixes of names of layers ("to_q", "to_out.0"), or `ATTENTION`, `LINEAR`, `CONV`.
        text_encoder: whether the attention projections of the text encoders have a LoRA, too.
    """

    rank: Annotated[int, Meta(ge=1, le=MAX_RANK)]
    alpha: Annotated[float, Meta(gt=0, le=2**20)]
    dropout: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    targets: tuple[str, ...] = (ATTENTION,)
    text_encoder: bool = False

    @property
    def changes_text_encoders(self) -> bool:
        """Whether text encoders have a LoRA: by the setting, or by the names of their layers."""
        return self.text_encoder or any(target.startswith(ENCODERS) for target in self.targets)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {**asdict(self), "targets": list(self.targets)}


def adapted_layers(network: Backbone, settings: AdapterSettings) -> list[str]:
    """The names of the layers that get a LoRA, in the order of the network.

    Raises:
        OptionError: a target matches no layer, or there is no text encoder.
    """
    from torch import nn

    layers: dict[str, nn.Module] = {}
    for name, module in network.named_modules():
        inside = isinstance(module, nn.MultiheadAttention)  # it uses the weights of its layers without calling them
        kinds = () if inside else (nn.Linear, nn.Conv1d, nn.Conv2d)
        layers |= {f"{name}.{own}".lstrip("."): child for own, child in module.named_children() if type(child) in kinds}
    own = {name: layer for name, layer in layers.items() if not name.startswith(ENCODERS)}
    words = {
        ATTENTION: {name for name in own if _ends(name, network.attention_layers)},
        LINEAR: {name for name, layer in own.items() if isinstance(layer, nn.Linear)},
        CONV: {name for name, layer in own.items() if not isinstance(layer, nn.Linear)},
    }
    found: set[str] = set()
    for target in settings.targets:
        some = layers if target.startswith(ENCODERS) else own
        more = words.get(target) or {name for name in some if _ends(name.replace("text_model.", ""), (target,))}
        if not more:
            known = sorted({name.rpartition(".")[2] for name in own if not name.rpartition(".")[2].isdigit()})
            raise OptionError(
                f"--lora_targets {target}: no layer of the network is called so",
                f"give {ATTENTION}, {LINEAR}, {CONV}, or ends of names: {', '.join(known[:8])}, …",
            )
        found |= more
    if settings.text_encoder:
        unused = tuple(f"{name}." for name in network.unused_layers)
        parts = (name for name in layers if name.startswith(ENCODERS) and not name.startswith(unused))
        found |= {name for name in parts if _ends(name, ENCODER_LAYERS)}
    return [name for name in layers if name in found]


def _ends(name: str, ends: tuple[str, ...]) -> bool:
    return any(f".{name}".endswith(f".{end}") for end in ends)


def lora_library() -> Any:
    """The module peft.

    Raises:
        VdiffError: it is not installed.
    """
    try:
        import peft
    except ImportError:
        raise VdiffError("LoRA needs peft, which is not installed", "pip install 'vdiff[text]'") from None
    return peft


def add_adapter(network: Backbone, settings: AdapterSettings) -> None:
    """Give the network a LoRA that changes nothing yet, and freeze all other weights.

    Raises:
        VdiffError: peft is not installed.
        OptionError: a target matches no layer.
    """
    names = adapted_layers(network, settings)
    peft = lora_library()
    config = peft.LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules=names
    )
    peft.inject_adapter_in_model(config, network)


def copy_adapter(network: Backbone, settings: AdapterSettings, source: Backbone, of: AdapterSettings) -> None:
    """Give the LoRA of `network` the same product B A as that of `source`, whose rank may be smaller.

    The first rows of A and columns of B are those of `source`, B scaled by the quotient of the two alpha/rank; the
    other columns of B are zero.

    Args:
        settings, of: of the two LoRAs.

    Raises:
        OptionError: the LoRA of `source` has a larger rank, or layers that this one lacks.
    """
    import torch

    weights = {name: weight for name, weight in network.named_parameters() if is_adapter_weight(name)}
    values = {name: weight for name, weight in source.named_parameters() if is_adapter_weight(name)}
    if of.rank > settings.rank:
        raise OptionError(
            f"--lora_rank {settings.rank}: the LoRA of the teacher has rank {of.rank}", f"give --lora_rank {of.rank}"
        )
    if missing := [name for name in values if name not in weights]:
        layer = missing[0].partition(".lora_")[0]
        raise OptionError(
            f"--lora_targets {','.join(settings.targets)}: the LoRA of the teacher changes {layer} too",
            f"give --lora_targets {','.join(of.targets)}",
        )
    factor = (of.alpha / of.rank) / (settings.alpha / settings.rank)
    with torch.no_grad():
        for name, value in values.items():
            if ".lora_A." in name:
                weights[name][: of.rank] = value
            else:
                weights[name][:, : of.rank] = factor * value


def merge_adapter(network: nn.Module) -> None:
    """Add (alpha/rank)·B A to the weights, and replace peft's layers by plain ones."""
    lora_library()
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(network.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(network.get_submodule(parent), own, module.get_base_layer())
    vars(network).pop("peft_config", None)  # peft stores the configuration of the LoRA here


def is_adapter_weight(name: str) -> bool:
    """Whether a weight of this name belongs to a LoRA."""
    return ".lora_A." in name or ".lora_B." in name
