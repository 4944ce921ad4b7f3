"""What a batch of a dataset is for the network: x, and the condition.

Pixels and classes as they are; or latents of an autoencoder, and the tokens of captions. Random numbers are those of
the update, so that x is the same however many processes compute it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdiff.data.batches import Batch
from vdiff.models.autoencoder import Autoencoder
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import LATENTS, PIXEL_CODEC
from vdiff.models.components import check_components
from vdiff.models.condition import TIME_IDS, TOKENS, Condition, Signature
from vdiff.models.tokenizing import Tokenizers
from vdiff.training.random_numbers import POSTERIOR, UpdateRandom


class Inputs:
    """Pixels, and classes where the network takes them."""

    def x(self, batch: Batch, device: torch.device, random: UpdateRandom) -> Tensor:
        """x (B, C, …) of a batch, on the device."""
        del random
        return PIXEL_CODEC.encode(batch.images.to(device, non_blocking=True))

    def condition(self, batch: Batch, takes: Signature) -> Condition:
        """The condition of a batch, with its null."""
        return takes.condition(classes=batch.classes)


@dataclass(frozen=True)
class TextInputs(Inputs):
    """Captions as tokens, and draws from the posterior of the autoencoder, or pixels where there is none."""

    tokenizers: Tokenizers
    autoencoder: Autoencoder | None

    def x(self, batch: Batch, device: torch.device, random: UpdateRandom) -> Tensor:
        """Latents mean + std · noise, the noise from (seed, update, image)."""
        if self.autoencoder is None:
            return super().x(batch, device, random)
        mean, std = self.autoencoder.encode(batch.images.to(device, non_blocking=True))
        return self.autoencoder.sample(mean, std, random.normal(mean.shape[1:], POSTERIOR))

    def condition(self, batch: Batch, takes: Signature) -> Condition:
        """Tokens, and for Stable Diffusion XL the sizes of image, crop and target; an image without caption has ""."""
        count, _, height, width = batch.images.shape
        tokens = self.tokenizers.tokens(batch.captions or [""] * count)
        sizes = batch.sizes
        if sizes is None:
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(count, 6)
        return takes.condition(**{TOKENS: tokens, TIME_IDS: sizes})


def inputs_of(description: CheckpointConfig, device: torch.device) -> Inputs:
    """What a batch is for the network of a checkpoint.

    Raises:
        VdiffError: tokenizers or autoencoder are missing, or are not those of the model.
    """
    if TOKENS not in description.signature.names:
        return Inputs()
    folder = Path(check_components(description.components)["path"])
    is_latent = description.codec == LATENTS.name
    return TextInputs(Tokenizers.read(folder), Autoencoder.read(folder, device) if is_latent else None)
