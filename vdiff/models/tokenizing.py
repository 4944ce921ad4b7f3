"""Prompts as tokens: the tokenizers of a pipeline's folder."""

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
        """The tokenizers in `tokenizer/` and, where it is there, `tokenizer_2/` of a pipeline's folder.

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
                        raise ValueError("vocab.json is missing")  # of no file a tokenizer is made that knows nothing
                    parts.append(CLIPTokenizer.from_pretrained(place, local_files_only=True))
        return cls(parts)

    @property
    def length(self) -> int:
        """Tokens of a prompt for each tokenizer, its first and last included."""
        return int(min(part.model_max_length for part in self.parts))

    def tokens(self, texts: Sequence[str]) -> Tensor:
        """(B, k·77) int64: the tokens of each text by each tokenizer, side by side, of one length."""
        import torch

        known = [
            part(
                list(texts), padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
            ).input_ids
            for part in self.parts
        ]
        return torch.cat(known, dim=1)

    def cut(self, text: str) -> str:
        """The end of `text` that does not fit; empty if all of it does."""
        part = self.parts[0]
        numbers = part(text, add_special_tokens=False, truncation=False, verbose=False).input_ids
        return str(part.decode(numbers[self.length - 2 :])).strip()
