"""Noise levels by importance: the expected loss stays what it was, and the statistics are those of all processes."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.oracles import randn
from tests.toy import (
    assert_equal_bits,
    distill_config,
    run_ladder,
    run_of,
    signal_at,
    train_config,
    write_checkpoint,
    write_dataset,
)
from vdiff.data.batches import Batch
from vdiff.diffusion.targets import grid_times_of
from vdiff.errors import Interrupted, OptionError
from vdiff.models.checkpoint import WEIGHTS, read_config, read_metadata, read_tensors, write_tensors
from vdiff.training.engine import Engine, build_engine
from vdiff.training.importance import ImportanceSampling, num_bins
from vdiff.training.objectives import stratified
from vdiff.training.state import state_path
from vdiff.training.step import TrainStep

ALONE: Engine = SimpleNamespace(sum=lambda values: values)
ROOTS = [0.5, 3.0, 0.01, 1.2, 0.0]
"""The root mean square of the losses in five bins."""


def learned(roots: list[float]) -> ImportanceSampling:
    """One that has seen these root mean squares, twice in each bin: 0.6 and 1.28 times."""
    found = ImportanceSampling(len(roots), torch.device("cpu"))
    u = (torch.arange(len(roots)).repeat_interleave(2).double() + torch.tensor([0.1, 0.9] * len(roots))) / len(roots)
    squares = torch.tensor([0.4, 1.6]).repeat(len(roots)) * torch.tensor(roots).repeat_interleave(2) ** 2
    found.learn(u, squares.sqrt(), ALONE)
    return found


def density_by_hand(roots: list[float]) -> list[float]:
    return [0.9 * root / (sum(roots) / len(roots)) + 0.1 for root in roots]


# The density


def test_the_density_follows_the_roots_of_mean_squares():
    """f = 0.9 √m/mean(√m) + 0.1."""
    assert learned(ROOTS).density().tolist() == pytest.approx(density_by_hand(ROOTS), rel=1e-5)
    assert learned(ROOTS).density().mean().item() == pytest.approx(1, rel=1e-6)
    assert learned([0.3, 0.3]).density().tolist() == pytest.approx([1, 1])


def test_squares_are_remembered_by_a_moving_average():
    """m ← 0.95 m + 0.05 (mean of the update's squares in the bin), the first update's alone at first."""
    found = ImportanceSampling(3, torch.device("cpu"))
    assert found.moments.tolist() == [-1, -1, -1]
    found.learn(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([2.0, 4.0, 5.0]), ALONE)
    assert found.moments.tolist() == [10, 25, -1]
    found.learn(torch.tensor([0.3, 0.99]), torch.tensor([1.0, 0.5]), ALONE)
    assert found.moments.tolist() == pytest.approx([0.95 * 10 + 0.05 * 1, 25, 0.25], rel=1e-6)
    found.learn(torch.tensor([0.0, 0.34, 0.35]), torch.tensor([0.0, 3.0, 1.0]), ALONE)
    assert found.moments.tolist() == pytest.approx([0.95 * 9.55, 0.95 * 25 + 0.05 * 5, 0.25], rel=1e-6)
    nothing = ImportanceSampling(1, torch.device("cpu"))
    for loss in (0.0, 2.0):
        nothing.learn(torch.tensor([0.5]), torch.tensor([loss]), ALONE)
    assert nothing.moments.item() == pytest.approx(0.05 * 4)  # 0 was a loss as good as any


@pytest.mark.parametrize("unseen", range(4))
def test_until_every_bin_was_seen_all_are_alike(unseen):
    found = ImportanceSampling(4, torch.device("cpu"))
    u = torch.tensor([0.1, 0.3, 0.6, 0.8], dtype=torch.float64)
    seen = torch.arange(4) != unseen
    found.learn(u[seen], torch.tensor([5.0, 1.0, 0.1, 2.0])[seen], ALONE)
    assert found.density().tolist() == [1, 1, 1, 1]
    numbers = stratified(1000)
    drawn, counts = found.draw(numbers)
    torch.testing.assert_close(drawn, numbers, rtol=0, atol=1e-5)
    assert counts.tolist() == [1] * 1000
    found.learn(u[~seen], torch.tensor([0.2]), ALONE)
    assert found.density().tolist() != [1, 1, 1, 1]


def test_where_all_losses_are_zero_all_are_alike():
    assert learned([0.0, 0.0, 0.0]).density().tolist() == [1, 1, 1]


# What is drawn


@pytest.mark.parametrize("roots", [ROOTS, [1.0], [2.0, 1e-9], [float(k % 7) for k in range(64)]])
def test_the_weighted_mean_is_the_uniform_mean_exactly(roots):
    """∫ g(u'(u))/f(u'(u)) du = ∫ g(u) du: by Gauss's quadrature in every bin, exact for polynomials."""
    found, bins = learned(roots), len(roots)
    ends = np.concatenate([[0], np.cumsum(found.density().double().numpy())]) / bins
    ends /= ends[-1]
    nodes, shares = np.polynomial.legendre.leggauss(6)
    for power in (0, 1, 2, 7):
        total = 0.0
        for k in range(bins):
            u = torch.from_numpy(ends[k] + (ends[k + 1] - ends[k]) * (nodes + 1) / 2)
            drawn, counts = found.draw(u)
            of_bin = (ends[k + 1] - ends[k]) / 2 * (shares * (counts * drawn**power).numpy()).sum()
            expected = (((k + 1) / bins) ** (power + 1) - (k / bins) ** (power + 1)) / (power + 1)
            assert of_bin == pytest.approx(expected, rel=1e-6, abs=1e-12)
            total += of_bin
        assert total == pytest.approx(1 / (power + 1), rel=1e-6)


def test_the_weighted_mean_of_a_sample_is_the_uniform_mean():
    """To within the error of the sample; that of the loss it was made for is smaller than with uniform numbers."""
    torch.manual_seed(0)
    found, count = learned(ROOTS), 200_000
    u = torch.rand(count, dtype=torch.float64)
    drawn, counts = found.draw(u)
    for function in (torch.sin, torch.exp, lambda values: (values * 5).floor()):
        product = counts * function(drawn)
        grid = function((torch.arange(10**6, dtype=torch.float64) + 0.5) / 10**6).mean()
        assert abs(product.mean() - grid) < 4 * product.std() / math.sqrt(count)
    assert counts.mean().item() == pytest.approx(1, abs=4 * counts.std().item() / math.sqrt(count))

    def loss(values: Tensor) -> Tensor:
        return torch.tensor(ROOTS).double()[(values * 5).long()]

    weighted = counts * loss(drawn)
    assert weighted.mean().item() == pytest.approx(sum(ROOTS) / 5, rel=0.01)
    assert weighted.std() < 0.2 * loss(u).std()


def test_numbers_are_drawn_as_often_as_the_density_says():
    """Rising with u, uniform in each bin; weights are 1/f of the bin that a number lies in."""
    found, count = learned(ROOTS), 10**5
    u = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn, counts = found.draw(u)
    assert (drawn.diff() > 0).all()
    bins = (drawn * 5).long()
    expected = torch.tensor(density_by_hand(ROOTS), dtype=torch.float64)
    torch.testing.assert_close(counts, 1 / expected[bins], rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.bincount(bins).double() / count, expected / 5, rtol=0, atol=1e-4)
    for k in range(5):
        inside = drawn[bins == k] * 5 - k
        assert inside.min() >= 0
        assert inside.max() < 1
        assert inside.mean().item() == pytest.approx(0.5, abs=1e-3)
    assert drawn.dtype == counts.dtype == torch.float64


@pytest.mark.parametrize("bins", [1, 2, 3, 5, 6, 7, 11, 49, 64])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_number_leaves_its_bin_at_an_edge(bins, dtype):
    """Numbers at and beside the edges of the bins have the weight of the bin that they are counted in afterwards."""
    torch.manual_seed(1)
    found = learned((torch.rand(bins) + 0.01).tolist())
    density = found.density().to(dtype)
    ends = density.cumsum(0) / bins
    edges = torch.cat([torch.zeros(1, dtype=dtype), (ends / ends[-1])[:-1]])
    near = [edges, edges.nextafter(torch.ones_like(edges)), edges[1:].nextafter(torch.zeros_like(edges[1:]))]
    last = torch.tensor([1 - torch.finfo(dtype).eps / 2], dtype=dtype)
    drawn, counts = found.draw(torch.cat([*near, last]))
    assert drawn.min() >= 0
    assert drawn.max() < 1
    torch.testing.assert_close(counts, 1 / density[(drawn * bins).long()], rtol=1e-6, atol=0)
    steps = (grid_times_of(drawn, bins) * bins).round().long() - 1
    assert torch.equal(steps, (drawn * bins).long())


# What is learned


def test_the_statistics_are_those_of_all_processes():
    """Each takes in its share; what they know of the whole batch is what one process would know."""
    torch.manual_seed(0)
    u = stratified(12)
    losses = [torch.rand(12) for _ in range(3)]
    one = ImportanceSampling(4, torch.device("cpu"))
    many = [ImportanceSampling(4, torch.device("cpu")) for _ in range(3)]
    for each in losses:
        one.learn(u, each, ALONE)
        shares = [slice(4 * k, 4 * k + 4) for k in range(3)]
        sent: list[Tensor] = []
        recording = SimpleNamespace(sum=lambda values, sent=sent: sent.append(values) or values)
        for share in shares:
            ImportanceSampling(4, torch.device("cpu")).learn(u[share], each[share], recording)
        total = SimpleNamespace(sum=lambda _, sent=sent: torch.stack(sent).sum(0))
        for share, process in zip(shares, many, strict=True):
            process.learn(u[share], each[share], total)
    for process in many:
        torch.testing.assert_close(process.moments, one.moments, rtol=1e-6, atol=0)
        assert torch.equal(process.moments, many[0].moments)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_losses_that_are_no_numbers_count_nothing(bad):
    found = learned([1.0, 2.0])
    before = found.moments.clone()
    found.learn(torch.tensor([0.1, 0.9]), torch.tensor([bad, bad]), ALONE)
    assert torch.equal(found.moments, before)
    found.learn(torch.tensor([0.1, 0.2]), torch.tensor([bad, 3.0]), ALONE)
    assert found.moments.tolist() == pytest.approx([0.95 * 1 + 0.05 * 9, 4])


def test_a_loss_whose_square_is_infinite_is_forgotten_again():
    found = learned([1.0, 2.0, 3.0])
    found.learn(torch.tensor([0.1, 0.2]), torch.tensor([1e25, 1e30]), ALONE)
    assert found.density().isfinite().all()
    assert found.density().tolist() == pytest.approx([2.8, 0.1, 0.1], abs=1e-6)
    u = (torch.arange(30, dtype=torch.float64) + 0.5) / 30
    for _ in range(1500):
        found.learn(u, (u * 3).floor() + 1, ALONE)
    assert found.density().tolist() == pytest.approx(density_by_hand([1.0, 2.0, 3.0]), rel=1e-3)


def test_a_bin_for_each_step_as_long_as_they_are_few():
    assert [num_bins(steps) for steps in (1, 2, 63, 64, 65, 1024, None)] == [1, 2, 63, 64, 64, 64, 64]


# In the loop


class Fixed:
    """An importance sampling whose numbers and weights are known."""

    def __init__(self, counts: Tensor) -> None:
        self.counts, self.learned = counts, []

    def draw(self, u: Tensor) -> tuple[Tensor, Tensor]:
        return u.flip(0), self.counts

    def learn(self, u: Tensor, losses: Tensor, engine: Engine) -> None:
        self.learned.append((u, losses, engine))


def one_update(data, tmp_path, importance, **settings):
    """The gradient and result of one update, and the importance sampling's reports."""
    run = run_of(train_config(data, dropout=0.0, clip_norm=1e9, warmup_iters=0, **settings), tmp_path / "run")
    seen, plain = [], run.objective

    def objective(draws, pupil):
        seen.append(draws.u)
        return plain(draws, pupil)

    run, engine = dataclasses.replace(run, objective=objective), build_engine(run.config)
    weights = list(run.denoiser.parameters())
    for i, parameter in enumerate(weights):
        parameter.data.copy_(0.3 * randn(*parameter.shape, seed=i))
    gradient: list[Tensor] = []
    update = TrainStep(run, engine)
    update.importance = importance
    update.optimizer.register_step_pre_hook(lambda *_: gradient.extend(each.grad.clone() for each in weights))
    images = torch.arange(4 * 16, dtype=torch.uint8).reshape(4, 1, 4, 4) * 3
    result = update(0, Batch(images, None))
    return gradient, result, torch.cat(seen), engine


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory):
    return write_dataset(tmp_path_factory.mktemp("importance") / "toy_4")


