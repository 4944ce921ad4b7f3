"""The conditions of the images that a run draws of itself, to show and to compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vdiff.data.batches import decode
from vdiff.data.store import ImageStore
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import from_uint8
from vdiff.models.condition import IMAGE, Condition
from vdiff.models.denoiser import Denoiser
from vdiff.models.drawing import Conditions, classes_in_turn
from vdiff.training.dataset import TrainingData
from vdiff.training.sample_prompts import SamplePrompts

MAX_CONDITIONS = 64


@dataclass(frozen=True)
class ConditionImages:
    """Condition images (N, C, H, W) in [−1, 1], which samples take in turn, with the classes in turn."""

    images: Tensor

    def __call__(self, denoiser: Denoiser, indices: Sequence[int]) -> Condition:
        """The condition of the images `indices`."""
        rows = self.images[[k % len(self.images) for k in indices]]
        return classes_in_turn(denoiser, indices).with_tensors(**{IMAGE: rows})


def sample_conditions(
    description: CheckpointConfig, images: TrainingData, prompts: SamplePrompts | None = None
) -> Conditions:
    """The conditions of samples: prompts, or condition images of the dataset, or the classes in turn.

    Condition images are spread over the dataset; those of a class-conditional model are of images of the classes in
    turn.
    """
    if prompts is not None:
        return prompts.condition
    store, num_classes = images.store, description.signature.num_classes
    if IMAGE not in description.signature.names or not isinstance(store, ImageStore):
        return classes_in_turn
    labels = [store.label(k) or 0 for k in range(len(store))] if num_classes else [0] * len(store)
    of_class = [np.flatnonzero(np.array(labels) == label) for label in range(max(num_classes, 1))]
    size, channels = description.shape[-1], description.shape[0]
    count = min(len(store), -(-MAX_CONDITIONS // len(of_class)) * len(of_class))
    found = []
    for k in range(count):
        own = of_class[k % len(of_class)]
        own = own if len(own) else np.arange(len(store))  # a class without an image
        place = k // len(of_class) * len(own) * len(of_class) // count
        number = int(own[min(place, len(own) - 1)])
        found.append(decode(store.condition(size, number), channels, size, f"{store.path}: condition {number}"))
    return ConditionImages(from_uint8(torch.from_numpy(np.stack(found))))
