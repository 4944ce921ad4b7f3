"""Text-to-image networks: a UNet of diffusers and the text encoders of its prompts as one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vdiff.models.backbone import Backbone
from vdiff.models.components import ENCODER_CLASSES, text_libraries
from vdiff.models.condition import POOLED, TEXT, TOKENS, Condition, Signature
from vdiff.models.wrapped import MAX_NUMBER, DiffusersBackbone, build_diffusers, diffusers_signature

ENCODER_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
"""Fields of a text encoder's configuration that its output depends on."""
MAX_TOKENS, MAX_LAYERS = 4096, 256


class TextBackbone(Backbone):
    """A UNet conditioned on prompts, and the text encoders that compute its embeddings from tokens.

    The condition is `tokens` (B, k·77) int64, the concatenated tokens of k tokenizers. Precomputed embeddings `text`
    (B, 77, C) and `text_pooled` (B, C) can replace them. Stable Diffusion XL also takes `time_ids` (B, 6): height and
    width of the original image, top and left of the crop, height and width of the target.
    The embedding is the last hidden state of the text encoder. If the UNet takes a pooled embedding (XL), it is the
    last but one hidden state of each text encoder, concatenated over channels; the last encoder computes the pooled
    embedding.

    Attributes:
        unet: takes the embeddings.
        text_encoders: one for each tokenizer, in the same order; frozen unless `own_text_encoders`.
        empty_tokens: (k·77,) the tokens of the empty prompt, used if there is no prompt.
        zero_empty: the embeddings of the empty prompt are zeros (`force_zeros_for_empty_prompt` of XL).
        own_text_encoders: the checkpoint holds the weights of the text encoders; otherwise its components hold them.
    """

    kind = "text"
    attention_layers = DiffusersBackbone.attention_layers

    def __init__(
        self,
        unet: DiffusersBackbone,
        text_encoders: Sequence[nn.Module],
        *,
        empty_tokens: Sequence[int],
        zero_empty: bool = False,
        own_text_encoders: bool = False,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoders = unet, nn.ModuleList(text_encoders)
        self.empty_tokens, self.zero_empty = tuple(empty_tokens), zero_empty
        self.own_text_encoders = own_text_encoders
        self.train_text_encoders(own_text_encoders)
        self.signature = text_signature(self.describe())

    @property
    def unused_layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """For XL, the last layers of the first text encoder: their output is not the last but one hidden state."""
        if POOLED not in self.unet.signature.names:
            return ()
        config: Any = self.text_encoders[0].config
        last = f"layers.{config.num_hidden_layers - 1}"
        return tuple(
            f"text_encoders.{name}"
            for name, _ in self.text_encoders[:-1].named_modules()
            if name.endswith((last, "final_layer_norm"))
        )

    def train_text_encoders(self, value: bool = True) -> None:
        """Train the weights of the text encoders, or freeze them; those of `unused_layers` are always frozen."""
        self.text_encoders.requires_grad_(value)
        for name in self.unused_layers:
            self.get_submodule(name).requires_grad_(False)

    def describe(self) -> dict[str, Any]:
        """The UNet, the text encoders, and the tokens of the empty prompt."""
        return {
            "unet": self.unet.describe(),
            "text_encoders": [_described(encoder) for encoder in self.text_encoders],
            "empty_tokens": list(self.empty_tokens),
            "zero_empty": self.zero_empty,
            "own_text_encoders": self.own_text_encoders,
        }

    def forward(self, z: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        with self.own_precision(z.device):
            tokens = condition.pop(TOKENS, None)
            known = {} if tokens is None else self.embed(tokens)
            output: Tensor = self.unet(z, timestep, **{**known, **condition})
            return output

    def embed(self, tokens: Tensor) -> dict[str, Tensor]:
        """The embeddings of tokens (B, k·77): `text` (B, 77, C), and `text_pooled` (B, C) if the UNet takes it."""
        is_pooled, hidden, pooled = POOLED in self.unet.signature.names, [], None
        for encoder, numbers in zip(self.text_encoders, tokens.chunk(len(self.text_encoders), dim=1), strict=True):
            output = encoder(input_ids=numbers, output_hidden_states=is_pooled)
            hidden.append(output.hidden_states[-2] if is_pooled else output[0])
            pooled = output[0]
        found = {TEXT: torch.cat(hidden, dim=-1), **({POOLED: pooled} if is_pooled and pooled is not None else {})}
        if self.zero_empty:
            is_empty = (tokens == tokens.new_tensor(self.empty_tokens)).all(dim=1)
            found = {name: x.masked_fill(is_empty.reshape(-1, *[1] * (x.ndim - 1)), 0) for name, x in found.items()}
        return found

    def encode(self, condition: Condition) -> Condition:
        """The condition with embeddings instead of tokens; its null condition is encoded too.

        Equal prompts are encoded once. A condition without tokens is returned unchanged.
        """
        if (tokens := condition.tensors.get(TOKENS)) is None:
            return condition
        null = torch.as_tensor(condition.null.get(TOKENS, self.empty_tokens)).to(tokens)
        rows, places = torch.cat([tokens, null[None]]).unique(dim=0, return_inverse=True)
        known = {name: values[places] for name, values in self.embed(rows).items()}
        tensors = {name: tensor for name, tensor in condition.tensors.items() if name != TOKENS}
        nulls = {name: value for name, value in condition.null.items() if name != TOKENS}
        return Condition(
            {**{name: values[:-1] for name, values in known.items()}, **tensors},
            {**nulls, **{name: values[-1] for name, values in known.items()}},
        )

    def blocks(self) -> list[nn.Module]:
        """The blocks of the UNet and the layers of the text encoders."""
        layers = [part for part in self.text_encoders.modules() if isinstance(part, nn.ModuleList)]
        return self.unet.blocks() + [layer for part in layers[1:] for layer in part]

    @property
    def output_layer(self) -> nn.Module | None:
        """The last projection of the UNet."""
        return self.unet.output_layer

    @property
    def checkpointing(self) -> bool:
        """Whether diffusers' own gradient checkpointing is on in the UNet."""
        return self.unet.checkpointing

    @checkpointing.setter
    def checkpointing(self, value: bool) -> None:
        """Switch it on or off."""
        self.unet.checkpointing = value


def _described(encoder: nn.Module) -> dict[str, Any]:
    """A text encoder's class and configuration."""
    config: Any = encoder.config
    return {"class": type(encoder).__name__, "config": {name: getattr(config, name) for name in ENCODER_FIELDS}}


def text_signature(config: Mapping[str, Any]) -> Signature:
    """The inputs of a text-to-image network, from its `TextBackbone.describe`; no library is imported.

    Raises:
        ValueError, TypeError, KeyError: the values describe no such network.
    """
    unet, encoders, empty = diffusers_signature(config["unet"]), config["text_encoders"], config["empty_tokens"]
    if TEXT not in unet.names:
        raise ValueError(f"a {config['unet']['class']} takes no text")
    if not isinstance(encoders, list) or not 1 <= len(encoders) <= 2:
        raise ValueError("one or two text encoders are due")
    for encoder in encoders:
        if encoder["class"] not in ENCODER_CLASSES:
            raise ValueError(
                f"the text encoder is a {encoder['class']!r}, only {', '.join(ENCODER_CLASSES)} can be used"
            )
        if encoder["config"].keys() - set(ENCODER_FIELDS):
            raise ValueError(
                f"unknown field of a text encoder: {min(encoder['config'].keys() - set(ENCODER_FIELDS))!r}"
            )
        _check_encoder(encoder["config"])
    if not isinstance(empty, list | tuple) or not 1 <= len(empty) <= MAX_TOKENS or len(empty) % len(encoders):
        raise ValueError(f"'empty_tokens' must be 1 to {MAX_TOKENS} numbers, the same count for each text encoder")
    if any(type(token) is not int or token < 0 for token in empty):
        raise ValueError("'empty_tokens' must be whole numbers from 0")
    names = (TOKENS, *unet.names)
    return Signature(unet.channels, unet.out_channels, names, {TOKENS: tuple(empty)}, 0, unet.size_multiple)


def _check_encoder(values: Mapping[str, Any]) -> None:
    """Refuse impossible numbers of layers and channels."""
    for name, value in values.items():
        limit = MAX_LAYERS if name == "num_hidden_layers" else MAX_NUMBER
        if type(value) is int and not 0 <= value <= limit:
            raise ValueError(f"{name} of a text encoder is {value}, 0 to {limit} are due")


def build_text(config: Mapping[str, Any]) -> TextBackbone:
    """The network, with new weights.

    Raises:
        VdiffError: diffusers or transformers is not installed.
        ValueError, TypeError, KeyError: values that do not fit together.
    """
    text_signature(config)
    with text_libraries():
        import transformers
    encoders = []
    for encoder in config["text_encoders"]:
        kind = getattr(transformers, encoder["class"])
        encoders.append(kind(transformers.CLIPTextConfig(**encoder["config"])))
    options = {key: bool(config.get(key, False)) for key in ("zero_empty", "own_text_encoders")}
    return TextBackbone(build_diffusers(config["unet"]), encoders, empty_tokens=config["empty_tokens"], **options)