def test_a_loss_counts_as_often_as_it_is_weighted(data, tmp_path):
    """The gradient is that of the weighted mean, in any number of parts; what is learned are the losses alone."""
    counts = torch.tensor([2.0, 0.5, 0.25, 3.0], dtype=torch.float64)
    plain = [Fixed(row) for row in torch.eye(4, dtype=torch.float64)]
    rows = [one_update(data, tmp_path, each)[0] for each in plain]
    for parts in (1, 2):
        importance = Fixed(counts)
        gradient, result, asked, engine = one_update(data, tmp_path, importance, grad_accum=parts)
        for found, *single in zip(gradient, *rows, strict=True):
            expected = sum(count * each for count, each in zip(counts.tolist(), single, strict=True))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
        ((u, losses, told_engine),) = importance.learned
        assert torch.equal(u, asked)
        assert (u.diff() < 0).all()
        assert torch.equal(losses, result.losses)
        assert told_engine is engine
        assert torch.equal(result.counts, counts)
    unweighted, result, _, _ = one_update(data, tmp_path, None)
    assert result.counts is None
    assert len(unweighted) == len(rows[0])


@pytest.fixture
def teacher(tmp_path):
    write_checkpoint(tmp_path / "original")
    return tmp_path / "original"


IMPORTANCE = {"times": "importance", "num_iters": 6, "batch_size": 8, "check_images": 0, "tracker": "none"}


