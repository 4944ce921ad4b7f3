"""The samplers of higher order against diffusers' schedulers: the same denoiser, the same grid, the same path.

The schedulers work in float64 here, so that both must agree to far more than the 1e-4 that images need.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    UniPCMultistepScheduler,
)

from tests.foreign import PREDICTION_NAMES, foreign, no_float32, walk, wild, with_exact_sigmas
from tests.oracles import TABLES, Z_SHAPE, gaussian, no_noise, randn
from vdiff.diffusion.grids import grid_of
from vdiff.diffusion.samplers import Ddim, Dpmpp2m, Dpmpp3m, Heun, Ipndm, UniPc, sample
from vdiff.diffusion.schedules import CosineSchedule, LinearSchedule, grid_angles, grid_times

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # in their set_timesteps

TWO_TABLES = {name: TABLES[name] for name in ("ddpm_cosine", "linear")}
LIMITS = {"unlimited": {"clipping_value": None}, "dynamic": {"threshold": 0.8}}
THEIR_LIMITS = {
    "unlimited": {},
    "dynamic": {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1e9},
}
every_table = pytest.mark.parametrize("schedule", TWO_TABLES.values(), ids=TWO_TABLES)
every_teacher = pytest.mark.parametrize("teacher", [wild, lambda s: gaussian(s, 0.5)], ids=["mixture", "gaussian"])
every_number = pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 14, 15])
every_number_and_limit = pytest.mark.parametrize(
    ("num_steps", "limit"), [*((n, "unlimited") for n in (1, 2, 3, 7, 14, 15)), (7, "dynamic")]
)


def our_walk(denoise, schedule, sampler, z, times) -> list[torch.Tensor]:
    states = []
    end = sample(
        denoise, schedule, sampler, z=z, num_steps=len(times) - 1, noise=no_noise, times=times,
        on_state=lambda _, state, __: states.append(state),
    )  # fmt: skip
    return [*states, end]


def assert_same_path(ours, theirs, tolerance: float) -> None:
    assert len(ours) == len(theirs)
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance, msg=lambda m, i=i: f"state {i}: {m}")


@every_table
@every_teacher
@every_number_and_limit
@pytest.mark.parametrize("sampler", [Dpmpp2m, Dpmpp3m])
def test_dpmpp_is_diffusers_multistep(schedule, teacher, num_steps, limit, sampler):
    """States included, also where the number of steps does not divide the table's."""
    times, z, denoise = grid_of("trailing", schedule, num_steps), randn(*Z_SHAPE), teacher(schedule)
    theirs = foreign(
        DPMSolverMultistepScheduler, schedule, num_steps,
        algorithm_type="dpmsolver++", solver_type="midpoint", solver_order=2 if sampler is Dpmpp2m else 3,
        prediction_type="sample", final_sigmas_type="zero", **THEIR_LIMITS[limit],
    )  # fmt: skip
    theirs = with_exact_sigmas(theirs, schedule, times)
    path = walk(theirs, schedule, denoise, z, "x", torch.ones(num_steps + 1))
    assert_same_path(our_walk(denoise, schedule, sampler(**LIMITS[limit]), z, times), path, 1e-9)


@every_table
@every_teacher
@every_number_and_limit
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_is_diffusers_unipc(schedule, teacher, num_steps, limit, order):
    times, z, denoise = grid_of("trailing", schedule, num_steps), randn(*Z_SHAPE), teacher(schedule)
    theirs = foreign(
        UniPCMultistepScheduler, schedule, num_steps,
        solver_order=order, solver_type="bh2", prediction_type="sample", final_sigmas_type="zero",
        **THEIR_LIMITS[limit],
    )  # fmt: skip
    theirs = with_exact_sigmas(theirs, schedule, times)
    path = walk(theirs, schedule, denoise, z, "x", torch.ones(num_steps + 1))
    assert_same_path(our_walk(denoise, schedule, UniPc(order=order, **LIMITS[limit]), z, times), path, 1e-9)


