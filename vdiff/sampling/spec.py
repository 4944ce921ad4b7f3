"""The specification that determines image k, and its record beside the images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vdiff.data.labels import SAMPLES_FILE
from vdiff.diffusion.noise import ImageNoise
from vdiff.errors import VdiffError
from vdiff.files import json_text, parse, read_text
from vdiff.models.drawing import image_classes
from vdiff.records import check_same_settings

RECORD = SAMPLES_FILE


@dataclass(frozen=True)
class SampleSpec:
    """Everything that determines image k.

    Attributes:
        checkpoint, fingerprint: the model's folder, and the SHA-256 of its weights.
        sampler, options: the sampler's name and its settings that differ from the defaults.
        num_steps, grid: sampling steps, and the name of the grid of times.
        classes: class numbers, assigned to the images in turn; empty for an unconditional model.
        guidance, guidance_interval: the weight w, and the first and last time with guidance (empty: all).
        precision: of the network.
        prompts, negative_prompt: assigned to the images in turn, and what guidance moves away from.
        components, vae: SHA-256 of the components of a text-to-image model, and of an autoencoder in their place.
        condition, condition_fingerprint: the folder of condition images, and the SHA-256 of its contents.
        names: the files of the images, if these are named like their condition images.
        path: [A, B, n]: instead of the images 0, 1, …, n images that interpolate from image A to image B.
    """

    checkpoint: str
    fingerprint: str
    sampler: str
    options: dict[str, Any]
    num_steps: int
    seed: int
    classes: list[int]
    grid: str = "uniform"
    guidance: float = 0.0
    guidance_interval: list[float] = field(default_factory=list)
    precision: str = "fp32"
    prompts: list[str] = field(default_factory=list)
    negative_prompt: str = ""
    components: str = ""
    vae: str = ""
    condition: str = ""
    condition_fingerprint: str = ""
    names: list[str] = field(default_factory=list)
    path: list[int] = field(default_factory=list)

    def noise(self, indices: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Callable[[], Tensor]:
        """The noise of images `indices`."""
        if not self.path:
            return ImageNoise(seed=self.seed, indices=indices, shape=shape, device=device)
        first, last, number = self.path
        positions = [k / (number - 1) for k in indices]
        return PathNoise(seed=self.seed, ends=(first, last), positions=positions, shape=shape, device=device)

    def labels(self, indices: Sequence[int]) -> Tensor | None:
        """The classes of images `indices`, (B,) int64; on a path, that of the nearer end."""
        return image_classes(self._nearest(indices), self.classes) if self.classes else None

    def texts(self, indices: Sequence[int]) -> list[str]:
        """The prompts of images `indices`; on a path, that of the nearer end. Empty for a model without prompts."""
        return [self.prompts[k % len(self.prompts)] for k in self._nearest(indices)] if self.prompts else []

    def _nearest(self, indices: Sequence[int]) -> Sequence[int]:
        """Images whose class or prompt images `indices` have: themselves; on a path, the nearer end."""
        if not self.path:
            return indices
        first, last, number = self.path
        return [nearer_end(k / (number - 1), first, last) for k in indices]

    def check_same(self, before: dict[str, Any], place: Path, noun: str) -> None:
        """Refuse to continue images (`noun`) in `place` if their record differs from this specification.

        Raises:
            VdiffError: it differs.
        """
        said = {item.name: _default(item) for item in fields(self)} | before
        if isinstance(options := said["options"], dict):  # "clip" in earlier versions
            said["options"] = {"clipping_value" if key == "clip" else key: value for key, value in options.items()}
        now, advice = asdict(self), "give another --name or --out, or --overwrite"
        if said["fingerprint"] != self.fingerprint:
            raise VdiffError(f"{place} holds {noun}s drawn with other weights", advice)
        before = {key: said[key] for key in now}
        check_same_settings(
            before, now, done=f"{place} holds {noun}s drawn", hint=lambda _: advice, but=("checkpoint", "condition")
        )

    def to_json(self, **more: Any) -> str:
        """The record."""
        return json_text({**asdict(self), **more})


def spec_of(record: Mapping[str, Any]) -> SampleSpec:
    """The specification in a record."""
    return SampleSpec(**{item.name: record[item.name] for item in fields(SampleSpec) if item.name in record})


def is_record(record: object) -> bool:
    """Whether `values` are the record of a specification, perhaps of another version of vdiff."""
    needed = {item.name for item in fields(SampleSpec) if _default(item) is MISSING}
    return isinstance(record, dict) and record.keys() >= needed


def _default(item: Any) -> Any:
    """The value for records without this key, written before the key existed; MISSING: the key is required."""
    return item.default if item.default_factory is MISSING else item.default_factory()


def read_record(path: Path) -> Any:
    """The contents of the record; None if it cannot be read."""
    try:
        return parse(read_text(path))
    except (OSError, ValueError):
        return None


def slerp(a: Tensor, b: Tensor, positions: Tensor) -> Tensor:
    """sin((1 − u) θ)/sin θ · a + sin(u θ)/sin θ · b, with θ the angle between a and b: (N, …) for N positions u.

    Exactly a at u = 0 and b at u = 1. In between, the norm changes smoothly from that of a to that of b, and so stays
    typical for noise of many dimensions. Source: Shoemake 1985; for DDIM's noise, Song et al. 2021, section 5.3.

    Raises:
        ValueError: a and b have the same or opposite directions.
    """
    x, y, u = a.double(), b.double(), positions.double().reshape(-1, *[1] * a.ndim)
    theta = torch.acos((x * y).sum() / (x.norm() * y.norm()))
    if not theta.sin() > 1e-6:
        raise ValueError("there is no unique shortest path between noise of equal or opposite directions")
    return ((((1 - u) * theta).sin() * x + (u * theta).sin() * y) / theta.sin()).to(a.dtype)


class PathNoise:
    """Like `ImageNoise`, for images between image A and image B of a seed: every draw is the `slerp` of A's and B's.

    So the ends are exactly the images A and B, even if a sampler adds noise.

    Args:
        ends: A and B.
        positions: of the images, 0 at A and 1 at B.
    """

    def __init__(
        self,
        *,
        seed: int,
        ends: tuple[int, int],
        positions: Sequence[float],
        shape: tuple[int, ...],
        device: str | torch.device = "cpu",
    ) -> None:
        self.ends = ImageNoise(seed=seed, indices=ends, shape=shape)
        self.positions = torch.tensor(positions, dtype=torch.float64)
        self.device = device

    def __call__(self) -> Tensor:
        a, b = self.ends()
        return slerp(a, b, self.positions).to(self.device)


def nearer_end(position: float, first: int, last: int) -> int:
    """The nearer end of a position from 0 to 1; halfway, the first one."""
    return first if position <= 0.5 else last
