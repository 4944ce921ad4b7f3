"""The prompts of pictures that a run draws of itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from vdiff.data.captions import read_prompts
from vdiff.data.datasets import some_captions
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.condition import TOKENS, Condition
from vdiff.models.denoiser import Denoiser
from vdiff.models.prompting import Prompting
from vdiff.reporting import Reporter
from vdiff.training.config import TrainConfig
from vdiff.training.dataset import TrainingData
from vdiff.training.inputs import Inputs, TextInputs

CAPTIONS, CAPTIONS_SHOWN = 64, 8


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


def prompts_of_run(
    config: TrainConfig, images: TrainingData, inputs: Inputs, reporter: Reporter
) -> SamplePrompts | None:
    """The prompts of a run's samples; a line for each that is too long. None: the network takes no prompts.

    Raises:
        OptionError: the file of --sample_prompts cannot be read or has no prompt.
    """
    if not isinstance(inputs, TextInputs):
        return None
    if config.sample_prompts:
        texts = read_prompts(Path(config.sample_prompts), "--sample_prompts")
    else:
        texts = [text for _, text in some_captions(images.store, CAPTIONS_SHOWN)] if images.store else []
    for note in inputs.prompting.notes(texts):
        reporter.line(note)
    return SamplePrompts(inputs.prompting, texts or [""])
