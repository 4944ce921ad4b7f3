"""Tokenizers of a pipeline's folder, which turn prompts into tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.errors import VdiffError, explained
from vdiff.models.components import TOKENIZERS, text_libraries

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tokenizers:
    """One or two tokenizers of CLIP.

    Attributes:
        parts: `CLIPTokenizer` of transformers, in the order of the text encoders.
    """

    parts: Sequence[Any]

    @classmethod
    def read(cls, folder: str | Path) -> Tokenizers:
        """The tokenizers in `tokenizer/` and `tokenizer_2/` (if it exists) of a pipeline's folder.

        Raises:
            VdiffError: there is none, it cannot be read, or transformers is not installed.
        """
        places = [Path(folder) / name for name in TOKENIZERS if (Path(folder) / name).is_dir()]
        if not places:
            raise VdiffError(
                f"{folder} has no folder {TOKENIZERS[0]}", "give the folder of a Stable Diffusion pipeline"
            )
        parts = []
        with text_libraries():
            from transformers import CLIPTokenizer

            for place in places:
                with explained(f"{place} holds no tokenizer of CLIP", "copy or download it again", Exception):
                    if not any((place / name).is_file() for name in ("vocab.json", "tokenizer.json")):
                        raise ValueError("vocab.json is missing")  # transformers would return an empty tokenizer
                    parts.append(CLIPTokenizer.from_pretrained(place, local_files_only=True))
        return cls(parts)

    @property
    def length(self) -> int:
        """Tokens of a prompt for each tokenizer, including the start and end tokens."""
        return int(min(part.model_max_length for part in self.parts))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """The tokens of each text by all k tokenizers, concatenated and padded: (B, k·77) int64."""
        import torch

        known = [
            part(
                list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).input_ids
            for part in self.parts
        ]
        return torch.cat(known, dim=1)

    def cut(self, text: str) -> str:
        """The end of `text` that exceeds `length` tokens; empty if the whole text fits."""
        part = self.parts[0]
        numbers = part(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return str(part.decode(numbers[self.length - 2 :])).strip()
