"""Latents and text embeddings of a dataset: `vdiff data encode` computes them once and stores them beside it.

photos_64.encoded/encoded.json                the `EncodedKey`
photos_64.encoded/latents-000000.safetensors  256 images: `7.mean`, `7.std`, and mirrored `7.mean.flip`, …
photos_64.encoded/texts-000000.safetensors    64 captions: `5.text`, …; caption 0 is the empty one

Each tensor has a checksum `crc32.NAME`, which is compared when the tensor is read.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vdiff.data.batches import decode
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError, stop_explained
from vdiff.files import make_folder, write_json, write_whole
from vdiff.records import check_same_settings, read_record
from vdiff.replacing import Kind, check_free, discard, holds_keys, locked
from vdiff.reporting import Reporter, Silent

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX, RECORD = ".encoded", "encoded.json"
IMAGES_PER_FILE, TEXTS_PER_FILE = 256, 64
FILES = r"encoded\.json|(latents|texts)-\d{6}\.safetensors"
ENCODED = Kind("encoded dataset", lambda folder: FILES if holds_keys(folder / RECORD, "dataset", "components") else "")
ENCODE = "vdiff data encode"
ENCODE_AGAIN = f"encode the dataset again: {ENCODE}"
FLIP, CHECK = ".flip", "crc32."


@dataclass(frozen=True)
class EncodedKey:
    """The inputs that determine the encoded data.

    Attributes:
        dataset: fingerprint of the images and captions.
        components: fingerprint of the autoencoder, the text encoders and their tokenizers.
        image_size: size of the images in pixels.
        flip: whether mirrored images are encoded too.
    """

    dataset: str
    components: str
    image_size: int
    flip: bool = False


def encoded_folder(store: ImageStore) -> Path:
    """The folder of the encoded data of a dataset, beside the dataset."""
    return store.path.with_name(store.path.name + SUFFIX)


def texts_of(store: ImageStore) -> dict[str, int]:
    """{caption: number} of all captions of a dataset, numbered in the order of images; "" has number 0."""
    texts = {"": 0}
    for index in range(len(store)):
        for text in store.caption(index).split("\n"):
            texts.setdefault(text, len(texts))
    return texts


def encode_dataset(
    store: ImageStore,
    key: EncodedKey,
    images_to_latents: Callable[[Tensor], tuple[Tensor, Tensor]],
    texts_to_embeddings: Callable[[Sequence[str]], dict[str, Tensor]],
    *,
    batch_size: int,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> Path:
    """Encode all images and captions of a dataset into `encoded_folder`; the same call continues after a kill.

    Args:
        images_to_latents: (B, C, H, W) uint8 → mean and standard deviation of the latents.
        texts_to_embeddings: B captions → {name: tensor of B rows}.

    Raises:
        VdiffError: the folder holds data of other images, components or settings (unless `overwrite`), or other files.
    """
    from safetensors.torch import save_file

    folder, texts = encoded_folder(store), texts_of(store)

    def explain(word: str) -> str:
        done = min(len(list(folder.glob("latents-*"))) * IMAGES_PER_FILE, len(store))
        return f"{word}; {done} of {len(store)} images are encoded, the same command continues"

    with locked(folder, kind=ENCODED), stop_explained(explain):
        if (folder / RECORD).is_file() and not overwrite:
            before = asdict(read_record(folder / RECORD, EncodedKey, ENCODE_AGAIN))
            hint = "prepare the images under another --name to keep both, or give --overwrite"
            check_same_settings(before, asdict(key), done=f"{folder} was encoded", hint=lambda _: hint)
        else:
            check_free(folder, ENCODED, overwrite=overwrite, flag="--overwrite")
            discard(folder)
            make_folder(folder)
            write_json(folder / RECORD, asdict(key))
        jobs: list[tuple[str, int, int, Callable[[int, int], dict[str, Tensor]]]] = [
            ("latents", len(store), IMAGES_PER_FILE, _latents_of(store, key, images_to_latents, batch_size)),
            ("texts", len(texts), TEXTS_PER_FILE, _embeddings_of(list(texts), texts_to_embeddings, batch_size)),
        ]
        for name, total, each, compute in jobs:
            unit = "images" if name == "latents" else "captions"
            with (reporter or Silent()).progress("encode", total, unit) as progress:
                for start in range(0, total, each):
                    stop = min(start + each, total)
                    if not (path := _part(folder, name, start // each)).exists():
                        tensors = _with_checksums(compute(start, stop))
                        write_whole(path, lambda place, tensors=tensors: save_file(tensors, place))  # type: ignore[misc]
                    progress.update(stop)
    return folder


def _latents_of(
    store: ImageStore, key: EncodedKey, encode: Callable[[Tensor], tuple[Tensor, Tensor]], batch_size: int
) -> Callable[[int, int], dict[str, Tensor]]:
    import torch

    def compute(start: int, stop: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        by_shape: dict[tuple[int, ...], list[int]] = {}
        for index in range(start, stop):
            by_shape.setdefault(store.shape(index)[-2:] or (key.image_size, key.image_size), []).append(index)
        for (height, width), indices in by_shape.items():
            for first in range(0, len(indices), batch_size):
                some = indices[first : first + batch_size]
                where = f"{store.path}: image"
                pixels = np.stack(
                    [decode(store.encoded(key.image_size, k), 3, (height, width), f"{where} {k}") for k in some]
                )
                for suffix, images in [("", pixels), *([(FLIP, pixels[..., ::-1])] if key.flip else [])]:
                    mean, std = encode(torch.from_numpy(np.ascontiguousarray(images)))
                    for k, m, s in zip(some, mean.cpu(), std.cpu(), strict=True):
                        tensors |= {
                            f"{k}.mean{suffix}": m.clone(memory_format=torch.contiguous_format),
                            f"{k}.std{suffix}": s.clone(memory_format=torch.contiguous_format),
                        }
        return tensors

    return compute


def _embeddings_of(
    texts: Sequence[str], encode: Callable[[Sequence[str]], dict[str, Tensor]], batch_size: int
) -> Callable[[int, int], dict[str, Tensor]]:
    def compute(start: int, stop: int) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for first in range(start, stop, batch_size):
            some = range(first, min(first + batch_size, stop))
            for name, rows in encode([texts[k] for k in some]).items():
                tensors |= {f"{k}.{name}": row.contiguous().clone() for k, row in zip(some, rows.cpu(), strict=True)}
        return tensors

    return compute


def _with_checksums(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    import torch

    return tensors | {f"{CHECK}{name}": torch.tensor(_crc32(tensor)) for name, tensor in tensors.items()}


def _crc32(tensor: Tensor) -> int:
    import torch

    return zlib.crc32(tensor.flatten().view(torch.uint8).numpy().tobytes())


def _part(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}-{number:06d}.safetensors"


class EncodedStore:
    """A reader of the encoded data of a dataset.

    Attributes:
        key: the inputs that determined the data.

    Raises:
        VdiffError: the data are missing, incomplete or of another dataset.
    """

    def __init__(self, store: ImageStore) -> None:
        self.folder = encoded_folder(store)
        self.key = read_record(self.folder / RECORD, EncodedKey, ENCODE_AGAIN)
        if self.key.dataset != store.meta.fingerprint:
            raise VdiffError(f"{self.folder} is of other images or captions", f"{ENCODE_AGAIN} --overwrite")
        self._texts = texts_of(store)
        self._files: dict[Path, Any] = {}
        counts = {"latents": (len(store), IMAGES_PER_FILE), "texts": (len(self._texts), TEXTS_PER_FILE)}
        parts = [_part(self.folder, name, k) for name, (n, each) in counts.items() for k in range(-(-n // each))]
        if missing := [path for path in parts if not path.is_file()]:
            what = f"{self.folder} is incomplete: {len(missing)} of {len(parts)} files are missing"
            raise VdiffError(what, f"complete it: {ENCODE} {store.path}")

    def latents(self, indices: Iterable[int], flips: Iterable[bool]) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (B, C, h, w) of the latents of images, mirrored if `flips`."""
        import torch

        found = [
            [self._get("latents", k, IMAGES_PER_FILE, f"{kind}{FLIP if flip else ''}") for kind in ("mean", "std")]
            for k, flip in zip(indices, flips, strict=True)
        ]
        means, stds = zip(*found, strict=True)
        return torch.stack(means), torch.stack(stds)

    def has(self, texts: Iterable[str]) -> bool:
        """Whether all texts are encoded; shuffled captions and captions with a prefix are not."""
        return all(text in self._texts for text in texts)

    def embeddings(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """{name: tensor of B rows} of B encoded texts."""
        import torch

        numbers = [self._texts[text] for text in texts]
        names = [key.partition(".")[2] for key in self._file("texts", 0).keys() if key.startswith("0.")]  # noqa: SIM118
        return {name: torch.stack([self._get("texts", k, TEXTS_PER_FILE, name) for k in numbers]) for name in names}

    def _get(self, kind: str, index: int, each: int, name: str) -> Tensor:
        try:
            file = self._file(kind, index // each)
            tensor: Tensor = file.get_tensor(f"{index}.{name}")
            if file.get_tensor(f"{CHECK}{index}.{name}").item() != _crc32(tensor):
                raise ValueError(f"{index}.{name} does not match its checksum")
        except Exception as error:  # the class of safetensors' errors is not public
            path = _part(self.folder, kind, index // each)
            raise VdiffError(f"{path} is damaged: {error}", f"{ENCODE_AGAIN} --overwrite") from None
        return tensor

    def _file(self, kind: str, number: int) -> Any:
        from safetensors import safe_open

        path = _part(self.folder, kind, number)
        if path not in self._files:
            self._files[path] = safe_open(path, framework="pt")
        return self._files[path]
