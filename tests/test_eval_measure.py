"""An evaluation from end to end: the same figures after a kill, in two processes, from a cache; what it refuses."""

from __future__ import annotations

import io
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

import vdiff
from tests import evaluating
from tests.commands import image_of
from tests.evaluating import NUM, figures, measured, write_all
from tests.programs import ends, launch
from tests.toy import SIZE, Watcher, signal_at, write_checkpoint, write_dataset
from vdiff.cli.evaluate import table
from vdiff.data.store import DatasetMeta, ImageStore, StoreWriter
from vdiff.diffusion.samplers import Ddim
from vdiff.errors import Interrupted, VdiffError
from vdiff.evaluation import samples
from vdiff.evaluation.features import pixel_vectors
from vdiff.evaluation.metrics import KernelDistance, frechet_distance
from vdiff.evaluation.reference import ReferenceImages
from vdiff.evaluation.results import Evaluation
from vdiff.models.checkpoint import WEIGHTS, load_checkpoint
from vdiff.models.codec import from_uint8, to_uint8
from vdiff.models.drawing import draw, draw_from
from vdiff.reporting import DOUBTFUL_TIMES


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, a teacher, data, and one evaluation that nothing disturbed."""
    folder = tmp_path_factory.mktemp("evaluation")
    write_all(folder)
    measured(folder)
    return folder


def images_of(folder: Path, steps: int, count: int = NUM) -> torch.Tensor:
    denoiser, config = load_checkpoint(folder)
    return draw(denoiser, Ddim(), indices=range(count), image_size=config.image_size, num_steps=steps, seed=3)


def data_of(folder: Path) -> torch.Tensor:
    store = ImageStore(folder)
    pixels = [np.array(image_of(store, SIZE, k)) for k in range(len(store))]
    return from_uint8(torch.from_numpy(np.stack(pixels)[:, None]))


def test_figures_are_those_of_all_samples_at_once(place):
    found = Evaluation.read(place / "out.json")
    assert [(row.num_steps, row.n, row.evaluations) for row in found.rows] == [(2, NUM, 2), (4, NUM, 4)]
    reference = pixel_vectors(data_of(place / "data"))
    for row in found.rows:
        images = images_of(place / "model", row.num_steps)
        vectors = pixel_vectors(from_uint8(to_uint8(images)))
        assert row.metrics["fd"].value == pytest.approx(frechet_distance(vectors, reference), rel=1e-6)
        assert row.metrics["kd"].value == pytest.approx(KernelDistance(reference)(vectors).value, rel=1e-5)
        theirs = images_of(place / "teacher", 8)
        rmse = float((images - theirs).square().mean().sqrt())
        assert row.metrics["rmse"].value == pytest.approx(rmse, rel=1e-5)
        assert row.metrics["psnr"].value == pytest.approx(20 * math.log10(2 / rmse), rel=1e-5)
        far = np.sqrt(((vectors[:, None] - reference) ** 2).mean(2))
        assert row.metrics["nearest"].value == pytest.approx(np.median(far.min(1)), rel=1e-5)
        assert row.metrics["closest"].value == pytest.approx(far.min(), rel=1e-5)
        assert row.closest[0][:2] == np.unravel_index(far.argmin(), far.shape)
        own = np.sqrt(((reference[:, None] - reference) ** 2).mean(2))
        np.fill_diagonal(own, np.inf)
        assert row.metrics["nearest_data"].value == pytest.approx(np.median(own.min(1)), rel=1e-5)
        assert 0 <= row.metrics["precision"].value <= 1
    assert found.reference.num_images == 40
    assert found.teacher_steps == 8
    with PIL.Image.open(place / str(found.pairs)) as picture:
        assert min(picture.size) > 100
    assert [path.name for path in place.glob(".*")] == []


def test_the_file_holds_what_was_found_and_answers_the_same_call(place):
    found = Evaluation.read(place / "out.json")
    assert Evaluation.from_json(found.to_json()) == found
    watcher = Watcher()
    assert measured(place, reporter=watcher) == found
    assert watcher.bars == []
    with pytest.raises(VdiffError, match="holds another evaluation; give another --out to keep both"):
        measured(place, seed=4)


def test_neither_batches_nor_pieces_change_the_figures(place, tmp_path):
    found = Evaluation.read(place / "out.json")
    others = measured(place, out=tmp_path / "out.json", batch_size=64)
    for row, other in zip(found.rows, others.rows, strict=True):
        for name, metric in row.metrics.items():
            assert other.metrics[name].value == pytest.approx(metric.value, rel=1e-4)


def test_one_sample_more_or_another_seed_is_another_job(place, tmp_path):
    found = Evaluation.read(place / "out.json")
    for changes in ({"n": NUM + 1}, {"seed": 4}, {"num_timesteps": (4, 2)}, {"teacher_steps": 4}, {"metrics": ["kd"]}):
        with pytest.raises(VdiffError, match="another evaluation"):
            measured(place, **changes)
    fewer = measured(place, out=tmp_path / "out.json", metrics=["kd"], teacher=None, num_timesteps=(2,))
    assert list(fewer.rows[0].metrics) == ["kd"]
    assert fewer.rows[0].metrics["kd"] == found.rows[0].metrics["kd"]
    assert fewer.pairs is None


def test_a_signal_leaves_what_the_same_call_goes_on_with(place, tmp_path):
    found = Evaluation.read(place / "out.json")
    out = tmp_path / "out.json"
    with pytest.raises(Interrupted, match="the same command continues"):
        measured(place, out=out, reporter=signal_at(37, bar="model, ddim, 4 steps"))
    assert not out.exists()
    watcher = Watcher()
    resumed = measured(place, out=out, reporter=watcher)
    assert figures(resumed.rows) == figures(found.rows)
    assert ("model, ddim, 4 steps", NUM, 30) in watcher.bars  # three pieces of ten were whole
    assert not [bar for bar in watcher.bars if bar[0] == "model, ddim, 2 steps"]
    assert (tmp_path / "out-nearest.png").read_bytes() == (place / "out-nearest.png").read_bytes()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="fork")
@pytest.mark.parametrize("later", [17, pytest.param(4, marks=pytest.mark.slow)])
def test_killed_at_many_moments_it_ends_with_the_same_bits(place, tmp_path, later):
    """Each time after so many updates of a bar more than before."""
    found = Evaluation.read(place / "out.json")
    out = tmp_path / "out.json"
    kills = 0

    def dies(*_: object) -> None:
        nonlocal moments
        moments -= 1
        if not moments:
            os.kill(os.getpid(), signal.SIGKILL)

    for _ in range(60):
        moments = 23 + later * kills
        pid = os.fork()
        if pid == 0:
            measured(place, out=out, cache=tmp_path / "cache", reporter=Watcher(dies))
            os._exit(0)
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0:
            break
        kills += 1
    assert kills >= 3
    ended = Evaluation.read(out)
    assert figures(ended.rows) == figures(found.rows)
    assert ended.job == found.job
    assert (tmp_path / "out-nearest.png").read_bytes() == (place / "out-nearest.png").read_bytes()
    assert [path.name for path in tmp_path.rglob("*") if path.name.startswith(".") or "partial" in path.name] == []


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="gloo")
def test_two_processes_find_what_one_finds(place, tmp_path):
    for name in ("model", "teacher", "data"):
        (tmp_path / name).symlink_to(place / name)
    codes, _, stderr = ends(launch(evaluating.main, tmp_path))
    assert codes == [0, 0], stderr
    one, two = (Evaluation.read(folder / "out.json") for folder in (place, tmp_path))
    assert two.device == "2 × cpu"
    same = [{**row, "checkpoint": "model"} for row in figures(one.rows)]
    assert figures(two.rows) == same


def test_the_data_are_read_once_for_all_evaluations(place, tmp_path, monkeypatch):
    found = Evaluation.read(place / "out.json")
    (cached,) = (place / "cache").glob("reference-*.npz")
    monkeypatch.setattr(ReferenceImages, "batches", lambda *_: pytest.fail("the data are read again"))
    again = measured(place, out=tmp_path / "out.json", metrics=["fd", "kd"], teacher=None)
    assert again.rows[0].metrics["fd"] == found.rows[0].metrics["fd"]
    monkeypatch.undo()
    before = cached.read_bytes()
    cached.write_bytes(before[: len(before) // 2])  # damaged, it is made again
    third = measured(place, out=tmp_path / "third.json", metrics=["fd", "kd"], teacher=None)
    assert third.rows[0].metrics == again.rows[0].metrics
    assert len(cached.read_bytes()) == len(before)


def test_a_planted_copy_is_found(tmp_path):
    """Sample 13 of the model is image 21 of the data."""
    write_checkpoint(tmp_path / "model")
    random = write_dataset(tmp_path / "random", count=40)
    pixels = [np.array(image_of(ImageStore(random), SIZE, k)) for k in range(40)]
    pixels[21] = to_uint8(images_of(tmp_path / "model", 2))[13, 0].numpy()
    (tmp_path / "data").mkdir()
    writer = StoreWriter(tmp_path / "data", DatasetMeta("planted", (SIZE,), 1))
    for image in pixels:
        buffer = io.BytesIO()
        PIL.Image.fromarray(image).save(buffer, format="PNG")
        writer.add({SIZE: buffer.getvalue()}, None)
    writer.finish({"images": 40})
    row = measured(tmp_path, teacher=None, num_timesteps=(2,), metrics=["nearest"]).rows[0]
    assert row.closest[0] == (13, 21, 0.0)
    assert row.metrics["closest"].value == 0
    assert row.closest[1][2] > 0.01
    assert row.metrics["nearest"].value > 0.1


def test_a_teacher_is_equal_to_itself(place, tmp_path):
    found = measured(
        place, checkpoints=[place / "teacher"], num_timesteps=(8,), out=tmp_path / "out.json", metrics=["rmse", "psnr"]
    )
    metrics = found.rows[0].metrics
    assert (metrics["rmse"].value, metrics["psnr"].value) == (0, math.inf)
    assert Evaluation.read(tmp_path / "out.json").rows[0].metrics["psnr"].value == math.inf
    assert json.loads((tmp_path / "out.json").read_text())["rows"][0]["metrics"]["psnr"]["value"] is None


def test_a_row_that_drew_something_else_is_seen(place, tmp_path):
    """The weights are part of the job: changed ones are drawn anew."""
    write_checkpoint(tmp_path / "model")
    first = measured(tmp_path, data=place / "data", teacher=None, metrics=["kd"])
    write_checkpoint(tmp_path / "model", seed=1)
    with pytest.raises(VdiffError, match="another evaluation"):
        measured(tmp_path, data=place / "data", teacher=None, metrics=["kd"])
    second = measured(tmp_path, data=place / "data", teacher=None, metrics=["kd"], overwrite=True)
    assert second.rows[0].metrics != first.rows[0].metrics
    assert second.rows[0].checkpoint_fingerprint != first.rows[0].checkpoint_fingerprint


def test_raw_weights_come_from_the_state_of_the_training(place, tmp_path):
    from vdiff.models.checkpoint import read_tensors, write_tensors

    write_checkpoint(tmp_path / "model", weights="ema")
    with pytest.raises(VdiffError, match="has no raw weights"):
        measured(place, checkpoints=[tmp_path / "model"], raw=True, out=tmp_path / "out.json")
    (tmp_path / "model" / "state").mkdir()
    raw = {f"raw.{name}": tensor for name, tensor in read_tensors(place / "teacher" / WEIGHTS).items()}
    write_tensors(tmp_path / "model" / samples.STATE, raw, {})
    found = measured(
        place, checkpoints=[tmp_path / "model"], raw=True, num_timesteps=(8,), out=tmp_path / "out.json",
        metrics=["rmse"],
    )  # fmt: skip
    assert found.rows[0].weights == "raw"
    assert found.rows[0].metrics["rmse"].value == 0  # they are the teacher's


def test_classes_come_in_turn_and_unlike_models_are_refused(place, tmp_path):
    write_checkpoint(tmp_path / "classes", classes=3)
    found = measured(place, checkpoints=[tmp_path / "classes"], teacher=None, metrics=["kd"], out=tmp_path / "out.json")
    assert any("in turn" in note for note in found.notes)
    write_checkpoint(tmp_path / "colour", channels=3)
    with pytest.raises(VdiffError, match=r"4×4 with 1 channel, .*colour of 4×4 with 3 channels"):
        measured(place, checkpoints=[place / "model", tmp_path / "colour"], out=tmp_path / "x.json")
    with pytest.raises(VdiffError, match=r"the checkpoints generate images of 4×4 with 3 channels, but .*data holds"):
        measured(place, checkpoints=[tmp_path / "colour"], teacher=None, out=tmp_path / "x.json")
    write_checkpoint(tmp_path / "large", image_size=8)
    with pytest.raises(VdiffError, match="has no images of size 8"):
        measured(place, checkpoints=[tmp_path / "large"], teacher=None, out=tmp_path / "x.json")
    for shape in ((1, 8), (1, 4, 8)):
        vdiff.wrap(torch.nn.Identity(), shape).save(tmp_path / "waves")
        with pytest.raises(
            VdiffError, match=f"waves generates samples of {' × '.join(map(str, shape))}, not square images"
        ):
            measured(place, checkpoints=[tmp_path / "waves"], teacher=None, out=tmp_path / "x.json")


def test_notes_say_what_a_reader_must_know(place):
    notes = " ".join(Evaluation.read(place / "out.json").notes)
    assert "n = 60 is below 10,000: fd@60 is biased upwards" in notes
    assert "use kd, which has no bias." in notes
    assert "fd_inf is omitted: it needs 80 samples, 5 for each of the 16 dimensions" in notes
    assert "model was trained on other images than these" in notes


@pytest.mark.parametrize(("n", "is_told"), [(79, False), (80, True)])
def test_the_distance_at_infinity_needs_five_samples_for_each_dimension(place, tmp_path, n, is_told):
    """With 16 dimensions and 24 samples more than half of such figures are negative."""
    found = measured(place, n=n, num_timesteps=(2,), teacher=None, metrics=["fd"], out=tmp_path / "out.json")
    assert list(found.rows[0].metrics) == ["fd", "fd_inf"][: 1 + is_told]
    notes = " ".join(found.notes)
    assert ("fd_inf is omitted: it needs 80 samples" in notes) != is_told
    assert ("use fd_inf." if is_told else "use --metrics kd.") in notes


class Clock:
    """A clock that each drawing moves on by the seconds that are due."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.seconds, self.now = seconds, 0.0

    def monotonic(self) -> float:
        return self.now

    def draw(self, denoiser, sampler, **given):
        images = draw_from(denoiser, sampler, **given)
        due = self.seconds[given["num_steps"]]
        self.now += due.pop(0) if len(due) > 1 else due[0]
        return images


