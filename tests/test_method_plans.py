"""Grids and plans of the methods, what each needs, and the defaults of their papers."""

from __future__ import annotations

import dataclasses
import itertools
from contextlib import nullcontext

import pytest

from tests.toy import UNET, distill_config, write_checkpoint
from tests.written_out import middles
from vdiff.diffusion.distillation import (
    METHODS,
    Consistency,
    Guided,
    Match,
    Progressive,
    Tract,
    Trajectory,
    VariableTrajectory,
    build_method,
    shortening,
)
from vdiff.diffusion.ect import Ect
from vdiff.diffusion.meanflow import MeanFlow
from vdiff.diffusion.phases import check_phase, single_plan, two_phase_plan
from vdiff.diffusion.scm import Scm
from vdiff.diffusion.targets import grid_times_of
from vdiff.errors import OptionError
from vdiff.models.checkpoint import read_config
from vdiff.settings import check_value
from vdiff.training.config import DistillConfig, settings_of
from vdiff.training.stages import plan_stages, resolve_distillation


@pytest.mark.parametrize("num_steps", [1, 3, 8, 1000])
def test_levels_of_a_grid_are_as_likely_as_one_another(num_steps):
    t = grid_times_of(middles(7 * num_steps), num_steps)
    assert (t * num_steps).round().tolist() == [1 + k // 7 for k in range(7 * num_steps)]
    assert t.max() == 1


def test_a_stage_shortens_to_a_number_that_divides():
    for before, after in itertools.product(range(1, 13), range(-1, 14)):
        if after >= 1 and after < before and before % after == 0:
            check_phase(before, after)
            assert single_plan(before, after) == [after]
        else:
            for check in (check_phase, single_plan, two_phase_plan):
                with pytest.raises(ValueError, match=f"{before} steps cannot become {after}: only a smaller divisor"):
                    check(before, after)


def test_two_phases_shorten_alike():
    """By factors as near as can be, the larger first; one phase where there is little to shorten."""
    assert two_phase_plan(1024, 1) == [32, 1]
    assert two_phase_plan(1024, 4) == [64, 4]
    assert two_phase_plan(8, 1) == [1]
    assert two_phase_plan(16, 2) == [2]
    assert two_phase_plan(9, 1) == [3, 1]
    for ratio in range(2, 400):
        pairs = [(a, ratio // a) for a in range(2, ratio) if ratio % a == 0]
        plan = two_phase_plan(3 * ratio, 3)
        if ratio <= 8 or not pairs:
            assert plan == [3]
            continue
        middle = plan[0] // 3
        assert plan == [3 * middle, 3]
        nearest = min(max(pair) for pair in pairs)
        assert middle == nearest  # the student of the first phase keeps the larger factor


def test_methods_plan_as_their_papers_do():
    plans = {name: method().plan for name, method in METHODS.items()}
    assert plans["progressive"](16, 2) == [8, 4, 2]
    assert plans["tract"](1024, 1) == [32, 1]
    for name in ("consistency", "trajectory", "scm", "ect", "meanflow"):
        assert plans[name](1024, 1) == [1]
        assert plans[name](12, 4) == [4]
    for name in ("match", "guided"):
        assert plans[name](12, 12) == [12]
        with pytest.raises(ValueError, match="keeps the 12 steps of the teacher and cannot reach 6"):
            plans[name](12, 6)


def test_the_registry_knows_what_each_method_needs():
    facts = {
        name: (type(kind()), kind.keeps_steps, kind.needs_images, kind().self_ema) for name, kind in METHODS.items()
    }
    assert facts == {
        "progressive": (Progressive, False, True, None),
        "tract": (Tract, False, True, 0.5),
        "consistency": (Consistency, False, True, None),
        "guided": (Guided, True, True, None),
        "trajectory": (Trajectory, False, False, None),
        "trajectory_v": (VariableTrajectory, False, False, None),
        "match": (Match, True, True, None),
        "scm": (Scm, False, True, None),
        "ect": (Ect, False, True, None),
        "meanflow": (MeanFlow, False, True, None),
    }


def test_what_methods_say_over_a_preset():
    """TRACT: a constant learning rate, an average for inference of 0.001^(1/updates), no longer last stages;
    consistency: that average; trajectories: absolute errors, few updates. All take a multiple of the learning rate:
    with 3e-4, those of the comparison in docs/distillation.md. All are settings of distill.py."""
    average = {"ema_remainder": 1e-3, "last_factor": 1.0}
    expected = {
        "tract": {"lr": 1e-3, "lr_schedule": "constant", **average},
        "consistency": {"lr": 2e-3, **average},
        **{
            key: {"lr": 1e-3, "num_iters": 200, "loss": "l1", "last_factor": 1.0}
            for key in ("trajectory", "trajectory_v")
        },
        **{key: {"lr": 1e-3, "weighting": "snr_plus_one", **average} for key in ("scm", "ect", "meanflow")},
    }
    known = settings_of(DistillConfig)
    for name, method in METHODS.items():
        said = method.settings({"lr": 3e-4, "num_iters": 50_000, "batch_size": 4})
        assert said == expected.get(name, {})
        papers = method.paper_settings({"lr": 3e-4, "num_iters": 50_000, "batch_size": 4})
        for key, value in [*said.items(), *papers.items()]:
            assert check_value(known[key], value, "a method") == value
    assert Trajectory.settings({"lr": 5e-5, "num_iters": 80}) == {
        "lr": 1.7e-4, "num_iters": 80, "loss": "l1", "last_factor": 1.0
    }  # fmt: skip
    assert (Tract(), Consistency(), Trajectory()) == (Tract(0.5), Consistency(0, 0.0), Trajectory(16, "auto"))
    for field in ("self_ema", "first_steps", "addim", "path_steps", "path_sampler"):
        owner = next(kind for kind in METHODS.values() if field in {item.name for item in dataclasses.fields(kind)})
        assert known[field].default == getattr(owner(), field)
    assert shortening() == [
        "progressive",
        "tract",
        "consistency",
        "trajectory",
        "trajectory_v",
        "scm",
        "ect",
        "meanflow",
    ]


def test_methods_are_built_from_settings():
    settings = {
        "self_ema": 0.9, "first_steps": 7, "addim": 0.2, "path_steps": 5, "path_sampler": "heun", "lr": 1.0,
    }  # fmt: skip
    assert build_method("tract", settings) == Tract(0.9)
    assert build_method("consistency", settings) == Consistency(7, 0.2)
    assert build_method("trajectory", settings) == Trajectory(5, "heun")
    for name, kind in (("progressive", Progressive), ("match", Match), ("guided", Guided)):
        assert build_method(name, settings) == kind()
    assert build_method("tract", {}) == Tract()


def test_a_paper_s_settings_are_taken_by_name(tmp_path):
    """Over the preset's, under those of flags; without the name they are ours."""
    write_checkpoint(tmp_path / "original")
    flags = {"base": str(tmp_path / "original"), "method": "scm", "to_steps": 1, "preset": "toy"}
    ours, papers = (resolve_distillation({**flags, **more}, None)[0] for more in ({}, {"recipe": "paper"}))
    assert (ours.build_method(), ours.lr_schedule) == (Scm(), "linear")
    assert papers.build_method() == Scm("-1.0,1.4", "teacher", 0.025, 0.1, True)
    assert papers.lr_schedule == "constant"
    mine, _ = resolve_distillation({**flags, "recipe": "paper", "tangent_norm": 1.0}, None)
    assert mine.build_method() == Scm("-1.0,1.4", "teacher", 0.025, 1.0, True)


def test_a_teacher_that_does_not_know_every_time_has_no_flow(tmp_path):
    write_checkpoint(tmp_path / "base_0", method="progressive", num_timesteps=8)
    described = read_config(tmp_path / "base_0")
    for method in ("scm", "meanflow"):
        config = distill_config(tmp_path, tmp_path / "base_0", method=method, to_steps=1, phases="")
        with pytest.raises(OptionError, match=f"--method {method} asks the teacher at every time, and .*base_0 knows"):
            plan_stages(config, described)
        of_data = dataclasses.replace(config, method_settings={"flow": "data"})
        assert [stage.num_steps for stage in plan_stages(of_data, described)] == [1]
    config = distill_config(tmp_path, tmp_path / "base_0", method="ect", to_steps=1, phases="")
    assert [stage.num_steps for stage in plan_stages(config, described)] == [1]


@pytest.mark.parametrize(
    ("method", "num_timesteps", "second_time", "is_free"),
    [
        ("scm", 1, False, True), ("ect", 1, False, True), ("scm", 2, False, False), ("tract", 1, False, False),
        ("meanflow", 4, True, True),
    ],
)  # fmt: skip
def test_a_student_that_knows_every_time_takes_any_number_of_steps(
    tmp_path, method, num_timesteps, second_time, is_free
):
    unet = {**UNET, "in_channels": 1, "out_channels": 1, "second_time": second_time}
    write_checkpoint(tmp_path / "base_0", method=method, num_timesteps=num_timesteps, unet=unet)
    described = read_config(tmp_path / "base_0")
    assert described.is_distilled
    assert not described.takes_any_num_steps
    described.check_num_steps(1)
    for refused in (lambda: described.check_num_steps(3), lambda: described.check_grid("karras", 3)):
        with nullcontext() if is_free else pytest.raises(ValueError, match="this model was"):
            refused()
