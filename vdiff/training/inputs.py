"""From a batch of a dataset to the inputs of the network: x and the condition.

A network gets pixels and classes, or latents of an autoencoder and the tokens of captions. The random numbers are those
of the update, so x is the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from vdiff.data.batches import Batch
from vdiff.data.encoded import ENCODE, EncodedStore, encoded_folder
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError
from vdiff.models.autoencoder import Autoencoder
from vdiff.models.checkpoint import CheckpointConfig
from vdiff.models.codec import LATENTS, PIXEL_CODEC
from vdiff.models.components import check_components
from vdiff.models.condition import CLASSES, IMAGE, TIME_IDS, TOKENS, Condition, Signature
from vdiff.models.prompting import Prompting, has_surroundings
from vdiff.reporting import Reporter
from vdiff.training.dataset import TrainingData, no_conditions
from vdiff.training.random_numbers import POSTERIOR, UpdateRandom


class Inputs:
    """Pixels, and classes and condition images where the network takes them."""

    def x(self, batch: Batch, device: torch.device, random: UpdateRandom) -> Tensor:
        """x (B, C, …) of a batch, on the device."""
        del random
        return PIXEL_CODEC.encode(batch.images.to(device, non_blocking=True))

    def condition(self, batch: Batch, takes: Signature) -> Condition:
        """The condition of a batch, with its null.

        Raises:
            VdiffError: the network takes a condition image, and the batch has none.
        """
        image = None if batch.conditions is None else PIXEL_CODEC.encode(batch.conditions)
        if IMAGE in takes.names and image is None:
            raise no_conditions("the data")
        return takes.condition(**{CLASSES: batch.classes, IMAGE: image})


@dataclass(frozen=True)
class TextInputs(Inputs):
    """Tokens of the captions or classes, and draws from the posterior of the autoencoder; without one, pixels.

    If the dataset was encoded (`vdiff data encode`), latents and embeddings replace pictures and captions.

    Attributes:
        empty: the embeddings of the empty caption, if there are embeddings.
    """

    prompting: Prompting
    empty: Mapping[str, Tensor] = field(default_factory=dict)

    def x(self, batch: Batch, device: torch.device, random: UpdateRandom) -> Tensor:
        """Latents mean + std · noise, the noise from (seed, update, image)."""
        if batch.latents is not None:
            mean, std = (values.to(device, non_blocking=True) for values in batch.latents)
        elif self.prompting.autoencoder is None:
            return super().x(batch, device, random)
        else:
            mean, std = self.prompting.autoencoder.encode(batch.images.to(device, non_blocking=True))
        return Autoencoder.sample(mean, std, random.normal(mean.shape[1:], POSTERIOR))

    def condition(self, batch: Batch, takes: Signature) -> Condition:
        """Tokens, and for Stable Diffusion XL the sizes of image, crop and target; a missing caption is ""."""
        if self.prompting.tokenizers is None:
            return super().condition(batch, takes)
        count, _, height, width = batch.images.shape
        sizes = batch.sizes
        if sizes is None:
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32).expand(count, 6)
        if batch.embeddings is not None:
            condition = takes.condition(**batch.embeddings, **{TIME_IDS: sizes})
            return replace(condition, null={**condition.null, **self.empty})
        tokens = self.prompting.tokenizers.tokens(batch.captions or [""] * count)
        return takes.condition(**{TOKENS: tokens, TIME_IDS: sizes})


def encoded_of(images: TrainingData, description: CheckpointConfig, reporter: Reporter) -> EncodedStore | None:
    """The latents and embeddings that `vdiff data encode` wrote for a dataset; None: it wrote none.

    Raises:
        VdiffError: they are incomplete, or of other images, captions, autoencoders or text encoders.
    """
    store = images.store
    if TOKENS not in description.signature.names or not isinstance(store, ImageStore):
        return None
    folder = encoded_folder(store)
    if not folder.exists():
        return None
    if description.has_own_text_encoders:
        raise VdiffError(
            f"{folder} has text embeddings, and the text encoders of this model learn or have learned",
            "remove the folder, or leave --train_text_encoder out",
        )
    encoded = EncodedStore(store)
    if encoded.key.components != (description.components or {}).get("fingerprint"):
        raise VdiffError(
            f"{folder} is of another autoencoder or other text encoders than those of the base",
            f"encode again: {ENCODE} {store.path} --base CHECKPOINT --overwrite; or remove the folder",
        )
    reporter.line(f"latents and text embeddings of {folder}")
    return encoded


def inputs_of(
    description: CheckpointConfig, device: torch.device, encoded: EncodedStore | None = None, vae: str = ""
) -> Inputs:
    """The object that turns batches into the inputs of a checkpoint's network.

    Args:
        encoded: the source of latents and embeddings of batches.
        vae: the folder of another autoencoder than the model's own.

    Raises:
        VdiffError: tokenizers or autoencoder are missing, or are not those of the model.
    """
    if not has_surroundings(description):
        return Inputs()
    empty = {} if encoded is None else {name: rows[0] for name, rows in encoded.embeddings([""]).items()}
    return TextInputs(Prompting.read(description, device, vae=Path(vae) if vae else None), empty)


def vae_of(description: CheckpointConfig, vae: str = "") -> Path | None:
    """The folder of the autoencoder of a checkpoint's samples; None: they are pixels.

    Args:
        vae: the folder of another autoencoder than the model's own.
    """
    if description.codec != LATENTS.name:
        return None
    return Path(vae or check_components(description.components)["path"])
