"""Conversions around the sampling loop: prompts to tokens, and latents to pictures."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vdiff.models.autoencoder import Autoencoder, picture_shape
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import LATENTS
from vdiff.models.components import check_components
from vdiff.models.condition import TIME_IDS, TOKENS, Condition
from vdiff.models.tokenizing import Tokenizers


def drawn_shape(config: CheckpointConfig, folder: Path) -> tuple[int, ...]:
    """(C, H, W) of the images that a model generates; the autoencoder in `folder` decodes latents.

    Raises:
        VdiffError: there is no autoencoder for these latents.
    """
    if config.codec != LATENTS.name:
        return config.shape
    channels, height, width = config.shape
    return picture_shape((channels, height, width), folder)


def has_surroundings(config: CheckpointConfig) -> bool:
    """Whether `Prompting` is needed around the network: it takes prompts, or its latents have an autoencoder."""
    return TOKENS in config.signature.names or (config.codec == LATENTS.name and config.components is not None)


SHOWN_LETTERS = 21
"""Letters of a prompt in a line of 80."""


@dataclass(frozen=True)
class Prompting:
    """The tokenizers and the autoencoder of a model of text or latents.

    Attributes:
        tokenizers: None for a model without prompts, as a DiT of classes.
        shape: (3, H, W) of its pictures.
        autoencoder: None for a model of pixels.
    """

    tokenizers: Tokenizers | None
    shape: tuple[int, ...]
    autoencoder: Autoencoder | None

    @classmethod
    def read(
        cls,
        config: CheckpointConfig,
        device: str | torch.device = "cpu",
        *,
        components: Path | None = None,
        vae: Path | None = None,
    ) -> Prompting:
        """Read both from the folder of a model's components.

        Args:
            components: a folder to use instead of the one that the model names.
            vae: the folder of another autoencoder.

        Raises:
            VdiffError: a folder is missing, or its fingerprint is not that of the model.
        """
        folder = Path(check_components(config.components, components)["path"])
        decoder = Autoencoder.read(vae or folder, device) if config.codec == LATENTS.name else None
        takes_prompts = TOKENS in config.signature.names
        tokenizers = Tokenizers.read(folder, config.network_config) if takes_prompts else None
        return cls(tokenizers, drawn_shape(config, vae or folder), decoder)

    def condition(self, takes: Sequence[str], prompts: Sequence[str], negative_prompt: str = "") -> Condition:
        """The condition for uncropped pictures.

        Args:
            takes: the names of conditions that the network takes.
            negative_prompt: guidance moves away from it; "" is the empty prompt of the training.
        """
        assert self.tokenizers is not None
        tokens = self.tokenizers.tokens([*prompts, negative_prompt])
        height, width = self.shape[1:]
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(len(prompts), 6)
        known = {TOKENS: tokens[:-1], **({TIME_IDS: sizes} if TIME_IDS in takes else {})}
        return Condition(known, {TOKENS: tokens[-1]})

    def notes(self, prompts: Sequence[str]) -> list[str]:
        """A line about each prompt that is too long for the text encoders: its beginning, and that of what is cut."""
        if self.tokenizers is None:
            return []
        shorten = partial(textwrap.shorten, width=SHOWN_LETTERS, placeholder=" …")
        cut = [(prompt, self.tokenizers.cut(prompt)) for prompt in prompts]
        longest = self.tokenizers.length
        return [
            f"prompt {shorten(prompt)!r}: {shorten(end)!r} is cut off ({longest} tokens)" for prompt, end in cut if end
        ]

    def decode(self, x: Tensor, *, check: bool = True) -> Tensor:
        """The pictures (B, 3, H, W) of a sampled batch, in [−1, 1] and on the CPU.

        Args:
            check: whether to refuse pictures that are black or not finite; intermediate predictions may be.

        Raises:
            VdiffError: a picture is not finite, or black.
        """
        if self.autoencoder is None:
            return x.clamp(-1, 1)
        return self.autoencoder.decode(x, check=check).cpu()
