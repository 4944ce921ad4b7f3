"""Tokenizers of a pipeline's folder, which turn prompts into tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.errors import VdiffError, explained
from vdiff.models.components import T5, TOKENIZERS, text_libraries
from vdiff.models.diffusers_names import PIXART

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tokenizers:
    """One to three tokenizers, of CLIP or T5.

    Attributes:
        parts: `CLIPTokenizer` or `T5Tokenizer` of transformers, in the order of the text encoders.
        lengths: tokens of a prompt for each, including those of its start and end.
        lower: texts are stripped and get lower-case letters first, as PixArt's pipelines do.
    """

    parts: Sequence[Any]
    lengths: Sequence[int]
    lower: bool = False

    @classmethod
    def read(cls, folder: str | Path, network: Mapping[str, Any] | None = None) -> Tokenizers:
        """The tokenizers in `tokenizer/`, `tokenizer_2/` and `tokenizer_3/` (if they exist) of a pipeline's folder.

        Args:
            network: of `TextBackbone.describe`; None: those of CLIP.

        Raises:
            VdiffError: there is none, it cannot be read, or transformers is not installed.
        """
        network, count = network or {}, sum((Path(folder) / name).is_dir() for name in TOKENIZERS)
        kinds = [encoder["class"] for encoder in network.get("text_encoders", [{"class": ""}] * max(count, 1))]
        places = [Path(folder) / name for name in TOKENIZERS[: len(kinds)]]
        if missing := [place for place in places if not place.is_dir()]:
            raise VdiffError(
                f"{folder} has no folder {missing[0].name}", "give the folder of a Stable Diffusion pipeline"
            )
        parts = []
        with text_libraries():
            from transformers import CLIPTokenizer, T5Tokenizer

            for place, kind in zip(places, kinds, strict=True):
                name, files = ("T5", "spiece.model") if kind == T5 else ("CLIP", "vocab.json")
                if kind == T5 and not (place / "tokenizer.json").is_file():
                    import sentencepiece  # noqa: F401 – transformers needs it for this file, and does not say so
                with explained(f"{place} holds no tokenizer of {name}", "copy or download it again", Exception):
                    if not any((place / file).is_file() for file in (files, "tokenizer.json")):
                        raise ValueError(f"{files} is missing")  # transformers would return an empty tokenizer
                    reader = T5Tokenizer if kind == T5 else CLIPTokenizer
                    parts.append(reader.from_pretrained(place, local_files_only=True))
        of_clip = [part.model_max_length for part, kind in zip(parts, kinds, strict=True) if kind != T5]
        lengths = [network["t5_length"] if kind == T5 else min(of_clip) for kind in kinds]
        return cls(parts, lengths, network.get("unet", {}).get("class") == PIXART)

    @property
    def length(self) -> int:
        """The most tokens of a prompt that a tokenizer keeps, including the start and end tokens."""
        return max(self.lengths)

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """The tokens of each text by all k tokenizers, concatenated and padded: (B, n₁ + … + n_k) int64."""
        import torch

        read = [text.lower().strip() for text in texts] if self.lower else list(texts)
        known = [
            part(read, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
            for part, length in zip(self.parts, self.lengths, strict=True)
        ]
        return torch.cat(known, dim=1)

    def cut(self, text: str) -> str:
        """The end of `text` that exceeds `length` tokens; empty if the whole text fits."""
        part = self.parts[list(self.lengths).index(self.length)]
        numbers = part(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return str(part.decode(numbers[self.length - part.num_special_tokens_to_add() :])).strip()
