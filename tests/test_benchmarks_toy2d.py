"""The benchmark on points of the plane: what it measures by, that its networks learn apart, and that methods work."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from benchmarks.plane import (
    DATA,
    MODES,
    Mlps,
    MlpsConfig,
    Tally,
    clip_each,
    draw,
    new_denoiser,
    rms,
    shadows,
    sorted_out,
)
from benchmarks.plane_teachers import PARTS, TEACHER_STEPS, Scale, guided_pool, open_pool, settings_of, stages_of
from benchmarks.toy2d import COMPARED, examine, sampler_rows, student_of, told
from tests.oracles import condition, randn
from vdiff.diffusion.distillation import DistillContext, Trajectory
from vdiff.models.denoiser import GuidedDenoiser

TINY = Scale(seeds=1, batch_size=64, teacher=250, part=20, points=256, directions=16)
COUNT, PER = 3, 4


def alone(network: Mlps, k: int) -> Mlps:
    """Network k of several."""
    single = Mlps(MlpsConfig(1, num_classes=network.config.num_classes, guidance_input=True), Tally())
    single.load_state_dict(
        {name: value if name == "frequencies" else value[k : k + 1] for name, value in network.state_dict().items()}
    )
    return single


def network_of_everything() -> Mlps:
    """Random weights everywhere, classes and guidance."""
    torch.manual_seed(0)
    network = Mlps(MlpsConfig(COUNT, num_classes=2, guidance_input=True), Tally())
    nn.init.normal_(network.guidance)
    return network


def test_row_r_belongs_to_network_r_mod_s_forward_and_backward_and_in_the_clipping():
    network = network_of_everything()
    z, label, guidance = randn(COUNT * PER, 2).float(), 1000 * torch.rand(COUNT * PER), torch.rand(COUNT * PER)
    classes = torch.arange(COUNT * PER) % 3
    weights = randn(COUNT * PER, 2, seed=1).float()
    output = network(z, label, classes, guidance)
    ((output * weights).mean() * COUNT).backward()
    clip_each(network, 0.02)
    norms = []
    for k in range(COUNT):
        single, rows = alone(network, k), slice(k, None, COUNT)
        mine = single(z[rows], label[rows], classes[rows], guidance[rows])
        torch.testing.assert_close(mine, output[rows])
        (mine * weights[rows]).mean().backward()
        norms.append(float(nn.utils.clip_grad_norm_(single.parameters(), 0.02)))
        for (name, ours), theirs in zip(network.named_parameters(), single.parameters(), strict=True):
            torch.testing.assert_close(ours.grad[k : k + 1], theirs.grad, msg=name)
    assert min(norms) > 0.02, "nothing was clipped"


def test_examples_of_paths_are_brought_back_to_their_networks():
    data = ["ring", "spiral"]
    known = MlpsConfig(2, num_classes=8, guidance_input=True)
    draws = draw(data, known, 8)
    denoiser = new_denoiser(known)
    spiral = draws.condition.tensors["classes"][1::2]
    assert set(spiral.tolist()) <= {0, 8}, "the second network's data have no classes"

    def denoise(z, t):
        return denoiser(z, t, draws.condition[: len(z)])

    with torch.no_grad():
        lesson = DistillContext(denoise, denoiser.schedule, num_steps=4, teacher_steps=16, student=denoise)
        example = Trajectory()(lesson, draws.images, draws.noise, draws.u)
    ours, told = sorted_out(example, draws, 2)
    assert sorted(ours.z.flatten().tolist()) == sorted(example.z.flatten().tolist())
    first = ours.t == 1  # where paths begin, z is the noise of the row that the example is of
    assert first.sum() == 4
    torch.testing.assert_close(ours.z[first], told.noise[first])
    torch.testing.assert_close(ours.z[first][0::2], draws.noise[[0, 2]])
    torch.testing.assert_close(ours.z[first][1::2], draws.noise[[1, 3]])
    assert set(told.condition.tensors["classes"][1::2].tolist()) <= {0, 8}


def test_the_distance_is_the_one_between_shifted_and_between_scaled_points():
    points = randn(1, 500, 2, seed=1)
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    here = shadows(points.float(), 64)
    # W² of a shift m, over all directions θ: the mean of (m·θ)² is |m|²/2
    assert float(rms(shadows((points + shift).float(), 64) - here)) == pytest.approx(0.5 / math.sqrt(2), rel=1e-5)
    # of points made c times larger: (c − 1)² times the mean of (p·θ)², which is |p|²/2
    spread = float(points.square().sum(-1).mean() / 2) ** 0.5
    assert float(rms(shadows((1.5 * points).float(), 64) - here)) == pytest.approx(0.5 * spread, rel=1e-5)
    turned = points[:, torch.randperm(500)]
    assert float(rms(shadows(turned.float(), 64) - here)) < 1e-6


@pytest.mark.parametrize("name", DATA)
def test_data_lie_within_the_plane_that_is_shown(name):
    points, classes = DATA[name](4096, torch.Generator().manual_seed(0))
    assert points.shape == (4096, 2)
    assert classes.shape == (4096,)
    assert points.abs().max() < 1.2
    assert 0.3 < points.std() < 0.7
    assert points.mean(0).abs().max() < 0.2


@pytest.mark.parametrize("method", COMPARED)
@pytest.mark.parametrize("steps", PARTS)
def test_every_method_has_the_updates_of_the_halving_ladder(method, steps):
    stages = stages_of(settings_of(method, {}, TINY), steps, 100 * PARTS[steps])
    assert abs(sum(updates for *_, updates in stages) - 100 * PARTS[steps]) <= 1
    assert stages[0][0] == TEACHER_STEPS
    assert [after for _, after, _ in stages[:-1]] == [before for before, *_ in stages[1:]]
    assert stages[-1][1] == steps
    if method == "progressive":  # the ladder to 1 step, up to here
        assert stages == stages_of(settings_of(method, {}, TINY), 1, 800)[: len(stages)]


@pytest.fixture(scope="module")
def pool():
    return open_pool(list(DATA), TINY)


@pytest.mark.parametrize("method", COMPARED)
def test_every_method_brings_students_nearer_to_the_teachers_map(pool, method):
    examination = examine(pool)
    untrained = next(row for row in sampler_rows(pool, examination, ["ddim"]) if row.errors)
    for steps in (1, 4):
        student, evaluations = student_of(pool, method, {}, steps)
        errors = rms(examination.points(student, steps) - examination.target)
        assert (errors < 0.7 * untrained.errors[steps]).all(), (steps, errors, untrained.errors[steps])
        updates = sum(stage[2] for stage in stages_of(settings_of(method, {}, TINY), steps, PARTS[steps] * TINY.part))
        per_update = (1 + 16 + 0) if method == "trajectory" and steps == 1 else 3
        if method != "trajectory" or steps == 1:
            assert evaluations == updates * TINY.batch_size * per_update


def test_a_guided_student_learns_what_the_weight_means():
    plain = open_pool(["ring"], replace(TINY, part=100), num_classes=MODES)
    pool = guided_pool(plain)
    assert pool.teacher.network.config == replace(plain.teacher.network.config, guidance_input=True)
    z, t, classes = randn(256, 2).float(), torch.full((256,), 0.7), torch.arange(256) % MODES
    errors = {}
    with torch.inference_mode():
        for weight in (0.0, 2.0, 4.0):
            guided = told(GuidedDenoiser(plain.teacher), classes, weight)(z, t).x
            untold = rms(guided[None] - plain.teacher(z, t, condition(classes)).x)
            errors[weight] = float(untold), float(rms(guided[None] - told(pool.teacher, classes, weight)(z, t).x))
    assert errors[0.0][0] < 1e-6
    assert all(learned < 0.2 * errors[4.0][0] for _, learned in errors.values()), errors