@pytest.mark.parametrize(("again", "is_doubtful"), [(20.0, False), (200.0, True)])
def test_times_that_cannot_be_are_measured_again_and_marked(place, tmp_path, monkeypatch, again, is_doubtful):
    """20 images by 2 steps took 100 s and by 4 steps 40: a batch of each is drawn twice, and the second counts."""
    clock = Clock({2: [100.0, 100.0, again], 4: [40.0, 50.0]})
    monkeypatch.setattr("vdiff.evaluation.samples.draw_from", clock.draw)
    monkeypatch.setattr("vdiff.evaluation.samples.time", clock)
    monkeypatch.setattr("vdiff.evaluation.measure.time", clock)
    monkeypatch.setattr("vdiff.evaluation.samples.SampleBlocks.pieces", lambda _: [range(10)])
    watcher = Watcher()
    found = measured(
        place, n=20, batch_size=20, teacher=None, metrics=["kd"], out=tmp_path / "out.json", reporter=watcher
    )
    assert [bar[0] for bar in watcher.bars].count("timing again") == 2
    assert [completed for name, completed in watcher.seen if name == "timing again"][-1] == 2 * 20
    assert [row.ms_per_image for row in found.rows] == pytest.approx([50 * min(again, 100), 2000])
    assert [row.is_time_doubtful for row in found.rows] == [is_doubtful, is_doubtful]
    assert (DOUBTFUL_TIMES in found.notes) == is_doubtful
    assert Evaluation.read(tmp_path / "out.json") == found
    assert [row[-2] for row in table(found)[1]] == [f"{row.ms_per_image:.2f}{' ?' * is_doubtful}" for row in found.rows]


