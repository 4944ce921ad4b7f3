"""Text-to-image networks: a UNet or transformer of diffusers and the text encoders of its prompts as one network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vdiff.models.backbone import Backbone
from vdiff.models.components import ENCODER_CLASSES, T5, text_libraries
from vdiff.models.condition import POOLED, TEXT, TEXT_MASK, TOKENS, Condition, Signature
from vdiff.models.diffusers_names import FLUX, PIXART, SD3, TEXT_UNET
from vdiff.models.wrapped import MAX_NUMBER, DiffusersBackbone, build_diffusers, diffusers_signature

ENCODER_FIELDS = (
    *("vocab_size", "hidden_size", "intermediate_size", "projection_dim", "num_hidden_layers", "num_attention_heads"),
    *("max_position_embeddings", "hidden_act", "layer_norm_eps", "attention_dropout"),
    *("pad_token_id", "bos_token_id", "eos_token_id"),
)
T5_FIELDS = (
    *("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "feed_forward_proj", "dropout_rate"),
    *("relative_attention_num_buckets", "relative_attention_max_distance", "layer_norm_epsilon"),
    *("pad_token_id", "eos_token_id"),
)
"""Fields of a text encoder's configuration that its output depends on: of CLIP, and of T5."""
CLIP, PROJECTED = ENCODER_CLASSES[:2]
TEXT_ENCODERS_OF = {SD3: (PROJECTED, PROJECTED, T5), FLUX: (CLIP, T5), PIXART: (T5,)}
"""The text encoders of transformers; SD3 also works without its last one."""
MAX_TOKENS, MAX_LAYERS = 4096, 256


