"""The autoencoder of a text-to-image pipeline, which converts between pictures and latents; it is not trained."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.errors import VdiffError, explained
from vdiff.files import read_json
from vdiff.models.backbone import without_autocast
from vdiff.models.codec import from_uint8
from vdiff.models.components import VAE, text_libraries, weights_files

NAME = "AutoencoderKL"
PIXELS_AT_ONCE = 2**20
"""Pixels that are encoded or decoded at once: one picture of 1024 × 1024 needs gigabytes of memory."""
MAX_BLOCKS = 8
BLACK = -1 + 1 / 255
"""Values up to this one become 0 in a PNG file."""

REMEDY = "give --precision fp32; if that changes nothing, give another autoencoder with --vae FOLDER"


def picture_shape(latents: tuple[int, ...], folder: Path) -> tuple[int, int, int]:
    """The shape (3, H, W) that the autoencoder in a pipeline's folder decodes from latents (C, h, w).

    Raises:
        VdiffError: there is no autoencoder, or its latents have another number of channels.
    """
    place = _place(folder)
    values = read_json(place / "config.json", "copy or download it again")
    blocks = values.get("block_out_channels")
    if values.get("_class_name", NAME) != NAME or not isinstance(blocks, list) or not 1 <= len(blocks) <= MAX_BLOCKS:
        raise VdiffError(f"{place} holds a {values.get('_class_name')}", f"only an {NAME} can be read")
    if (channels := values.get("latent_channels", 4)) != latents[0]:
        raise VdiffError(
            f"{place} decodes latents of {channels} channels, and those of the model have {latents[0]}",
            "give the autoencoder of the same family of models",
        )
    factor = 2 ** (len(blocks) - 1)
    return values.get("out_channels", 3), latents[1] * factor, latents[2] * factor


def _place(folder: Path) -> Path:
    """`vae/` of a pipeline's folder, or the folder itself if it holds an autoencoder."""
    place = folder / VAE if (folder / VAE).is_dir() else folder
    if not (place / "config.json").is_file():
        raise VdiffError(f"{folder} holds no autoencoder", f"give a pipeline's folder, or its folder {VAE}")
    return place


def vae_weights(folder: Path) -> Path:
    """The weights file of the autoencoder in a pipeline's folder, or in its own folder.

    Raises:
        VdiffError: there are none.
    """
    return weights_files(_place(folder))[0][0]


class Autoencoder:
    """`AutoencoderKL` of diffusers: pictures (B, 3, H, W) ⇄ latents (B, C, H/8, W/8), scaled to a variance of about 1.

    latent = (output of the encoder − shift) · scale. It always computes in float32, also under autocast, because the
    autoencoder of Stable Diffusion XL gives NaN or black pictures in float16.

    Attributes:
        model: the network, whose weights are frozen.
        factor: height and width of a picture divided by those of its latents; 8 in Stable Diffusion.
        channels: of the latents.
    """

    def __init__(self, model: Any) -> None:
        self.model = model.float().eval().requires_grad_(False)
        config = model.config
        self.factor: int = 2 ** (len(config.block_out_channels) - 1)
        self.channels: int = config.latent_channels
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        shift = mean if mean is not None else [config.shift_factor or 0.0]
        scale = [config.scaling_factor / each for each in (std if std is not None else [1.0])]
        with torch.device("cpu"):
            self.shift, self.scale = (torch.tensor(values).reshape(1, -1, 1, 1) for values in (shift, scale))

    @classmethod
    def read(cls, folder: str | Path, device: str | torch.device = "cpu", *, weights: bool = True) -> Autoencoder:
        """The autoencoder in a pipeline's folder, or in its own folder.

        Args:
            weights: whether to read its weights; False: they are on the meta device.

        Raises:
            VdiffError: there is none, it cannot be read, or diffusers is not installed.
        """
        place = _place(Path(folder))
        _, variant = weights_files(place)
        with (
            text_libraries(),
            explained(f"{place} holds no {NAME}", "copy or download it again", Exception),
        ):
            import diffusers

            kind = diffusers.AutoencoderKL
            if not weights:
                with torch.device("meta"):
                    return cls(kind.from_config(kind.load_config(place)))
            model = kind.from_pretrained(place, variant=variant, use_safetensors=True, local_files_only=True)
        return cls(model).to(device)

    def to(self, device: str | torch.device) -> Autoencoder:
        """Move it to another device."""
        self.model.to(device)
        self.shift, self.scale = self.shift.to(device), self.scale.to(device)
        return self

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of uint8 images (B, 3, H, W): float32 (B, C, H/8, W/8).

        Raises:
            VdiffError: a value is not finite.
            ValueError: height or width is not a multiple of `factor`.
        """
        if any(size % self.factor for size in images.shape[2:]):
            raise ValueError(f"images of {tuple(images.shape[2:])} pixels; need multiples of {self.factor}")
        means, stds = [], []
        for part in self._parts(images):
            with without_autocast(part.device):
                posterior = self.model.encode(from_uint8(part)).latent_dist
            means.append((posterior.mean - self.shift) * self.scale)
            stds.append(posterior.std * self.scale)
        mean, std = torch.cat(means), torch.cat(stds)
        if not (mean.isfinite().all() and std.isfinite().all()):
            raise VdiffError("the autoencoder encodes an image as numbers that are not finite", REMEDY)
        return mean, std

    @staticmethod
    def sample(mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """z = mean + std · noise, a sample from the posterior."""
        return mean + std * noise

    @torch.no_grad()
    def decode(self, z: Tensor, *, check: bool = True) -> Tensor:
        """The pictures of latents (B, C, h, w): float32 (B, 3, H, W) in [−1, 1].

        Args:
            check: whether to refuse pictures that are black or not finite.

        Raises:
            VdiffError: a picture is not finite, or black.
        """
        found = []
        for part in self._parts(z.float(), self.factor**2):
            with without_autocast(part.device):
                found.append(self.model.decode(part / self.scale + self.shift, return_dict=False)[0])
        images = torch.cat(found)
        for k, image in enumerate(images if check else ()):
            if not image.isfinite().all():
                raise VdiffError(f"picture {k + 1} of {len(images)} is not finite", REMEDY)
            if bool((image <= BLACK).all()):
                raise VdiffError(f"picture {k + 1} of {len(images)} is black", REMEDY)
        return images.clamp(-1, 1)

    def _parts(self, values: Tensor, pixels: int = 1) -> Iterator[Tensor]:
        """The parts of `values` that are computed at once, on the model's device."""
        rows = max(1, PIXELS_AT_ONCE // (values.shape[-1] * values.shape[-2] * pixels))
        yield from values.to(self.scale.device).split(rows)
