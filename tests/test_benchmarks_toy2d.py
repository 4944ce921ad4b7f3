"""The benchmark on points of the plane: what it measures by, its budgets, and that its methods work."""

from __future__ import annotations

import math

import pytest
import torch

import vdiff
from benchmarks import plane
from benchmarks.toy2d import COMPARED, EVALUATIONS, HEAD, STEPS, Values, add_mean, compare, lines, points_of
from tests.oracles import randn

TINY = plane.Scale(seeds=1, data=4096, batch_size=64, teacher=150, part=8, points=256, directions=16)


def points(name: str, count: int = TINY.data) -> plane.Points:
    return plane.DATA[name](count, torch.Generator().manual_seed(0))


def test_the_distance_is_the_one_between_shifted_and_between_scaled_points():
    points = randn(500, 2, seed=1)
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    here = plane.shadows(points.float(), 64)
    # W² of a shift m, over all directions θ: the mean of (m·θ)² is |m|²/2
    assert plane.rms(plane.shadows((points + shift).float(), 64) - here) == pytest.approx(0.5 / math.sqrt(2), rel=1e-5)
    # of points made c times larger: (c − 1)² times the mean of (p·θ)², which is |p|²/2
    spread = float(points.square().sum(-1).mean() / 2) ** 0.5
    assert plane.rms(plane.shadows((1.5 * points).float(), 64) - here) == pytest.approx(0.5 * spread, rel=1e-5)
    turned = points[torch.randperm(500)]
    assert plane.rms(plane.shadows(turned.float(), 64) - here) < 1e-6


@pytest.mark.parametrize("name", plane.DATA)
def test_data_lie_within_the_plane_that_is_shown(name):
    found, classes = points(name)
    assert found.shape == (4096, 2)
    assert classes.shape == (4096,)
    assert found.abs().max() < 1.2
    assert 0.3 < found.std() < 0.7
    assert found.mean(0).abs().max() < 0.2


def test_a_map_has_points_where_they_are_in_the_colours_of_their_noise():
    noise = torch.tensor([[2.0, 0.0], [-2.0, 0.0]])  # hues 0 and 180: red, and its opposite
    found = plane.panel(torch.tensor([[0.6, 0.6], [-0.6, -0.6]]), noise=noise)
    above, below = found[:, 42, 126], found[:, 126, 42]
    assert above[0] > 0 > above[1:].max()
    assert below[0] < 0 < below[1:].min()
    assert found[:, 42, 42].min() == 1


@pytest.mark.parametrize("steps", plane.PARTS)
@pytest.mark.parametrize("method", COMPARED)
def test_every_method_has_the_updates_of_the_halving_ladder(method, steps):
    teacher = vdiff.wrap(plane.Mlp(), (2,), num_timesteps=plane.TEACHER_STEPS)
    training = plane.learning(
        teacher, [points("ring", 64)], 0, plane.Scale(part=150), plane.PARTS[steps], method=method, to_steps=steps
    )
    assert abs(training.num_updates - 150 * plane.PARTS[steps]) <= 3


@pytest.mark.parametrize(
    "name", ["ring", *(pytest.param(name, marks=pytest.mark.slow) for name in ("moons", "spiral"))]
)
def test_every_method_brings_students_nearer_to_the_teachers_map(name):
    values, maps = Values(list), {}
    compare(name, 0, TINY, [(method, {}) for method in COMPARED], values, maps)
    assert values[name, "teacher, ddim", f"RMSE, {plane.TEACHER_STEPS}"] == [0]
    for method in COMPARED:
        for steps in STEPS:
            [error], [untrained] = (values[name, row, f"RMSE, {steps}"] for row in (method, "teacher, ddim"))
            assert error < 0.9 * untrained if steps == 8 else error < 0.7 * untrained, (method, steps)
            assert plane.rms(maps[name, method, steps] - maps[name, "teacher", plane.TEACHER_STEPS]) == error
        [evaluations] = values[name, method, EVALUATIONS]
        updates = evaluations / TINY.batch_size / (1 + 16 if method == "trajectory" else 3)
        assert abs(updates - plane.PARTS[1] * TINY.part) <= 3


def test_the_table_has_means_over_seeds_and_sets_and_the_best_method_in_bold():
    values = Values(list)
    for k, name in enumerate(plane.DATA):
        values[name, "other data", "W, 64"] += [0.0, 0.0]
        for method, error in (("tract", 0.2), ("trajectory", 0.1)):
            values[name, method, EVALUATIONS] += [4e5, 4e5]
            values[name, method, "W, 1"] += [error + k, error + k + 0.2]
    add_mean(values)
    table = lines(values, ["spiral", "mean"])
    assert [row[:2] for row in table[:3]] == [["spiral", "other data"], ["", "tract"], ["", "trajectory"]]
    assert all(len(row) == len(HEAD) for row in table)
    column = HEAD.index("W, 1")
    cells = [row[column] for row in table]
    assert cells == ["", "2.300 ± 0.141", "**2.200 ± 0.141**", "", "1.300 ± 0.141", "**1.200 ± 0.141**"]
    assert [row[-1] for row in table[3:]] == ["", "0.4M", "0.4M"]


@pytest.mark.slow
def test_a_guided_student_learns_what_the_weight_means():
    data = [points("ring")]
    scale = plane.Scale(teacher=250, part=100)
    teacher = plane.new_teacher(data, 0, scale, num_classes=plane.MODES)
    student = plane.guided_student(teacher, data, 0, scale)
    assert student.config.guidance_range == [0, 4]
    z = randn(256, 2).float()
    plain = teacher.denoise(z, 0.7).x
    guided = {weight: teacher.denoise(z, 0.7, guidance=weight).x for weight in (0.0, 2.0, 4.0)}
    for weight, x in guided.items():
        assert plane.rms(student.denoise(z, 0.7, guidance=weight).x - x) < 0.2 * plane.rms(guided[4.0] - plain), weight
    shorter = plane.learning(student, data, 0, scale, 1, method="progressive", to_steps=32).finish()
    there = points_of(teacher, z, plane.TEACHER_STEPS, guidance=2.0)
    unguided = plane.rms(points_of(teacher, z, plane.TEACHER_STEPS) - there)
    assert plane.rms(points_of(shorter, z, 32, guidance=2.0) - there) < 0.3 * unguided
