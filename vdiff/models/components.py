"""Components: the parts of a model that are not trained, in a folder like a pipeline of diffusers.

    vae/                                             the autoencoder; absent for a model of pixels
    text_encoder/, text_encoder_2/, text_encoder_3/  of a text-to-image model alone
    tokenizer/, tokenizer_2/, tokenizer_3/

A checkpoint holds the path and fingerprint of the folder, so many models can share one.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vdiff.errors import VdiffError, explained
from vdiff.files import sha256_of, writing

if TYPE_CHECKING:
    from torch import nn

VAE = "vae"
ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
PARTS = (VAE, *ENCODERS, *TOKENIZERS)
TOKENIZER_FILES = (
    *("vocab.json", "merges.txt", "tokenizer.json", "spiece.model"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
)
T5 = "T5EncoderModel"
ENCODER_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection", T5)
"""The classes of transformers that are supported as text encoders."""
RESTORE = "restore the folder, or point to it with --components FOLDER"


@contextmanager
def text_libraries() -> Iterator[None]:
    """A context to import and use diffusers and transformers in, with their log and progress bars off.

    Raises:
        VdiffError: one of them is not installed.
    """
    try:
        import diffusers
        import transformers

        modules = (diffusers.utils.logging, transformers.utils.logging)
        before = [(module, module.get_verbosity(), module.is_progress_bar_enabled()) for module in modules]
        for module in modules:
            module.set_verbosity_error()
            module.disable_progress_bar()
        try:
            yield
        finally:
            for module, verbosity, has_bars in before:
                module.set_verbosity(verbosity)
                if has_bars:
                    module.enable_progress_bar()
    except ImportError as error:
        raise VdiffError(
            f"text-to-image models need {error.name or 'a library'}, which is not installed",
            "pip install 'vdiff[text]'",
        ) from None


def weights_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors file of a text encoder or autoencoder, or its parts and their index; and the variant.

    Files without a variant are preferred.

    Raises:
        VdiffError: there are none.
    """
    name = "model" if folder.name in ENCODERS else "diffusion_pytorch_model"
    pattern = re.compile(rf"{name}\.?(.*?)(-\d+-of-\d+)?\.safetensors")
    found = [match for path in sorted(folder.glob("*")) if (match := pattern.fullmatch(path.name))]
    if not found:
        raise VdiffError(
            f"{folder / name}.safetensors is missing",
            "weights in pickles (.bin) are never read: let diffusers save the pipeline again, as safetensors",
        )
    best = min(found, key=lambda match: (len(match[1]), bool(match[2])))
    if not best[2]:
        return [folder / best[0]], best[1] or None
    index = ".".join(filter(None, [name, "safetensors.index", best[1], "json"]))
    parts = [folder / match[0] for match in found if match[1] == best[1] and match[2]]
    return [*parts, folder / index], best[1] or None


def files_of(folder: Path) -> list[Path]:
    """The files in `folder` that vdiff reads.

    Raises:
        VdiffError: there are none, or a part lacks its weights.
    """
    files: list[Path] = []
    for part in PARTS:
        if not (folder / part).is_dir():
            continue
        names = TOKENIZER_FILES if part in TOKENIZERS else ("config.json",)
        files += [folder / part / name for name in names if (folder / part / name).is_file()]
        if part not in TOKENIZERS:
            files += weights_files(folder / part)[0]
    if not files:
        raise VdiffError(f"{folder} holds no text encoder, tokenizer or autoencoder", RESTORE)
    return files


def copy_parts(source: Path, target: Path) -> None:
    """Copy the files that vdiff reads.

    Raises:
        VdiffError: there are none, or the file system refuses.
    """
    with writing(target):
        for path in files_of(source):
            place = target / path.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)


def components_fingerprint(folder: Path) -> str:
    """SHA-256 of the names and contents of the files that vdiff reads.

    Raises:
        VdiffError: a part lacks its weights, or a file cannot be read.
    """
    digest = hashlib.sha256()
    with explained(f"{folder} cannot be read", RESTORE, OSError):
        for path in files_of(folder):
            facts = path.stat()
            content = _sha256(path, facts.st_size, facts.st_mtime_ns)
            digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


@functools.cache
def _sha256(path: Path, size: int, modified: int) -> str:
    """`sha256_of`, computed once for each file: a command opens the same gigabytes several times."""
    del size, modified
    return sha256_of(path)


def resolved(reference: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The entry for components or base in the checkpoint in `folder`, with an absolute path.

    A checkpoint in `history/` lies two folders deeper than the original, so its relative path is also tried from there.
    """
    path = Path(str(reference["path"]))
    places = (folder / path, folder.parent.parent / path)
    return {**reference, "path": os.path.abspath(next((place for place in places if place.is_dir()), places[0]))}


def written(components: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The entry as it is stored in `folder`: the path is relative if both are in the same parent folder."""
    path = os.path.abspath(components["path"])
    home = os.path.abspath(folder.parent)
    return {**components, "path": os.path.relpath(path, folder) if path.startswith(home + os.sep) else path}


def check_components(components: Mapping[str, Any] | None, other: Path | None = None) -> dict[str, Any]:
    """Check that the folder of a model's components exists and is unchanged; return its path and fingerprint.

    Args:
        other: a folder to use instead of the model's own entry.

    Raises:
        VdiffError: the folder is missing or incomplete, or its fingerprint differs.
    """
    if components is None and other is None:
        raise VdiffError("the model names no folder with its other parts", "give it with --components FOLDER")
    folder = other or Path(str((components or {})["path"]))
    if not folder.is_dir():
        raise VdiffError(f"{folder}, the folder of the model's other parts: no such folder", RESTORE)
    fingerprint = components_fingerprint(folder)
    if components is not None and fingerprint != components["fingerprint"]:
        raise VdiffError(f"{folder} holds other text encoders, tokenizers or autoencoder than the model's", RESTORE)
    return {"path": os.path.abspath(folder), "fingerprint": fingerprint}


def load_text_encoders(encoders: nn.ModuleList, folder: Path) -> None:
    """Load the weights of text encoders from a folder.

    Raises:
        VdiffError: they are missing, damaged, or of another shape.
    """
    for part, encoder in zip(ENCODERS, encoders, strict=False):
        encoder.load_state_dict(read_encoder(folder, part).state_dict())


def read_encoder(folder: Path, part: str) -> nn.Module:
    """The text encoder `part` of a pipeline's folder, in float32.

    Raises:
        VdiffError: its weights are missing or damaged, or its class is not supported.
    """
    _, variant = weights_files(folder / part)
    where = folder / part
    with (
        text_libraries(),
        explained(f"{where} holds no text encoder of CLIP or T5", "copy or download it again", Exception),
    ):
        import transformers

        [name] = transformers.AutoConfig.from_pretrained(where).architectures
        if name not in ENCODER_CLASSES:
            raise ValueError(f"it is a {name}, only {', '.join(ENCODER_CLASSES)} can be used")
        encoder, loading = getattr(transformers, name).from_pretrained(
            where, variant=variant, use_safetensors=True, local_files_only=True, output_loading_info=True
        )
        if lacking := [*loading["missing_keys"], *loading["mismatched_keys"]]:
            raise ValueError(f"{len(lacking)} tensors are missing or of another shape ({lacking[0]}, …)")
    result: nn.Module = encoder.float()
    return result
