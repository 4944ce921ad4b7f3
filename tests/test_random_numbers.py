"""Random numbers of an update: Philox against NumPy's, distributions by statistics, the same bits in any batch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.toy import (
    UNET,
    Watcher,
    assert_equal_bits,
    distill_config,
    fit_run,
    run_of,
    signal_at,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.data.batches import Batch
from vdiff.errors import Interrupted
from vdiff.models.checkpoint import WEIGHTS, read_config, read_metadata
from vdiff.models.unet_config import UNetConfig
from vdiff.training.dataset import open_images
from vdiff.training.engine import Engine, build_engine
from vdiff.training.loop import Run
from vdiff.training.objectives import StudentState, TrainBatch, TrainTarget
from vdiff.training.random_numbers import (
    DROPPED,
    GUIDANCE,
    NOISE,
    TIMES,
    UpdateRandom,
    normal_of,
    philox,
    philox_on_device,
)
from vdiff.training.stages import plan_stages
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep
from vdiff.training.student import stage_run

CPU = torch.device("cpu")
PLACES = [
    (0, 0, NOISE, range(6)),
    (2**32 - 1, 10**6, GUIDANCE, range(7, 30)),
    (5, 3, TIMES, range(2**40, 2**40 + 4)),
    (1, 2**31, DROPPED, range(2**62, 2**62 + 2)),
]


def random_of(rows: range, seed: int = 0, update: int = 0) -> UpdateRandom:
    return UpdateRandom(seed, update, rows, CPU)


# Bits


@pytest.mark.parametrize(("seed", "update", "purpose", "blocks"), PLACES)
def test_tensors_make_the_bits_of_numpy_s_philox(seed, update, purpose, blocks):
    for make in (philox, philox_on_device):
        words = make(seed, update, purpose, blocks, CPU)
        assert (words.shape, words.dtype) == ((len(blocks), 4), torch.int64)
        for row, block in zip(words, blocks, strict=True):
            theirs = np.random.Philox(key=np.array([seed, 0], np.uint64), counter=[block, update, purpose, 0])
            assert row.tolist() == theirs.random_raw(4).view(np.int64).tolist()


def test_philox_of_the_paper():
    """The published answer of Philox 4×64-10 to a counter and a key of zeros (Random123, kat_vectors)."""
    first = philox_on_device(0, 0, 0, range(-1, 0), CPU)[0]
    expected = ["16554d9eca36314c", "db20fe9d672d0fdc", "d7e772cee186176b", "7e68b68aec7ba23b"]
    assert [f"{word % 2**64:016x}" for word in first.tolist()] == expected


def test_a_sample_has_its_numbers_in_any_part_of_any_batch():
    for shape in ((3, 5, 7), (8,), (1, 64)):
        whole = random_of(range(13)).normal(shape)
        assert whole.shape == (13, *shape)
        for rows in (range(4), range(3, 4), range(5, 13)):
            assert torch.equal(random_of(rows).normal(shape), whole[rows.start : rows.stop])
    for purpose in (TIMES, DROPPED, GUIDANCE):
        whole = random_of(range(13)).uniform(purpose)
        assert torch.equal(random_of(range(5, 13)).uniform(purpose), whole[5:])


def test_many_samples_are_made_in_chunks_of_the_same_bits(monkeypatch):
    whole = random_of(range(9)).normal((10,))
    monkeypatch.setattr("vdiff.training.random_numbers.CHUNK", 40)
    assert torch.equal(random_of(range(9)).normal((10,)), whole)


def test_seeds_updates_purposes_and_samples_share_no_numbers():
    kinds = [random_of(range(64), seed, update).normal((64,)) for seed in (0, 1) for update in (0, 1)]
    rows = torch.cat([*kinds, *(row.T for row in kinds)]).double()
    correlations = (rows @ rows.T / 64).fill_diagonal_(0)[:256, :256]
    assert correlations.abs().max() < 6 / 8  # 65,536 normal numbers of deviation 1/8
    times = [random_of(range(4096), seed, update).uniform(purpose)
             for seed in (0, 1) for update in (0, 1) for purpose in (TIMES, DROPPED, GUIDANCE)]  # fmt: skip
    matrix = torch.corrcoef(torch.stack(times)).fill_diagonal_(0)
    assert matrix.abs().max() < 5 / 64


# Distributions


def largest_gap(values: torch.Tensor, cumulative: torch.Tensor) -> float:
    """√n times the Kolmogorov-Smirnov distance, `cumulative` being the distribution at the sorted values."""
    assert values.diff().min() >= 0
    n = len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    return float(torch.maximum((steps[1:] - cumulative).max(), (cumulative - steps[:-1]).max()) * math.sqrt(n))


def test_uniform_numbers_are_uniform():
    u = random_of(range(2**16), 3).uniform(TIMES)
    assert (u.dtype, bool((u >= 0).all()), bool((u < 1).all())) == (torch.float64, True, True)
    assert largest_gap(u.sort().values, u.sort().values) < 1.95  # 1 in 1000
    assert (u * 2**53 == (u * 2**53).round()).all()
    assert (u * 2**53 % 2).mean() == pytest.approx(0.5, abs=0.01)  # to the last bit


def test_normal_numbers_are_normal():
    x = random_of(range(2**12), 7).normal((256,)).flatten().double()
    ordered = x.sort().values
    assert largest_gap(ordered, torch.special.ndtr(ordered)) < 1.95
    count = len(x)
    for power, moment in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(math.prod(range(1, 2 * power, 2)) / count)
        assert float((x**power).mean()) == pytest.approx(moment, abs=4.5 * spread)
    for bound in (3.0, 4.0):
        expected = count * math.erfc(bound / math.sqrt(2))
        assert float((x.abs() > bound).sum()) == pytest.approx(expected, abs=5 * math.sqrt(expected))


def test_the_normal_number_of_bits_is_the_quantile():
    m = torch.cat(
        [torch.arange(4096), 2 ** torch.arange(31), 2**31 - 1 - torch.arange(4096), torch.arange(0, 2**31, 65537)]
    )
    exact = -torch.special.ndtri((m.double() + 0.5) / 2**32)
    for words, sign in ((m.int(), 1), ((m - 2**31).int(), -1)):
        torch.testing.assert_close(normal_of(words).double(), sign * exact, rtol=0, atol=6e-7)
    assert normal_of(torch.tensor([0], dtype=torch.int32)).item() == pytest.approx(6.338, abs=1e-3)


# Updates


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("random") / "toy_4")


class ShownError(Exception):
    """What an update was given."""


def given_to(
    run: Run, engine: Engine, step: int, *, old: bool = False, classes: torch.Tensor | None = None
) -> TrainBatch:
    """The batch that the objective sees in an update, the first part of it."""

    def show(batch: TrainBatch, _: StudentState) -> TrainTarget:
        raise ShownError(batch)

    update = TrainStep(replace(run, objective=show), engine)
    update.draws_whole_batch = old
    share = engine.part(run.config.batch_size)
    with pytest.raises(ShownError) as shown:
        update(step, Batch(torch.zeros(share.stop - share.start, 1, 4, 4), None if classes is None else classes[share]))
    batch: TrainBatch = shown.value.args[0]
    return batch


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_draw_the_batch_of_one(data, tmp_path, monkeypatch, old, world_size):
    """Bit for bit, noise and times; each draws its own alone, but for runs of earlier versions."""
    config = train_config(data, batch_size=8)
    run, engine = run_of(config, tmp_path / "run"), build_engine(config)
    whole = given_to(run, engine, 3, old=old)
    drawn = []
    monkeypatch.setattr(
        "vdiff.training.random_numbers.philox",
        lambda *words: drawn.append((words[2], list(words[3]))) or philox(*words),
    )
    for rank in range(world_size):
        part = given_to(run, replace(engine, rank=rank, world_size=world_size), 3, old=old)
        share = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
        assert torch.equal(part.noise, whole.noise[share])
        assert torch.equal(part.u, whole.u[share])
    assert whole.u.diff().min() > 0
    for purpose, blocks_of_a_sample in ((NOISE, 2), (TIMES, 1)):
        blocks = [block for which, found in drawn if which == purpose for block in found]
        assert blocks == ([] if old else list(range(8 * blocks_of_a_sample)))  # each of them once
    assert not torch.equal(given_to(run, engine, 4, old=old).noise, whole.noise)
    assert not torch.equal(given_to(run, engine, 3, old=not old).noise, whole.noise)


@pytest.mark.parametrize("old", [False, True])
def test_processes_and_parts_have_the_classes_and_weights_of_guidance_of_one(tmp_path, old):
    """Some classes are dropped; a part of a batch (`grad_accum`) has what its samples have in the whole."""
    data, base = write_dataset(tmp_path / "classes_4", classes=("a", "b")), tmp_path / "original"
    unet = {**UNET, "in_channels": 1, "out_channels": 1, "num_classes": 2, "null_class": True}
    write_checkpoint(base, dataset=str(data), unet=UNetConfig.from_dict(unet).to_dict(), class_names=["a", "b"])
    config = distill_config(data, base, method="guided", class_dropout=0.4, batch_size=16)
    (stage,), images, engine = plan_stages(config, read_config(base)), open_images(str(data), 4), build_engine(config)
    run = stage_run(stage, stage.settings(config), images, engine, {})
    classes = torch.arange(16) % 2
    whole = given_to(run, engine, 3, old=old, classes=classes)
    dropped = whole.condition.tensors["classes"] == 2
    assert 0 < dropped.sum() < 16
    assert torch.equal(whole.condition.tensors["classes"][~dropped], classes[~dropped])
    weights = whole.condition.tensors["guidance"]
    assert 0 <= weights.min() < 1.5
    assert 2.5 < weights.max() <= 4
    in_parts = replace(run, config=replace(run.config, grad_accum=2))
    for found, rows in (
        *((given_to(run, replace(engine, rank=k, world_size=2), 3, old=old, classes=classes), slice(8 * k, 8 * k + 8))
          for k in range(2)),
        (given_to(in_parts, replace(engine, rank=1, world_size=2), 3, old=old, classes=classes), slice(8, 12)),
        (given_to(in_parts, engine, 3, old=old, classes=classes), slice(0, 8)),
    ):  # fmt: skip
        for name, tensor in whole.condition.tensors.items():
            assert torch.equal(found.condition.tensors[name], tensor[rows])
        assert torch.equal(found.noise, whole.noise[rows])
        assert torch.equal(found.u, whole.u[rows])


def test_a_run_of_an_earlier_version_goes_on_with_its_random_numbers(data, tmp_path, monkeypatch):
    """Its state has no mark: cut and gone on with, twice, it ends with the bits of that version."""
    config = train_config(data)
    with monkeypatch.context() as before:
        before.setattr(TrainStep, "draws_whole_batch", property(lambda _: True, lambda *_: None), raising=False)
        fit_run(run_of(config, tmp_path / "whole"))
        with pytest.raises(Interrupted):
            fit_run(run_of(config, tmp_path / "cut"), signal_at(2))
    with pytest.raises(Interrupted):
        fit_run(run_of(config, tmp_path / "cut"), again := signal_at(4))
    assert "cut was begun by an earlier version: it continues with that version's random numbers" in again.lines[0]
    assert "random" not in read_metadata(state_path(tmp_path / "cut"))
    fit_run(run_of(config, tmp_path / "cut"))
    for name in (Path(WEIGHTS), state_path(Path())):
        assert_equal_bits(tmp_path / "cut" / name, tmp_path / "whole" / name)
    fit_run(run_of(config, tmp_path / "new"), new := Watcher())
    assert not any("earlier version" in line for line in new.lines)
    assert read_metadata(state_path(tmp_path / "new"))["random"] == "philox"
    with pytest.raises(AssertionError, match="tensors differ"):
        assert_equal_bits(tmp_path / "new" / WEIGHTS, tmp_path / "whole" / WEIGHTS)
