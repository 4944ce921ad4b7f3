"""Samplers against exact probability flows, exact variances, diffusers, and the formulas written out plainly."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from tests.cases import all_cases
from tests.foreign import PREDICTION_NAMES, foreign, wild
from tests.oracles import (
    ALL_SCHEDULES,
    TABLES,
    Z_SHAPE,
    column,
    gaussian,
    mixture,
    no_noise,
    noise_source,
    randn,
    random_teacher,
)
from vdiff.diffusion.prediction import Prediction, from_x
from vdiff.diffusion.samplers import (
    SAMPLERS,
    Clipped,
    Ddim,
    Ddpm,
    NonFiniteSampleError,
    Renoising,
    ddim_step,
    sample,
)
from vdiff.diffusion.schedules import CosineSchedule, grid_angles, grid_times
from vdiff.models.denoiser import Denoiser
from vdiff.models.unet import UNet
from vdiff.models.unet_config import UNetConfig

every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
every_table = pytest.mark.parametrize("schedule", TABLES.values(), ids=TABLES)
every_c = pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
VARIANTS = {
    "ddim": Ddim(clipping_value=None),
    "ddim_eta": Ddim(clipping_value=None, eta=0.6),
    "ddim_eta_1": Ddim(clipping_value=None, eta=1.0),
    "ddpm": Ddpm(clipping_value=None),
}


def few_are_long(steps: int, *others: int) -> bool:
    """Each number of steps with everything else, the largest with every value of it."""
    return steps < 2 or sum(others) % 3 == 0


def fine_steps(schedule) -> int:
    """A number of steps that the schedule has and that halves twice."""
    return 500 if schedule.num_levels == 1000 else 512


def flow_scale(schedule, t: float, s: float, c: float) -> float:
    """z_s/z_t on the probability flow of N(0, c²): √((α_s²c² + σ_s²)/(α_t²c² + σ_t²))."""
    angles = grid_angles(schedule, torch.tensor([t, s], dtype=torch.float64))
    at_t, at_s = (angles.cos() ** 2 * c**2 + angles.sin() ** 2).tolist()
    return math.sqrt(at_s / at_t)


@every_schedule
@every_c
def test_ddim_reaches_the_probability_flow_s_end_with_first_order(schedule, c):
    z, n = randn(*Z_SHAPE), fine_steps(schedule)
    exact = flow_scale(schedule, 1, 0, c) * z
    error = []
    for num_steps in (n // 4, n // 2, n):
        end = sample(
            gaussian(schedule, c), schedule, Ddim(clipping_value=None), z=z, num_steps=num_steps, noise=no_noise
        )
        error.append(((end - exact).norm() / exact.norm()).item())
    assert error[-1] < 0.02
    assert 1.7 < error[0] / error[1] < 2.3
    assert 1.7 < error[1] / error[2] < 2.3


@every_schedule
@every_c
def test_every_ddim_step_follows_the_flow(schedule, c):
    """Each of N small steps differs from the exact flow map by O(1/N²)."""
    n = fine_steps(schedule)
    times = grid_times(n)
    angles, z = grid_angles(schedule, times), randn(n, 1, 1, 2)
    v = gaussian(schedule, c)(z, times[1:]).v
    found = ddim_step(z, v, angles[1:], angles[:-1])
    scale = torch.tensor([flow_scale(schedule, (i + 1) / n, i / n, c) for i in range(n)], dtype=torch.float64)
    exact = column(scale, z) * z
    bound = 2.2 * (angles.diff() ** 2)[:, None, None, None]
    assert ((found - exact).abs() <= bound * z.abs() + 1e-12).all()


@every_schedule
def test_ddim_on_unit_data_multiplies_by_the_cosine_of_the_step(schedule):
    times = grid_times(8)
    angles, z = grid_angles(schedule, times), randn(8, 1, 3, 3)
    found = ddim_step(z, gaussian(schedule, 1.0)(z, times[1:]).v, angles[1:], angles[:-1])
    assert torch.equal(found, column((angles[1:] - angles[:-1]).cos(), z) * z)


@every_schedule
def test_ddim_step_is_alpha_x_plus_sigma_eps(schedule):
    """The rotation equals z_s = α_s x̂ + σ_s ε̂, on mixtures too."""
    times = grid_times(3)
    angles, z = grid_angles(schedule, times), randn(*Z_SHAPE)
    prediction = mixture(schedule)(z, times[1:])
    found = ddim_step(z, prediction.v, angles[1:], angles[:-1])
    alpha, sigma = column(angles[:-1].cos(), z), column(angles[:-1].sin(), z)
    torch.testing.assert_close(found, alpha * prediction.x + sigma * prediction.eps, rtol=1e-10, atol=1e-10)


def exact_variance(sampler, schedule, c: float, num_steps: int) -> float:
    """The variance that `num_steps` steps make of N(0, 1), by the coefficients of z and noise in each (linear) step."""
    times = grid_times(num_steps)
    angles, denoise = grid_angles(schedule, times), gaussian(schedule, c)
    variance = 1.0
    for i in range(num_steps, 0, -1):
        z, noise = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
        t, angle_t, angle_s = (values.expand(2) for values in (times[i], angles[i], angles[i - 1]))
        step = sampler.step(
            z=z, prediction=denoise(z, t), angle_t=angle_t, angle_s=angle_s, noise=lambda noise=noise: noise
        )
        variance = step[0].item() ** 2 * variance + step[1].item() ** 2
    return variance


@every_schedule
@every_c
@pytest.mark.parametrize("name", VARIANTS)
def test_samplers_end_with_the_variance_of_the_data(schedule, c, name):
    """Unclipped, each sampler's variance goes to c² like 1/N."""
    n = fine_steps(schedule)
    error = [exact_variance(VARIANTS[name], schedule, c, steps) / c**2 - 1 for steps in (n // 2, n)]
    assert abs(error[1]) < 0.03
    assert abs(error[1]) < 1e-9 or 1.6 < error[0] / error[1] < 2.4


@every_c
@pytest.mark.parametrize("name", [name for name in VARIANTS if name != "ddim"])
def test_drawn_samples_have_the_exact_variance(c, name):
    """`sample` with real noise against the recursion above: n draws estimate a variance to √(2/n)."""
    schedule, n, num_steps = CosineSchedule(), 40_000, 64
    z = randn(1, 1, 1, n, seed=1)
    noise = noise_source(z.shape, 2)
    found = sample(gaussian(schedule, c), schedule, VARIANTS[name], z=z, num_steps=num_steps, noise=noise)
    assert found.var().item() == pytest.approx(
        exact_variance(VARIANTS[name], schedule, c, num_steps), rel=4.5 * math.sqrt(2 / n)
    )
    assert found.mean().item() == pytest.approx(0, abs=4.5 * c / math.sqrt(n))


@pytest.mark.parametrize("name", VARIANTS)
def test_samplers_draw_the_mixture_s_parts_in_their_shares(name):
    schedule, n = CosineSchedule(), 20_000
    z = randn(1, 1, 1, n, seed=3)
    found = sample(mixture(schedule), schedule, VARIANTS[name], z=z, num_steps=128, noise=noise_source(z.shape, 4))
    shares = [((found - mean).abs() < 0.3).double().mean().item() for mean in (-0.8, 0.1, 0.7)]
    assert shares == pytest.approx([3 / 6, 1 / 6, 2 / 6], abs=0.03)


@every_table
@pytest.mark.parametrize(
    ("num_steps", "clip", "output", "eta"),
    all_cases(few_are_long, [1, 8, 125], [None, 1.0], list(PREDICTION_NAMES), [0.0, 0.4, 1.0]),
)
def test_ddim_is_diffusers_ddim(schedule, num_steps, clip, output, eta):
    num_steps = 128 if schedule.num_levels % num_steps else num_steps
    scheduler = foreign(
        DDIMScheduler,
        schedule,
        num_steps,
        clip_sample=clip is not None,
        clip_sample_range=1.0,
        prediction_type=PREDICTION_NAMES[output],
        set_alpha_to_one=True,
    )
    denoise, start = wild(schedule), randn(*Z_SHAPE)
    theirs, their_noise = start, noise_source(Z_SHAPE, 5)
    for timestep in scheduler.timesteps.tolist():
        t = torch.full((3,), (timestep + 1) / schedule.num_levels, dtype=torch.float64)
        said = getattr(denoise(theirs, t), output)
        options = {"eta": eta, "variance_noise": their_noise()} if eta else {}
        theirs = scheduler.step(said, timestep, theirs, use_clipped_model_output=True, **options).prev_sample
    ours = sample(
        denoise,
        schedule,
        Ddim(clipping_value=clip, eta=eta),
        z=start,
        num_steps=num_steps,
        noise=noise_source(Z_SHAPE, 5),
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@every_table
@pytest.mark.parametrize(
    ("num_steps", "clip", "output", "large"),
    all_cases(few_are_long, [1, 8, 125], [None, 1.0], list(PREDICTION_NAMES), [False, True]),
)
def test_ddpm_is_diffusers_ddpm(schedule, num_steps, clip, output, large):
    num_steps = 128 if schedule.num_levels % num_steps else num_steps
    scheduler = foreign(
        DDPMScheduler,
        schedule,
        num_steps,
        clip_sample=clip is not None,
        clip_sample_range=1.0,
        prediction_type=PREDICTION_NAMES[output],
        variance_type="fixed_large" if large else "fixed_small",
    )
    denoise, start = wild(schedule), randn(*Z_SHAPE)
    theirs, generator = start, torch.Generator().manual_seed(6)
    for timestep in scheduler.timesteps.tolist():
        t = torch.full((3,), (timestep + 1) / schedule.num_levels, dtype=torch.float64)
        step = scheduler.step(getattr(denoise(theirs, t), output), timestep, theirs, generator=generator)
        # theirs adds noise to the image itself, where its last step is longer than a level
        is_last = timestep == scheduler.timesteps[-1]
        theirs = step.pred_original_sample if large and is_last else step.prev_sample
    ours = sample(
        denoise, schedule, Ddpm(clipping_value=clip, large_variance=float(large)), z=start, num_steps=num_steps,
        noise=noise_source(Z_SHAPE, 6),
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@every_schedule
def test_the_large_variance_is_right_for_gaussian_data(schedule):
    """Of data N(0, 1) every state has the variance 1, with any number of steps; with the small one it has less."""
    for num_steps in (2, 8):
        times = grid_times(num_steps)[1:]  # not the last step, which adds no noise
        angles, denoise = schedule.angle(times), gaussian(schedule, 1.0)
        found = []
        for large in (0.0, 0.5, 1.0):
            z, noise = torch.tensor([[1.0], [0.0]]).double(), torch.tensor([[0.0], [1.0]]).double()
            t, angle_t, angle_s = (values.expand(2) for values in (times[-1], angles[-1], angles[-2]))
            step = Ddpm(clipping_value=None, large_variance=large).step(
                z=z, prediction=denoise(z, t), angle_t=angle_t, angle_s=angle_s, noise=lambda noise=noise: noise
            )
            found.append(step)
        variances = [float(step.square().sum()) for step in found]
        assert variances[2] == pytest.approx(1, abs=1e-9)
        assert variances[0] < variances[1] < variances[2]
        noises = [float(step[1]) for step in found]
        assert noises[1] == pytest.approx(math.sqrt(noises[0] * noises[2]), rel=1e-9)


@every_schedule
@pytest.mark.parametrize("renoise", [0.0, 0.6, 1.0])
def test_consistency_sampling_jumps_to_the_image_and_back(schedule, renoise):
    """α_s x̂ + σ_s (√(1 − γ²) ε̂ + γ n); at γ = 1 nothing of the old noise is left, at γ = 0 it is DDIM."""
    times = grid_times(8)
    angles, z, n = grid_angles(schedule, times), randn(8, 1, 3, 3), randn(8, 1, 3, 3, seed=1)
    prediction = wild(schedule)(z, times[1:])
    arguments = {"z": z, "prediction": prediction, "angle_t": angles[1:], "angle_s": angles[:-1]}
    found = Renoising(clipping_value=None, renoise=renoise).step(**arguments, noise=lambda: n)
    alpha, sigma = column(angles[:-1].cos(), z), column(angles[:-1].sin(), z)
    mixed = math.sqrt(1 - renoise**2) * prediction.eps + renoise * n
    torch.testing.assert_close(found, alpha * prediction.x + sigma * mixed, rtol=1e-9, atol=1e-9)
    if renoise == 0:
        ddim = Ddim(clipping_value=None).step(**arguments, noise=no_noise)
        torch.testing.assert_close(found, ddim, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_a_perfect_jump_is_sampled_in_any_number_of_steps(num_steps):
    """Of data N(0, c²) the flow ends at z c/√(α² c² + σ²): with new noise every state is distributed as it should."""
    schedule, c, n = CosineSchedule(), 0.4, 40_000

    def jump(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        angle = schedule.angle(t)
        return from_x(z, column(c / (angle.cos() ** 2 * c**2 + angle.sin() ** 2).sqrt(), z) * z, angle)

    z, sampler = randn(1, 1, 1, n, seed=1), Renoising(clipping_value=None)
    found = sample(jump, schedule, sampler, z=z, num_steps=num_steps, noise=noise_source(z.shape, 2))
    assert found.std().item() == pytest.approx(c, rel=4.5 / math.sqrt(2 * n))
    assert found.mean().item() == pytest.approx(0, abs=4.5 * c / math.sqrt(n))


@every_schedule
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddpm_is_ddim_with_eta_1(schedule, clip):
    """Two derivations of one posterior, which agree at each level of each schedule."""
    times = grid_times(8)
    angles, z, n = grid_angles(schedule, times), randn(8, 1, 3, 3), randn(8, 1, 3, 3, seed=1)
    arguments = {"z": z, "prediction": wild(schedule)(z, times[1:]), "angle_t": angles[1:], "angle_s": angles[:-1]}
    posterior = Ddpm(clipping_value=clip).step(**arguments, noise=lambda: n)
    implicit = Ddim(clipping_value=clip, eta=1.0).step(**arguments, noise=lambda: n)
    torch.testing.assert_close(posterior, implicit, rtol=1e-9, atol=1e-9)


def clipped_step_written_out(z, x, alpha_t, sigma_t, alpha_s, sigma_s, c, eta, noise):
    """The v-diffusion repositories' clipped step, number by number."""
    x = max(-c, min(c, x))
    eps = max(-c, min(c, (z - alpha_t * x) / sigma_t))
    if sigma_s == 0:
        return x
    ddim_sigma = eta * math.sqrt(sigma_s**2 / sigma_t**2) * math.sqrt(1 - alpha_t**2 / alpha_s**2)
    adjusted = math.sqrt(sigma_s**2 - ddim_sigma**2)
    return x * alpha_s + eps * adjusted + noise * ddim_sigma


@every_schedule
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("clip", [0.6, 1.2])
def test_clipped_sampler_written_out(schedule, eta, clip):
    times = grid_times(8)
    angles, z, n = grid_angles(schedule, times), 2 * randn(8, 1, 3, 3), randn(8, 1, 3, 3, seed=1)
    prediction = wild(schedule)(z, times[1:])
    found = Clipped(clipping_value=clip, eta=eta).step(
        z=z, prediction=prediction, angle_t=angles[1:], angle_s=angles[:-1], noise=lambda: n
    )
    assert (prediction.x.abs() > clip).any()
    expected = torch.zeros_like(z)
    for index in range(z.numel()):
        i, t, s = index // 9, angles[index // 9 + 1].item(), angles[index // 9].item()
        numbers = (values[i].flatten()[index % 9].item() for values in (z, prediction.x, n))
        at_z, at_x, at_n = numbers
        expected[i].view(-1)[index % 9] = clipped_step_written_out(
            at_z, at_x, math.cos(t), math.sin(t), math.cos(s), math.sin(s), clip, eta, at_n
        )
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize(
    "sampler",
    [
        Ddim(clipping_value=0.9),
        Ddim(clipping_value=0.9, eta=1.0),
        Ddpm(clipping_value=0.9),
        Clipped(clipping_value=0.9),
        Clipped(clipping_value=0.9, eta=1.0),
    ],
    ids=["ddim", "ddim_eta", "ddpm", "clipped", "clipped_eta"],
)
def test_the_last_step_returns_the_clamped_image(schedule, sampler):
    times = grid_times(8)[:2]
    z, n = 2 * randn(1, 1, 3, 3), randn(1, 1, 3, 3, seed=1)
    prediction = wild(schedule)(z, times[1:])
    angles = grid_angles(schedule, times)
    end = sampler.step(z=z, prediction=prediction, angle_t=angles[1:], angle_s=angles[:1], noise=lambda: n)
    torch.testing.assert_close(end, prediction.x.clamp(-0.9, 0.9), rtol=0, atol=1e-12)


def test_defaults_are_the_design_s():
    assert (SAMPLERS["ddim"](), SAMPLERS["ddpm"](), SAMPLERS["clipped"]()) == (
        Ddim(clipping_value=1.0, eta=0.0),
        Ddpm(clipping_value=1.0),
        Clipped(clipping_value=1.2, eta=0.0),
    )


@pytest.mark.parametrize("name", SAMPLERS)
def test_only_stochastic_samplers_draw_noise(name):
    """One draw a step where noise is added; none at all by default for DDIM and the clipped sampler."""
    schedule, z = CosineSchedule(), randn(*Z_SHAPE)
    drawn = []

    def noise() -> torch.Tensor:
        drawn.append(1)
        return torch.zeros_like(z)

    sample(mixture(schedule), schedule, SAMPLERS[name](), z=z, num_steps=3, noise=noise)
    assert len(drawn) == (3 if name in ("ddpm", "consistency") else 0)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_clipped_without_a_reachable_limit_is_ddim(eta):
    schedule, z = CosineSchedule(), randn(*Z_SHAPE)
    ends = [
        sample(mixture(schedule), schedule, sampler, z=z, num_steps=5, noise=noise_source(Z_SHAPE, 7))
        for sampler in (Clipped(clipping_value=1e9, eta=eta), Ddim(clipping_value=None, eta=eta))
    ]
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def test_batch_of_different_times_is_each_image_s_own_step():
    """Angles are per image; nothing leaks between images."""
    schedule, times = CosineSchedule(), grid_times(6)
    angles, z, n = grid_angles(schedule, times), randn(6, 1, 2, 2), randn(6, 1, 2, 2, seed=1)
    for sampler in [*VARIANTS.values(), Clipped(eta=0.3)]:
        together = sampler.step(
            z=z, prediction=wild(schedule)(z, times[1:]), angle_t=angles[1:], angle_s=angles[:-1], noise=lambda: n
        )
        for i in range(6):
            one = slice(i, i + 1)
            alone = sampler.step(
                z=z[one],
                prediction=wild(schedule)(z[one], times[1:][one]),
                angle_t=angles[1:][one],
                angle_s=angles[:-1][one],
                noise=lambda one=one: n[one],
            )
            torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


def test_float32_sampling_stays_close_to_float64():
    schedule, z = CosineSchedule(), randn(*Z_SHAPE)
    for name, sampler in VARIANTS.items():
        ends = []
        for dtype in (torch.float64, torch.float32):
            draw = noise_source(Z_SHAPE, 8)
            end = sample(
                random_teacher(schedule),
                schedule,
                sampler,
                z=z.to(dtype),
                num_steps=64,
                noise=lambda draw=draw, dtype=dtype: draw().to(dtype),
            )
            assert end.dtype == dtype
            ends.append(end.double())
        torch.testing.assert_close(*ends, rtol=1e-4, atol=1e-4, msg=name)


def test_image_k_does_not_depend_on_its_batch():
    torch.manual_seed(0)
    network = UNet(
        UNetConfig(channels=8, embedding_channels=8, multipliers=(1, 2), num_blocks=1, attention_strides=(2,))
    )
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    denoiser = Denoiser(network.double(), CosineSchedule(), "v").eval()
    z, n = randn(4, 3, 4, 4), randn(4, 3, 4, 4, seed=1)

    def draw(images: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return sample(denoiser, denoiser.schedule, Ddim(eta=0.5), z=z[images], num_steps=3, noise=lambda: n[images])

    whole = draw([0, 1, 2, 3])
    for images in ([2], [3, 0], [1, 2, 3]):
        torch.testing.assert_close(draw(images), whole[images], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_value_that_is_not_finite_is_an_error_that_names_its_step(bad, dtype):
    calls = []

    def breaks_at_step_3(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        calls.append(t)
        zero = torch.zeros_like(z)
        if len(calls) == 3:
            zero[1, 0, 0, 0] = bad
        return Prediction(zero, zero, zero)

    with pytest.raises(NonFiniteSampleError, match=f"step 3 of 5 .* in {dtype}"):
        sample(
            breaks_at_step_3,
            CosineSchedule(),
            Ddim(clipping_value=None),
            z=torch.zeros(2, 1, 2, 2).to(dtype),
            num_steps=5,
            noise=no_noise,
        )
    assert issubclass(NonFiniteSampleError, ValueError)


@every_schedule
def test_loop_asks_the_network_once_a_step_and_tells_how_many_are_done(schedule):
    asked, done = [], []
    z = randn(*Z_SHAPE)

    def denoise(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        assert t.shape == (3,)
        assert t.dtype == torch.float64
        asked.append(t[0].item())
        return gaussian(schedule, 1.0)(z, t)

    end = sample(denoise, schedule, Ddim(clipping_value=None), z=z, num_steps=4, noise=no_noise, on_step=done.append)
    assert asked == [1, 0.75, 0.5, 0.25]
    assert done == [1, 2, 3, 4]
    angles = grid_angles(schedule, grid_times(4))
    torch.testing.assert_close(end, z * angles.diff().cos().prod(), rtol=1e-12, atol=0)


@every_table
def test_a_table_is_sampled_between_its_levels(schedule):
    """By angles between those of the table: DDIM of N(0, 0.3²) in the closed form of each step, to 7 steps of 1/7."""
    denoise, z = gaussian(schedule, 0.3), randn(*Z_SHAPE)
    asked = []

    def teacher(z, t):
        asked.append(schedule.timestep(t[0]).item())
        return denoise(z, t)

    found = sample(teacher, schedule, Ddim(clipping_value=None), z=z, num_steps=7, noise=no_noise)
    angles = grid_angles(schedule, grid_times(7)).tolist()
    assert asked == pytest.approx([schedule.num_levels * k / 7 - 1 for k in range(7, 0, -1)])
    for s, t in reversed(list(itertools.pairwise(angles))):
        d = 0.09 * math.cos(t) ** 2 + math.sin(t) ** 2
        z = z * (math.cos(s) * 0.09 * math.cos(t) + math.sin(s) * math.sin(t)) / d
    torch.testing.assert_close(found, z, rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match="levels, too few for"):
        sample(teacher, schedule, Ddim(), z=z, num_steps=schedule.num_levels + 1, noise=no_noise)