@every_table
@pytest.mark.parametrize("output", PREDICTION_NAMES)
def test_what_the_network_predicts_is_the_same_to_them(schedule, output):
    times, z, denoise = grid_of("trailing", schedule, 9), randn(*Z_SHAPE), wild(schedule)
    for kind, sampler in ((DPMSolverMultistepScheduler, Dpmpp3m), (UniPCMultistepScheduler, UniPc)):
        theirs = foreign(
            kind, schedule, 9, solver_order=3, prediction_type=PREDICTION_NAMES[output], final_sigmas_type="zero"
        )
        path = walk(with_exact_sigmas(theirs, schedule, times), schedule, denoise, z, output, torch.ones(10))
        assert_same_path(our_walk(denoise, schedule, sampler(clipping_value=None), z, times), path, 1e-7)


@pytest.mark.parametrize("name", ["linear", "scaled_linear"])
@every_teacher
@every_number
@pytest.mark.parametrize("clip", [None, 1.0])
def test_heun_over_noise_is_diffusers_heun(name, teacher, num_steps, clip):
    """Karras' rule in z/α against σ/α; on tables whose α at t = 1 is not nearly zero."""
    schedule = TABLES[name]
    times, z, denoise = grid_of("trailing", schedule, num_steps), randn(*Z_SHAPE), teacher(schedule)
    theirs = foreign(
        HeunDiscreteScheduler, schedule, num_steps,
        prediction_type="sample", clip_sample=clip is not None, clip_sample_range=1.0,
    )  # fmt: skip
    theirs = with_exact_sigmas(theirs, schedule, times)
    path = walk(theirs, schedule, denoise, z, "x", (1 + theirs.sigmas**2).sqrt())
    ours = our_walk(denoise, schedule, Heun(clipping_value=clip, frame="eps"), z, times)
    assert_same_path(ours, [*path[:-1:2], path[-1]], 1e-8)


@pytest.mark.parametrize("schedule", [CosineSchedule(), *TABLES.values()], ids=["cosine", *TABLES])
@every_teacher
@pytest.mark.parametrize("num_steps", [1, 2, 4, 8, 125])
def test_ipndm_is_diffusers_ipndm(schedule, teacher, num_steps):
    """Their α and σ are replaced by ours; their ε is σ z + α v."""
    num_steps = 128 if (schedule.num_levels or 1024) % num_steps else num_steps
    times, z, denoise = grid_times(num_steps), randn(*Z_SHAPE), teacher(schedule)
    scheduler, angles = IPNDMScheduler(), grid_angles(schedule, times).flip(0)
    scheduler.set_timesteps(num_steps)
    scheduler.alphas, scheduler.betas = angles.cos(), angles.sin()
    scheduler.timesteps = times[1:].flip(0) * schedule.label_scale - 1
    path = walk(scheduler, schedule, denoise, z, "v", torch.ones(num_steps + 1))
    assert_same_path(our_walk(denoise, schedule, Ipndm(clipping_value=None), z, times), path, 1e-6)


@every_table
@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_dynamic_thresholding_is_diffusers(schedule, quantile, eta):
    num_steps = 8
    scheduler = foreign(
        DDIMScheduler, schedule, num_steps,
        clip_sample=False, prediction_type="v_prediction", set_alpha_to_one=True,
        thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e9,
    )  # fmt: skip
    denoise, n = wild(schedule), randn(*Z_SHAPE, seed=1)
    z = theirs = randn(*Z_SHAPE)
    for timestep in scheduler.timesteps.tolist():
        t = torch.full((3,), (timestep + 1) / schedule.num_levels, dtype=torch.float64)
        options = {"eta": eta, "variance_noise": n} if eta else {}
        said = denoise(theirs, t).v
        theirs = scheduler.step(said, timestep, theirs, use_clipped_model_output=True, **options).prev_sample
    ours = sample(denoise, schedule, Ddim(threshold=quantile, eta=eta), z=z, num_steps=num_steps, noise=lambda: n)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


def test_schedulers_do_work_in_float64_here():
    """Without it, the comparison above could not tell less than 1e-7 from rounding."""
    schedule = LinearSchedule()
    theirs = foreign(DPMSolverMultistepScheduler, schedule, 4, prediction_type="sample", final_sigmas_type="zero")
    z = randn(*Z_SHAPE)
    with no_float32():
        assert theirs.step(z, int(theirs.timesteps[0]), z).prev_sample.dtype == torch.float64
    assert torch.float32 != torch.float64
