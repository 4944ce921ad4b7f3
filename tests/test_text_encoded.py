"""Text-to-image training on encoded datasets and on buckets."""

from __future__ import annotations

import shutil
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

from tests.commands import done
from tests.pipelines import pipeline
from tests.test_text_training import resolved, run
from tests.text_training import write_captioned, write_text_checkpoint
from tests.toy import Watcher, assert_equal_bits, signal_at
from vdiff.data.batches import BucketPlan
from vdiff.errors import Interrupted, OptionError, VdiffError
from vdiff.models.checkpoint import ADAPTER, load_checkpoint, read_tensors
from vdiff.training.base import describe
from vdiff.training.engine import build_engine
from vdiff.training.inputs import encoded_of, inputs_of
from vdiff.training.random_numbers import UpdateRandom
from vdiff.training.state import state_path

KINDS = ("sd15", "sdxl")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of the tiny pipelines, a captioned dataset, and one of buckets."""
    folder = tmp_path_factory.mktemp("text")
    write_captioned(folder / "data")
    (folder / "photos").mkdir()
    for number, size in enumerate([(260, 66), (66, 260), (130, 130), (280, 70), (70, 280)] * 3):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text(f"a photo of {number}")
    line = f"prepare_data.py {folder}/photos --size 128 --buckets --bucket_step 64 --format png --num_workers 0"
    done(f"{line} --out {folder}/buckets")
    done(f"{line.replace('step 64', 'step 32')} --out {folder}/odd")
    for kind in KINDS:
        write_text_checkpoint(folder / kind, kind)
    return folder


def drawn(place: Path, kind: str, data: Path, *, encoded: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """x and the embeddings of the first two batches of a run."""
    config, images = resolved(place, kind, data=str(data), caption_dropout=0.5, flip=True)
    description, engine = describe(config, images), build_engine(config)
    found = encoded_of(images, description, Watcher())
    assert found is not None
    if encoded:
        images = replace(images, encoded=found)
    inputs = inputs_of(description, engine.device, found if encoded else None)
    network = load_checkpoint(place / kind)[0].network
    xs, conditions = [], []
    with closing(images.batches(config, engine).start_at(0)) as batches, torch.no_grad():
        for step, batch in enumerate(islice(batches, 2)):
            xs.append(inputs.x(batch, engine.device, UpdateRandom(0, step, range(4), engine.device)).flatten())
            condition = network.encode(inputs.condition(batch, description.signature))
            conditions.append(condition.tensors)
    return torch.cat(xs), {f"{name} {k}": x for k, found in enumerate(conditions) for name, x in found.items()}


@pytest.mark.parametrize(("kind", "data"), [("sd15", "data"), ("sdxl", "data"), ("sdxl", "buckets")])
def test_training_on_encoded_data_is_training_on_pictures(place: Path, tmp_path: Path, kind: str, data: str) -> None:
    folder = tmp_path / data
    shutil.copytree(place / data, folder)
    done(f"vdiff data encode {folder} --base {place / kind} --device cpu --flip")
    (fresh, fresh_condition), (kept, kept_condition) = (drawn(place, kind, folder, encoded=e) for e in (False, True))
    torch.testing.assert_close(kept, fresh, rtol=1e-5, atol=1e-5)
    assert kept_condition.keys() == fresh_condition.keys()
    assert {"text 0", "text 1"} <= kept_condition.keys()
    for name, tensor in fresh_condition.items():
        torch.testing.assert_close(kept_condition[name], tensor, rtol=1e-5, atol=1e-5)
    if data == "buckets":
        sizes = kept_condition["time_ids 0"].tolist()
        assert len({tuple(row[4:]) for row in sizes}) == 1
        assert sizes[0][:2] != sizes[0][4:]
    # whole runs: cut and resumed, the same bits; another base is refused
    flags = {"data": str(folder), "num_iters": 3, "flip": True}
    watcher = Watcher()
    run(place, kind, tmp_path / "whole", watcher, **flags)
    assert f"latents and text embeddings of {folder}.encoded" in watcher.lines
    with pytest.raises(Interrupted):
        run(place, kind, tmp_path / "cut", signal_at(2), **flags)
    run(place, kind, tmp_path / "cut", **flags)
    for name in (ADAPTER, state_path(Path())):
        assert_equal_bits(tmp_path / "whole" / name, tmp_path / "cut" / name)
    other = "sd15" if kind == "sdxl" else "sdxl"
    with pytest.raises(VdiffError, match=r"\.encoded is of another autoencoder .*; encode again: vdiff data encode"):
        run(place, other, tmp_path / "other", **flags)
    refused = {
        "has text embeddings, and the text encoders of this model learn or have learned": {"train_text_encoder": True},
        "has latents of the base's autoencoder; remove it, or leave --vae out": {"vae": str(pipeline(kind))},
    }
    if kind == "sdxl":  # the sides of the tiny 1.5 are multiples of those of its images
        refused["has whole images; remove the folder, or give --random_crop 0"] = {"random_crop": 32}
    for k, (message, more) in enumerate(refused.items()):
        with pytest.raises(VdiffError, match=message):
            run(place, kind, tmp_path / f"other_{k}", **flags, **more)


def test_training_on_buckets(place: Path, tmp_path: Path) -> None:
    flags = {"data": str(place / "buckets"), "num_iters": 5, "batch_size": 2}
    config, images = resolved(place, "sd15", **flags)
    assert isinstance(images.batches(config, build_engine(config)).plan, BucketPlan)  # type: ignore[attr-defined]
    run(place, "sd15", tmp_path / "run", **flags)
    assert any(
        tensor.abs().max() > 0 for name, tensor in read_tensors(tmp_path / "run" / ADAPTER).items() if "B" in name
    )
    with pytest.raises(OptionError, match="buckets with a --bucket_step of such multiples"):
        resolved(place, "sd15", data=str(place / "odd"))
