"""The inputs of a network besides z and the time: named tensors, and a null value for each, "not given".

Functions import torch, so that a checkpoint is described without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLASSES, GUIDANCE, SECOND_TIME, TOKENS = "classes", "guidance", "second_time", "tokens"
"""Names of conditions: a class (B,) int64; the weight w of classifier-free guidance (B,); a second time (B,) in
[0, 1], the end of the step from t (Kim et al. 2024, *Consistency Trajectory Models*); the tokens of a prompt (B, N)
int64."""
IMAGE = "condition_image"
"""An image (B, C, H, W) of the size and the channels of z, in [−1, 1]: further input channels of the network."""
TEXT, TEXT_MASK, POOLED, TIME_IDS = "text", "text_mask", "text_pooled", "time_ids"
"""Embeddings of a text (B, tokens, channels), their mask (B, tokens), its pooled embedding, and the sizes of SDXL."""
Null: TypeAlias = "Mapping[str, Tensor | float | tuple[int, ...]]"


@dataclass(frozen=True, eq=False)
class Condition:
    """Named tensors with one row for each row of z: classes, embeddings, weights of guidance.

    Attributes:
        tensors: name → (B, …), passed to a network as keyword arguments.
        null: name → the number or the row (…) that means "not given"; a tensor without one cannot be dropped.

    Raises:
        ValueError: the numbers of rows differ.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    null: Null = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in self.tensors.items()}
        if len({size for size in sizes.values() if isinstance(size, int)}) > 1:  # in a graph it is a symbol
            found = ", ".join(f"{name} {size}" for name, size in sizes.items())
            raise ValueError(f"conditions of different numbers of rows: {found}")

    def __getitem__(self, rows: slice | Tensor) -> Condition:
        """Some of the rows."""
        return replace(self, tensors={name: tensor[rows] for name, tensor in self.tensors.items()})

    @property
    def can_drop(self) -> bool:
        """Whether any of its tensors has a null."""
        return not self.null.keys().isdisjoint(self.tensors)

    def drop(self, mask: Tensor | None = None) -> Condition:
        """Replace the rows of `mask` (B,) bool, by default all, by the null; tensors without a null do not change.

        A network trained with some rows dropped gives both predictions of classifier-free guidance.
        Source: Ho & Salimans 2022, algorithm 1.
        """
        return replace(self, tensors={name: self._dropped(name, tensor, mask) for name, tensor in self.tensors.items()})

    def _dropped(self, name: str, tensor: Tensor, mask: Tensor | None) -> Tensor:
        if (null := self.null.get(name)) is None:
            return tensor
        if isinstance(null, int | float):
            rows = tensor.new_full(tensor.shape, null)
        else:
            row = tensor.new_tensor(null) if isinstance(null, tuple) else null.to(tensor)
            rows = row.expand_as(tensor)
        return rows if mask is None else rows.where(mask.reshape(-1, *[1] * (tensor.ndim - 1)), tensor)

    def cat(self, other: Condition) -> Condition:
        """The rows of this condition, followed by those of another with the same names."""
        import torch

        return replace(self, tensors={name: torch.cat([a, other.tensors[name]]) for name, a in self.tensors.items()})

    def with_tensors(self, **tensors: Tensor | None) -> Condition:
        """Add these tensors; a name with None removes its tensor."""
        kept = {name: tensor for name, tensor in {**self.tensors, **tensors}.items() if tensor is not None}
        return replace(self, tensors=kept)

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Condition:
        """On another device; real numbers in `dtype`, which comes first because some devices have no float64."""
        moved = {
            name: (tensor.to(dtype) if dtype and tensor.is_floating_point() else tensor).to(device, non_blocking=True)
            for name, tensor in self.tensors.items()
        }
        return replace(self, tensors=moved)


@dataclass(frozen=True)
class Signature:
    """The inputs and outputs of a network.

    Attributes:
        channels, out_channels: of z (B, channels, …) and of the output.
        names: of the conditions that it takes.
        null: name → null value, for conditions that the training sometimes dropped.
        num_classes: of a network that takes classes.
        size_multiple: the sizes of z after the channels must be multiples of this.
    """

    channels: int
    out_channels: int
    names: tuple[str, ...] = ()
    null: Null = field(default_factory=dict)
    num_classes: int = 0
    size_multiple: int = 1

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes the weight of guidance as an input."""
        return GUIDANCE in self.names

    def condition(self, **tensors: Tensor | None) -> Condition:
        """A condition of those tensors that the network takes, with their null values."""
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None and name in self.names}
        return Condition(kept, self.null)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse shapes (C, …) of samples that the network does not take.

        Raises:
            ValueError: other channels, or a size that is not a multiple of `size_multiple`.
        """
        if shape[0] != self.channels:
            raise ValueError(f"samples of {shape[0]} channels do not fit a network of {self.channels}")
        if any(size % self.size_multiple for size in shape[1:]):
            is_square = len(shape) == 3 and shape[1] == shape[2]
            what = f"images of {shape[1]} pixels" if is_square else f"samples of {' × '.join(map(str, shape[1:]))}"
            raise ValueError(f"{what} need a network for multiples of {self.size_multiple}")
