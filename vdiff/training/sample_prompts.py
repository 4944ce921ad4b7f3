"""The prompts or classes of samples in training, of the checks of students, and of the comparison of a ladder."""

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
from vdiff.models.drawing import classes_in_turn
from vdiff.models.prompting import Prompting, has_surroundings
from vdiff.reporting import Reporter
from vdiff.training.config import LoopConfig
from vdiff.training.dataset import TrainingData
from vdiff.training.inputs import Inputs, TextInputs

CAPTIONS, CAPTIONS_SHOWN = 64, 8


@dataclass(frozen=True)
class SamplePrompts:
    """Prompts that images take in turn, and what turns them into tokens and latents into pictures.

    Attributes:
        texts: empty for a model without prompts, whose images have classes in turn.
    """

    prompting: Prompting
    texts: Sequence[str]

    def condition(self, denoiser: Denoiser, indices: Sequence[int]) -> Condition:
        """The condition of the images `indices`."""
        if not self.texts:
            return classes_in_turn(denoiser, indices)
        takes = denoiser.network.signature.names
        return self.prompting.condition(takes, [self.texts[k % len(self.texts)] for k in indices])

    def decode(self, latents: Tensor) -> Tensor:
        """The pictures of latents, which may be bad."""
        return torch.cat([self.prompting.decode(part, check=False) for part in latents.split(1)])


def texts_of(config: LoopConfig, images: TrainingData, count: int = CAPTIONS) -> list[str]:
    """The prompts of --sample_prompts, else `count` captions of the dataset or prompts to learn from.

    Raises:
        OptionError: the file cannot be read or has no prompt.
    """
    if config.sample_prompts:
        return read_prompts(Path(config.sample_prompts), "--sample_prompts")
    found = [text for _, text in some_captions(images.store, count)] if images.store else images.prompts[:count]
    return list(found) or [""]


def prompts_of_ladder(
    config: LoopConfig, description: CheckpointConfig, images: TrainingData, device: torch.device
) -> SamplePrompts | None:
    """The prompts of the checks and of the comparison of a ladder; None: a model of neither prompts nor latents.

    Raises:
        OptionError: the file of --sample_prompts cannot be read or has no prompt.
        VdiffError: the components of the model cannot be read.
    """
    if not has_surroundings(description):
        return None
    texts = texts_of(config, images) if TOKENS in description.signature.names else ()
    return SamplePrompts(Prompting.read(description, device), texts)


def prompts_of_run(
    config: LoopConfig, images: TrainingData, inputs: Inputs, reporter: Reporter
) -> SamplePrompts | None:
    """The prompts of a run's samples; a line for each that is too long. None: a model of neither prompts nor latents.

    Raises:
        OptionError: the file of --sample_prompts cannot be read or has no prompt.
    """
    if not isinstance(inputs, TextInputs):
        return None
    texts = texts_of(config, images, CAPTIONS_SHOWN) if inputs.prompting.tokenizers else ()
    for note in inputs.prompting.notes(texts):
        reporter.line(note)
    return SamplePrompts(inputs.prompting, texts)