class TextBackbone(Backbone):
    """A UNet or transformer conditioned on prompts, and the text encoders that compute its embeddings from tokens.

    The condition is `tokens` (B, n₁ + … + n_k) int64, the concatenated tokens of k tokenizers. Precomputed embeddings
    `text` (B, n, C), `text_pooled` (B, C) and `text_mask` (B, n) can replace them. Stable Diffusion XL also takes
    `time_ids` (B, 6): height and width of the original image, top and left of the crop, height and width of the target,
    of which a PixArt of 1024 pixels takes the last two. What the network receives as `text` and `text_pooled`:

        UNet without pooled embedding   the last hidden state of the text encoder; –
        Stable Diffusion XL             the last but one of each encoder, concatenated over channels; the last encoder's
        SD3                             those of both CLIPs, padded to the channels of T5, and then the hidden state of
                                        T5 (zeros without one), over tokens; those of both CLIPs
        FLUX                            the last hidden state of T5; CLIP's
        PixArt                          that of T5, where padding is masked (`text_mask`); –

    Attributes:
        unet: the network that takes the embeddings.
        text_encoders: one for each tokenizer, in the same order; frozen unless `own_text_encoders`.
        empty_tokens: (n₁ + … + n_k,) the tokens of the empty prompt, used if there is no prompt.
        zero_empty: the embeddings of the empty prompt are zeros (`force_zeros_for_empty_prompt` of XL).
        own_text_encoders: the checkpoint holds the weights of the text encoders; otherwise its components hold them.
        t5_length: tokens of a prompt for T5; 0 without one.
        classes, lengths: of each text encoder the class, and the tokens of a prompt.
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
        t5_length: int = 0,
    ) -> None:
        super().__init__()
        self.unet, self.text_encoders = unet, nn.ModuleList(text_encoders)
        self.empty_tokens, self.zero_empty = tuple(empty_tokens), zero_empty
        self.own_text_encoders, self.t5_length = own_text_encoders, t5_length
        self.classes = [type(encoder).__name__ for encoder in text_encoders]  # sharding changes them
        clips = [name for name in self.classes if name != T5]
        rest = len(self.empty_tokens) - t5_length * (len(clips) < len(self.classes))
        self.lengths = [t5_length if name == T5 else rest // len(clips) for name in self.classes]
        self.train_text_encoders(own_text_encoders)
        self.signature = text_signature(self.describe())

    @property
    def unused_layers(self) -> tuple[str, ...]:  # type: ignore[override]
        """For XL, the last layers of the first text encoder: their output is not the last but one hidden state."""
        if self.unet.class_name != TEXT_UNET or POOLED not in self.unet.signature.names:
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
            **({"t5_length": self.t5_length} if self.t5_length else {}),
        }

    def forward(self, z: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        with self.own_precision(z.device):
            tokens = condition.pop(TOKENS, None)
            known = {} if tokens is None else self.embed(tokens)
            output: Tensor = self.unet(z, timestep, **{**known, **condition})
            return output

    def embed(self, tokens: Tensor) -> dict[str, Tensor]:
        """`text`, `text_pooled` and `text_mask` of tokens (B, n₁ + … + n_k), those of them that the network takes."""
        name, found = self.unet.class_name, dict[str, Tensor]()
        is_early = POOLED in self.unet.signature.names and name != FLUX
        clip: list[Tensor] = []
        pooled: list[Tensor] = []
        encoders: Any = self.text_encoders
        for encoder, kind, numbers in zip(encoders, self.classes, tokens.split(self.lengths, dim=1), strict=True):
            if kind == T5:
                if name == PIXART:
                    found[TEXT_MASK] = numbers != encoder.config.pad_token_id
                found[TEXT] = encoder(input_ids=numbers, attention_mask=found.get(TEXT_MASK))[0]
            else:
                output = encoder(input_ids=numbers, output_hidden_states=is_early)
                clip.append(output.hidden_states[-2] if is_early else output[0])
                pooled.append(output.pooler_output if name == FLUX else output[0])
        if name == SD3:
            width = self.unet.settings["joint_attention_dim"]
            joined = torch.cat(clip, dim=-1)
            long = found.get(TEXT, joined.new_zeros(len(joined), self.t5_length, width))
            found[TEXT] = torch.cat([F.pad(joined, (0, width - joined.shape[-1])), long], dim=1)
            found[POOLED] = torch.cat(pooled, dim=-1)
        elif name == TEXT_UNET:
            found[TEXT] = torch.cat(clip, dim=-1)
        if is_early or name == FLUX:
            found.setdefault(POOLED, pooled[-1])
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
        lists = [[part for part in each.modules() if isinstance(part, nn.ModuleList)] for each in self.text_encoders]
        return self.unet.blocks() + [layer for parts in lists for layer in parts[0]]  # a block of T5 is a list, too

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
    name = type(encoder).__name__
    return {"class": name, "config": {field: getattr(config, field) for field in _fields_of(name)}}


def _fields_of(encoder: str) -> tuple[str, ...]:
    return T5_FIELDS if encoder == T5 else ENCODER_FIELDS


def text_signature(config: Mapping[str, Any]) -> Signature:
    """The inputs of a text-to-image network, from its `TextBackbone.describe`; no library is imported.

    Raises:
        ValueError, TypeError, KeyError: the values describe no such network.
    """
    unet, encoders, empty = diffusers_signature(config["unet"]), config["text_encoders"], config["empty_tokens"]
    if TEXT not in unet.names:
        raise ValueError(f"a {config['unet']['class']} takes no text")
    if not isinstance(encoders, list) or not 1 <= len(encoders) <= 3:
        raise ValueError("one to three text encoders are due")
    for encoder in encoders:
        if encoder["class"] not in ENCODER_CLASSES:
            raise ValueError(
                f"the text encoder is a {encoder['class']!r}, only {', '.join(ENCODER_CLASSES)} can be used"
            )
        if unknown := encoder["config"].keys() - set(_fields_of(encoder["class"])):
            raise ValueError(f"unknown field of a text encoder: {min(unknown)!r}")
        _check_encoder(encoder["config"])
    kinds, length = tuple(encoder["class"] for encoder in encoders), config.get("t5_length", 0)
    due = TEXT_ENCODERS_OF.get(config["unet"]["class"])
    if (due is None and T5 in kinds) or (due is not None and kinds not in (due, due[:2])):
        raise ValueError(f"a {config['unet']['class']} has other text encoders than {', '.join(kinds)}")
    if type(length) is not int or not bool(due) <= length <= MAX_TOKENS:
        raise ValueError(f"'t5_length' must be a whole number up to {MAX_TOKENS}")
    of_clip = len(empty) - length * (T5 in kinds) if isinstance(empty, list | tuple) else -1
    if not 1 <= len(empty) <= MAX_TOKENS or of_clip < 0 or of_clip % max(len(kinds) - kinds.count(T5), 1):
        raise ValueError(f"'empty_tokens' must be 1 to {MAX_TOKENS} numbers, the same count for each text encoder")
    if any(type(token) is not int or token < 0 for token in empty):
        raise ValueError("'empty_tokens' must be whole numbers from 0")
    names = (TOKENS, *unet.names)
    return Signature(unet.channels, unet.out_channels, names, {TOKENS: tuple(empty)}, 0, unet.size_multiple)


def _check_encoder(values: Mapping[str, Any]) -> None:
    """Refuse impossible numbers of layers and channels."""
    for name, value in values.items():
        limit = MAX_LAYERS if name in ("num_hidden_layers", "num_layers") else MAX_NUMBER
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
        settings = transformers.T5Config if encoder["class"] == T5 else transformers.CLIPTextConfig
        encoders.append(kind(settings(**encoder["config"])))
    options: dict[str, Any] = {key: bool(config.get(key, False)) for key in ("zero_empty", "own_text_encoders")}
    options |= {"empty_tokens": config["empty_tokens"], "t5_length": config.get("t5_length", 0)}
    return TextBackbone(build_diffusers(config["unet"]), encoders, **options)
