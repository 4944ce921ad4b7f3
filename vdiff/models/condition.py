"""What a network takes besides z and the time: named tensors, and what stands for "not told" of each.

Imports torch when tensors are at hand, so that a checkpoint is described without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch
    from torch import Tensor

CLASSES, GUIDANCE, SECOND_TIME, TOKENS = "classes", "guidance", "second_time", "tokens"
"""Names of conditions: a class (B,) int64, the weight w of classifier-free guidance (B,), a second time (B,) in
[0, 1], where the step from t is to end (Kim et al. 2024, *Consistency Trajectory Models*), and the tokens of a prompt
(B, N) int64."""
TEXT, TEXT_MASK, POOLED, TIME_IDS = "text", "text_mask", "text_pooled", "time_ids"
"""A text's embeddings (B, tokens, channels), which of them count (B, tokens), one vector of it, and SDXL's sizes."""
Null: TypeAlias = "Mapping[str, Tensor | float | tuple[int, ...]]"


@dataclass(frozen=True, eq=False)
class Condition:
    """Named tensors whose rows, on dimension 0, belong to the rows of z: classes, embeddings, a weight of guidance.

    Attributes:
        tensors: name → (B, …), which a network takes as keyword arguments.
        null: name → the number, or the row (…), that stands for "not told"; names without one cannot be dropped.

    Raises:
        ValueError: tensors of different numbers of rows.
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
        """The null condition in the rows of `mask` (B,) bool, without it in all; tensors without a null stay.

        A network that learns with some rows dropped has both answers of classifier-free guidance.
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
        """The rows of this one, then those of another of the same names."""
        import torch

        return replace(self, tensors={name: torch.cat([a, other.tensors[name]]) for name, a in self.tensors.items()})

    def with_tensors(self, **tensors: Tensor | None) -> Condition:
        """With these tensors too, or without those of the names that are None."""
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
    """What a network takes and answers.

    Attributes:
        channels, out_channels: of z (B, channels, …) and of the output.
        names: of the conditions that it takes.
        null: what stands for "not told" of a condition, where the network has learned what it means.
        num_classes: of a network that takes classes.
        size_multiple: the sizes of z behind the channels must be multiples of this.
    """

    channels: int
    out_channels: int
    names: tuple[str, ...] = ()
    null: Null = field(default_factory=dict)
    num_classes: int = 0
    size_multiple: int = 1

    @property
    def takes_guidance(self) -> bool:
        """Whether the network takes a weight of guidance, whose effect it has learned."""
        return GUIDANCE in self.names

    def condition(self, **tensors: Tensor | None) -> Condition:
        """Those of the tensors that the network takes, with what stands for "not told"."""
        kept = {name: tensor for name, tensor in tensors.items() if tensor is not None and name in self.names}
        return Condition(kept, self.null)

    def check_shape(self, shape: Sequence[int]) -> None:
        """Refuse samples (C, …) of a shape that the network does not take.

        Raises:
            ValueError: other channels, or a size that is no multiple of `size_multiple`.
        """
        if shape[0] != self.channels:
            raise ValueError(f"samples of {shape[0]} channels do not fit a network of {self.channels}")
        if any(size % self.size_multiple for size in shape[1:]):
            is_square = len(shape) == 3 and shape[1] == shape[2]
            what = f"images of {shape[1]} pixels" if is_square else f"samples of {' × '.join(map(str, shape[1:]))}"
            raise ValueError(f"{what} need a network for multiples of {self.size_multiple}")
