"""CLIP score: how well pictures match their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from vdiff.errors import VdiffError, explained
from vdiff.evaluation.metrics import mean_metric
from vdiff.evaluation.results import Metric
from vdiff.files import sha256_of
from vdiff.models.components import text_libraries
from vdiff.reporting import Progress

SUFFIXES = (".json", ".txt", ".safetensors")
DOWNLOAD = "give a folder with a CLIPModel and its CLIPProcessor, such as a copy of openai/clip-vit-large-patch14"


class ClipScore:
    """100 · max(cos(e_picture, e_prompt), 0) of each picture and its prompt, with the embeddings e of a CLIP model.

    The scale is that of torchmetrics, which takes the maximum after the mean over pictures; so its score is the same if
    no cosine is negative. The paper's scale is 2.5 instead of 100. Source: Hessel et al. 2021, equation 1.

    Args:
        folder: `CLIPModel` and `CLIPProcessor`, as `save_pretrained` of transformers writes them.

    Attributes:
        fingerprint: SHA-256 of the names and contents of its files.

    Raises:
        VdiffError: the folder holds no such model, or transformers is not installed.
    """

    def __init__(self, folder: Path, device: torch.device | str = "cpu") -> None:
        if not folder.is_dir():
            raise VdiffError(f"--clip {folder}: no such folder", DOWNLOAD)
        with text_libraries(), explained(f"--clip {folder} cannot be used", DOWNLOAD, Exception):
            import transformers

            if not list(folder.glob("*.safetensors")):
                raise ValueError("it has no weights in safetensors; pickles (.bin) are never read")
            kind: Any = transformers.CLIPModel
            model, loading = kind.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            if lacking := [*loading["missing_keys"], *loading["mismatched_keys"]]:
                raise ValueError(f"{len(lacking)} tensors are missing or of another shape ({sorted(lacking)[0]}, …)")
            self.processor: Any = transformers.CLIPProcessor.from_pretrained(folder, local_files_only=True)
        self.model: Any = model.float().eval().requires_grad_(False).to(device)
        digest = hashlib.sha256()
        for path in sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES):
            digest.update(f"{path.name} {sha256_of(path)}\n".encode())
        self.fingerprint = digest.hexdigest()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> NDArray[np.float64]:
        """The scores (n,) of uint8 pictures (n, C, H, W) and their prompts, which are cut after the model's length."""
        pixels = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).cpu().numpy()
        inputs = self.processor(
            text=list(prompts),
            images=[PIL.Image.fromarray(picture) for picture in pixels],
            padding=True,
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        output = self.model(**inputs)
        cosines = (output.image_embeds.double() * output.text_embeds.double()).sum(-1)
        scores: NDArray[np.float64] = (100 * cosines.clamp(min=0)).cpu().numpy()
        return scores

    def score_files(self, files: Sequence[Path], prompts: Sequence[str], bar: Progress) -> Metric:
        """The mean score of pictures in files and their prompts.

        Raises:
            VdiffError: a file cannot be read as a picture.
        """
        scores = []
        for path, prompt in zip(files, prompts, strict=True):
            with (
                explained(f"{path} cannot be read", "draw it again: sample.py --overwrite", OSError, SyntaxError),
                PIL.Image.open(path) as image,
            ):
                pixels = np.array(image.convert("RGB"))
            scores.append(self(torch.from_numpy(pixels).permute(2, 0, 1)[None], [prompt]))
            bar.update(len(scores))
        return mean_metric(np.concatenate(scores))