def test_a_cache_that_cannot_be_written_is_done_without(place, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    watcher = Watcher()
    found = measured(place, cache=tmp_path / "file" / "vdiff", out=tmp_path / "out.json", reporter=watcher)
    assert figures(found.rows) == figures(Evaluation.read(place / "out.json").rows)
    (line,) = [line for line in watcher.lines if "cannot be written" in line]
    assert line.startswith(f"{tmp_path / 'file' / 'vdiff'} cannot be written (Not a directory): ")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def refuse(**_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("vdiff.evaluation.reference.tempfile.TemporaryFile", refuse)
    watcher = Watcher()
    measured(place, seed=9, out=tmp_path / "other.json", reporter=watcher)  # what lies in it is read all the same
    assert watcher.lines == []
    assert "reference" not in [bar[0] for bar in watcher.bars]


def test_work_is_divided_alike_whatever_does_it():
    blocks = samples.SampleBlocks(1003, 64)
    pieces = [blocks.samples(piece) for piece in blocks.pieces()]
    assert [k for piece in pieces for k in piece] == list(range(1003))
    assert min(map(len, pieces[:-1])) >= samples.PIECE_IMAGES
    sizes = {len(blocks.block(k)) for k in range(blocks.num_blocks)}
    assert max(sizes) - min(sizes) <= 1
    assert samples.SampleBlocks(50_000, 2048).num_blocks == 10
    assert samples.SampleBlocks(20, 4).num_blocks == 10


def test_files_that_are_no_evaluation(tmp_path, place):
    text = (place / "out.json").read_text()
    values = json.loads(text)
    wrong = {
        "nothing": "",
        "a list": "[]",
        "format": json.dumps({**values, "format": 2}),
        "lacks": json.dumps({key: value for key, value in values.items() if key != "reference"}),
        "more": json.dumps({**values, "surprise": 1}),
        "kind": json.dumps({**values, "features": 3}),
        "row": json.dumps({**values, "rows": [{"metrics": {}}]}),
        "deep": "[" * 100_000,
    }
    for name, bad in wrong.items():
        (tmp_path / "x.json").write_text(bad)
        with pytest.raises(VdiffError, match=r"x\.json.*not an evaluation"):
            Evaluation.read(tmp_path / "x.json")
        with pytest.raises(VdiffError, match="not an evaluation"):
            measured(place, out=tmp_path / "x.json")
        assert name
    with pytest.raises(VdiffError, match="cannot be read"):
        Evaluation.read(tmp_path / "none.json")
    rows_of = replace(Evaluation.from_json(text), rows=())
    assert Evaluation.from_json(rows_of.to_json()) == rows_of
