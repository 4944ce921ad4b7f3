"""The prompts of pictures that a run draws of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vdiff.data.datasets import some_captions
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.condition import TOKENS, Condition
from vdiff.models.denoiser import Denoiser
from vdiff.models.prompting import Prompting
from vdiff.training.dataset import TrainingData

CAPTIONS = 64


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts that images take in turn, and what turns them into tokens and latents into pictures."""

    prompting: Prompting
    texts: Sequence[str]

    def condition(self, denoiser: Denoiser, indices: Sequence[int]) -> Condition:
        """The condition of the images `indices`."""
        takes = denoiser.network.signature.names
        return self.prompting.condition(takes, [self.texts[k % len(self.texts)] for k in indices])

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures of latents, which may be bad."""
        return torch.cat([self.prompting.decode(part, check=False) for part in latents.split(1)])


def sample_prompts(description: CheckpointConfig, images: TrainingData, device: torch.device) -> SamplePrompts | None:
    """Captions of a dataset or prompts to learn from, for a text-to-image model; None for any other model.

    Raises:
        VdiffError: the components of the model cannot be read.
    """
    if TOKENS not in description.signature.names:
        return None
    texts = list(images.prompts[:CAPTIONS])
    if images.store:
        texts = [text for _, text in some_captions(images.store, CAPTIONS)]
    return SamplePrompts(Prompting.read(description, device), texts or [""])