def test_a_run_that_is_cut_goes_on_with_its_statistics(data, teacher):
    """4 steps, so 4 bins, all of them seen after the first update; the state has their mean squares."""
    config, described = distill_config(data, teacher, **IMPORTANCE), read_config(teacher)
    folder = teacher.parent / "base_0"
    for name, settings in (("whole", {}), ("uniform", {"times": "uniform"})):
        run_ladder(distill_config(data, teacher, **{**IMPORTANCE, **settings}), described, out=teacher.parent / name)
    for update in (1, 3):
        with pytest.raises(Interrupted):
            run_ladder(config, described, reporter=signal_at(update))
        moments = read_tensors(state_path(folder))["statistics.moments"]
        assert moments.shape == (4,)
        assert (moments > 0).all()
    run_ladder(config, described)
    assert_equal_bits(folder / WEIGHTS, teacher.parent / "whole" / WEIGHTS)
    with pytest.raises(AssertionError, match="differ"):
        assert_equal_bits(folder / WEIGHTS, teacher.parent / "uniform" / WEIGHTS)


@pytest.mark.parametrize("method", ["tract", "consistency"])
def test_a_student_of_one_step_has_a_bin_for_each_of_its_teacher_s_steps(data, teacher, method):
    """Its examples lie at 8 times, though it has but one step; the statistics go on from where a run was cut."""
    settings = {**IMPORTANCE, "method": method, "phases": "8,1", "num_iters": 2}
    config, described = distill_config(data, teacher, **settings), read_config(teacher)
    folder = teacher.parent / "base_0"
    for name, changes in (("whole", {}), ("uniform", {"times": "uniform"})):
        run_ladder(distill_config(data, teacher, **{**settings, **changes}), described, out=teacher.parent / name)
    with pytest.raises(Interrupted):
        run_ladder(config, described, reporter=signal_at(3))
    moments = read_tensors(state_path(folder))["statistics.moments"]
    assert moments.shape == (8,)
    assert len(set(moments.tolist())) > 1
    run_ladder(config, described)
    assert_equal_bits(folder / WEIGHTS, teacher.parent / "whole" / WEIGHTS)
    with pytest.raises(AssertionError, match="differ"):
        assert_equal_bits(folder / WEIGHTS, teacher.parent / "uniform" / WEIGHTS)


