"""Latents and text embeddings computed once: equal to those computed on the fly; continued after a kill."""

from __future__ import annotations

import re
import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests.commands import done, error, full_disk, run, tree
from tests.pipelines import pipeline
from tests.test_text_models import backbone, saved
from vdiff.data import encoded as encoded_module
from vdiff.data.batches import Batch, EncodedBatches, ImageBatches
from vdiff.data.captions import CaptionSettings
from vdiff.data.encoded import EncodedStore
from vdiff.data.store import ImageStore
from vdiff.errors import VdiffError
from vdiff.models.autoencoder import Autoencoder
from vdiff.models.tokenizing import Tokenizers

COUNT = 9
ENCODE = "vdiff data encode data/x --base checkpoints/sd --batch_size 4 --device cpu"


@pytest.fixture(scope="module", params=["sd15", "sdxl"])
def project(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a captioned dataset, a model, and the encoded dataset; and the kind of the model."""
    folder = tmp_path_factory.mktemp("encoded")
    (folder / "photos").mkdir()
    for number in range(COUNT):
        pixels = np.random.default_rng(number).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text(
            "a dog\na cat" if number == 3 else f"a photo, {'big ' * number}"
        )
    (folder / "checkpoints").mkdir()
    saved(backbone(request.param), folder / "checkpoints" / "sd", pipeline(request.param))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr(encoded_module, "IMAGES_PER_FILE", 4)
        patch.setattr(encoded_module, "TEXTS_PER_FILE", 3)
        done("prepare_data.py photos --size 16 --format png --num_workers 0 --out data/x")
        said = done(f"{ENCODE} --flip").stdout
    assert said == "data/x.encoded: 9 images encoded\n"
    return folder, request.param


@pytest.fixture(autouse=True)
def in_the_project(project: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(project[0])
    monkeypatch.setattr(encoded_module, "IMAGES_PER_FILE", 4)
    monkeypatch.setattr(encoded_module, "TEXTS_PER_FILE", 3)


def take(batches: ImageBatches, count: int, start: int = 0) -> list[Batch]:
    with closing(batches.start_at(start)) as found:
        return list(islice(found, count))


def test_what_is_kept_is_what_is_computed_on_the_fly(project: tuple[Path, str]) -> None:
    store, place = ImageStore("data/x"), pipeline(project[1])
    options = {"image_size": 16, "batch_size": 3, "seed": 2, "flip": True, "captions": CaptionSettings(dropout=0.3)}
    known = take(EncodedBatches(store, EncodedStore(store), **options), 8)
    plain = take(ImageBatches(store, **options), 8)
    autoencoder, tokenizers, network = Autoencoder.read(place), Tokenizers.read(place), backbone(project[1])
    assert "" in [caption for batch in plain for caption in batch.captions or []]
    for mine, theirs in zip(known, plain, strict=True):
        assert mine.captions == theirs.captions
        assert mine.images.shape == theirs.images.shape
        assert mine.images.is_meta
        assert mine.latents is not None
        for kept, fresh in zip(mine.latents, autoencoder.encode(theirs.images), strict=True):
            torch.testing.assert_close(kept, fresh, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            fresh_texts = network.embed(tokenizers.tokens(theirs.captions or []))
        assert mine.embeddings is not None
        assert mine.embeddings.keys() == fresh_texts.keys()
        for name, fresh in fresh_texts.items():
            torch.testing.assert_close(mine.embeddings[name], fresh, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        take(EncodedBatches(store, EncodedStore(store), **options), 2, 6)[0].latents[0], known[6].latents[0]
    )  # type: ignore[index]


def test_shuffled_captions_have_no_embeddings() -> None:
    store = ImageStore("data/x")
    options = {"image_size": 16, "batch_size": 9, "seed": 2, "flip": False, "captions": CaptionSettings(prefix="x")}
    batch = take(EncodedBatches(store, EncodedStore(store), **options), 1)[0]
    assert batch.embeddings is None
    assert batch.captions is not None
    assert all(caption.startswith("x") for caption in batch.captions)


def test_killed_at_any_file_it_continues(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(Path("data/x.encoded"))
    for number, images in ((0, 0), (1, 4), (3, 9), (5, 9)):
        shutil.rmtree("data/x.encoded")
        write, written = encoded_module.write_whole, []

        def stop_at(
            path: Path, act: object, number: int = number, write: object = write, written: list[Path] = written
        ) -> None:
            if len(written) == number:
                raise KeyboardInterrupt
            written.append(path)
            write(path, act)  # type: ignore[operator]

        with monkeypatch.context() as patch:
            patch.setattr(encoded_module, "write_whole", stop_at)
            stopped = run(f"{ENCODE} --flip")
        said = f"interrupted; {images} of 9 images are encoded, the same command continues"
        assert (stopped.exit_code, stopped.stderr.splitlines()[-1]) == (130, said)
        with pytest.raises(VdiffError, match=r"data/x\.encoded is incomplete: .*; complete it: vdiff data encode"):
            EncodedStore(ImageStore("data/x"))
        before = {path: path.stat().st_mtime_ns for path in Path("data/x.encoded").iterdir()}
        done(f"{ENCODE} --flip")
        assert tree(Path("data/x.encoded")) == whole
        assert all(path.stat().st_mtime_ns == time for path, time in before.items())


def test_a_full_disk_is_one_line_and_it_continues() -> None:
    whole = tree(Path("data/x.encoded"))
    shutil.rmtree("data/x.encoded")
    with full_disk(1000):
        said = error(f"{ENCODE} --flip", 1)
    assert re.match(r"cannot write data/x\.encoded/.*File too large.*; free space", said)
    done(f"{ENCODE} --flip")
    assert tree(Path("data/x.encoded")) == whole


def test_what_does_not_fit_is_one_line() -> None:
    assert "data/x.encoded was encoded with flip True, not False" in error(ENCODE, 1)
    store = ImageStore("data/x")
    found = EncodedStore(store)
    options = {"image_size": 16, "batch_size": 3, "seed": 2}
    without_flips = EncodedStore(store)
    without_flips.key = replace(found.key, flip=False)
    with pytest.raises(VdiffError, match=r"data/x\.encoded has no mirrored images; give --flip False"):
        EncodedBatches(store, without_flips, flip=True, **options)
    of_32_pixels = EncodedStore(store)
    of_32_pixels.key = replace(found.key, image_size=32)
    with pytest.raises(VdiffError, match=r"data/x\.encoded has images of 32 pixels, not 16; encode the dataset again"):
        EncodedBatches(store, of_32_pixels, flip=True, **options)
    store.meta = replace(store.meta, fingerprint="0" * 64)
    with pytest.raises(VdiffError, match=r"data/x\.encoded is of other images or captions"):
        EncodedStore(store)
    part = Path("data/x.encoded/latents-000001.safetensors")
    data = part.read_bytes()
    try:
        part.write_bytes(data[:100])
        with pytest.raises(VdiffError, match=r"latents-000001\.safetensors is damaged"):
            EncodedStore(ImageStore("data/x")).latents([5], [False])
        for place in (8 + int.from_bytes(data[:8], "little"), len(data) - 1):  # a bit of a checksum, and of a tensor
            part.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            with pytest.raises(VdiffError, match=r"latents-000001\.safetensors is damaged: .* match its checksum"):
                EncodedStore(ImageStore("data/x")).latents([4, 5, 6, 7] * 2, [False] * 4 + [True] * 4)
    finally:
        part.write_bytes(data)


def test_a_foreign_folder_is_not_touched(tmp_path: Path) -> None:
    shutil.copytree("data/x", tmp_path / "y")
    (tmp_path / "y.encoded").mkdir()
    (tmp_path / "y.encoded" / "mine.txt").write_text("mine")
    said = error(f"vdiff data encode {tmp_path}/y --base checkpoints/sd --overwrite --device cpu", 1)
    assert "y.encoded" in said
    assert (tmp_path / "y.encoded" / "mine.txt").read_text() == "mine"