def test_statistics_of_other_bins_are_learned_anew(data, teacher):
    """A run that an earlier version cut has one bin; it goes on."""
    settings = {**IMPORTANCE, "method": "tract", "phases": "8,1", "num_iters": 2}
    config, described = distill_config(data, teacher, **settings), read_config(teacher)
    with pytest.raises(Interrupted):
        run_ladder(config, described, reporter=signal_at(3))
    path = state_path(teacher.parent / "base_0")
    tensors, metadata = read_tensors(path), read_metadata(path)
    write_tensors(path, {**tensors, "statistics.moments": torch.tensor([0.5])}, metadata)
    run_ladder(config, described)
    assert read_config(teacher.parent / "base_0").is_finished


def test_uniform_runs_have_no_statistics(data, teacher):
    with pytest.raises(Interrupted):
        run_ladder(distill_config(data, teacher), read_config(teacher), reporter=signal_at(1))
    state = read_tensors(state_path(teacher.parent / "base_0"))
    assert not [name for name in state if name.startswith("statistics")]


def test_whole_paths_have_no_noise_levels_to_choose(data, teacher):
    with pytest.raises(OptionError, match="--times importance: trajectory learns from whole paths"):
        distill_config(data, teacher, times="importance", method="trajectory")
    with pytest.raises(OptionError, match="--times importance: trajectory learns from whole paths"):
        distill_config(data, teacher, times="importance", method="guided", then="trajectory")
