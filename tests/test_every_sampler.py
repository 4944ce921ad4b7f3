"""What holds for every sampler of the registry, for the limits of predicted images, and for the loop."""

from __future__ import annotations

import math

import pytest
import torch

from tests.foreign import wild
from tests.oracles import ALL_SCHEDULES, Z_SHAPE, column, gaussian, mixture, no_noise, noise_source, randn
from vdiff.diffusion.grids import GRIDS, grid_of
from vdiff.diffusion.prediction import Prediction, from_x
from vdiff.diffusion.samplers import (
    SAMPLERS,
    Clipped,
    Ddim,
    Ddpm,
    Dpmpp2m,
    Dpmpp3m,
    Heun,
    Ipndm,
    Renoising,
    UniPc,
    ddim_step,
    sample,
)
from vdiff.diffusion.schedules import CosineSchedule, DdpmCosineSchedule, LinearSchedule, grid_angles, grid_times
from vdiff.diffusion.stepping import Limits, quantile

every_schedule = pytest.mark.parametrize("schedule", ALL_SCHEDULES.values(), ids=ALL_SCHEDULES)
every_name = pytest.mark.parametrize("name", SAMPLERS)
COSINE = CosineSchedule()


@every_schedule
@pytest.mark.parametrize("grid", GRIDS)
@every_name
def test_data_of_one_point_are_drawn_exactly(schedule, grid, name):
    """x̂ = μ everywhere: deterministic samplers stay on z = α μ + σ ε, all end with μ."""
    mean, eps = 0.3 * randn(*Z_SHAPE, seed=1).clamp(-2, 2), randn(*Z_SHAPE)

    def denoise(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        return from_x(z, mean, schedule.angle(t))

    for num_steps in (1, 2, 5, 8):
        if grid == "uniform" and schedule.num_levels and schedule.num_levels % num_steps:
            continue
        times, states = grid_of(grid, schedule, num_steps), []
        angles = grid_angles(schedule, times)
        z = angles[-1].cos() * mean + angles[-1].sin() * eps
        end = sample(
            denoise, schedule, SAMPLERS[name](), z=z, num_steps=num_steps, noise=noise_source(Z_SHAPE, 2), times=times,
            on_state=lambda _, z, __, states=states: states.append(z),
        )  # fmt: skip
        torch.testing.assert_close(end, mean, rtol=1e-9, atol=1e-9)
        if name not in ("ddpm", "consistency", "clipped"):  # `clipped` clamps ε̂, too
            for state, angle in zip(states, angles[1:].flip(0), strict=True):
                torch.testing.assert_close(state, angle.cos() * mean + angle.sin() * eps, rtol=1e-9, atol=1e-9)


@every_schedule
@pytest.mark.parametrize("grid", GRIDS)
@every_name
def test_images_are_finite_and_within_limits(schedule, grid, name):
    z = randn(*Z_SHAPE, dtype=torch.float32)
    noise = noise_source(Z_SHAPE, 2)
    for num_steps in (1, 2, 3, 4, 6, 8):
        if grid == "uniform" and schedule.num_levels and schedule.num_levels % num_steps:
            continue
        end = sample(
            wild(schedule), schedule, SAMPLERS[name](), z=z, num_steps=num_steps, noise=lambda: noise().float(),
            times=grid_of(grid, schedule, num_steps),
        )  # fmt: skip
        assert end.dtype == torch.float32
        assert end.abs().max() <= (1.2 if name == "clipped" else 1) + 1e-5


LIMITED = {
    "ddim": Ddim(clipping_value=0.3),
    "ddpm": Ddpm(threshold=0.7),
    "consistency": Renoising(clipping_value=0.3),
    "clipped": Clipped(clipping_value=0.3),
    "dpmpp_2m": Dpmpp2m(clipping_value=0.3),
    "dpmpp_3m": Dpmpp3m(threshold=0.7),
    "unipc": UniPc(clipping_value=0.3),
    "ipndm": Ipndm(clipping_value=0.3),
    "heun": Heun(threshold=0.7),
}


@pytest.mark.parametrize("schedule", [CosineSchedule(), LinearSchedule()], ids=["cosine", "linear"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 16])
@every_name
def test_the_last_step_ends_with_the_limited_image(schedule, num_steps, name):
    """Of the last prediction; iPNDM, whose ε̂ is carried on, with what that makes of it."""
    num_steps = 20 if num_steps in (3, 16) and schedule.num_levels else num_steps
    sampler, seen = LIMITED[name], []
    end = sample(
        wild(schedule), schedule, sampler, z=2 * randn(*Z_SHAPE), num_steps=num_steps, noise=noise_source(Z_SHAPE, 3),
        on_state=lambda _, z, prediction: seen.append((z, prediction)),
    )  # fmt: skip
    assert name == "clipped" or (seen[-1][1].x.abs() > 0.3).any()  # its clamped ε̂ leads to the middle
    x = seen[-1][1].x
    expected = x.clamp(-0.3, 0.3) if name not in ("ddpm", "dpmpp_3m", "heun") else sampler.limit(x)
    if name == "ipndm" and num_steps > 1:
        angles = grid_angles(schedule, grid_times(num_steps))[1:].flip(0)
        eps = [p.clip(z, angle.expand(3), 0.3).eps for angle, (z, p) in zip(angles, seen, strict=True)][::-1]
        weights = {2: (1.5, -0.5), 3: (23 / 12, -4 / 3, 5 / 12)}.get(num_steps, (55 / 24, -59 / 24, 37 / 24, -9 / 24))
        carried = sum(w * e for w, e in zip(weights, eps, strict=False))
        expected = ((seen[-1][0] - angles[-1].sin() * carried) / angles[-1].cos()).clamp(-0.3, 0.3)
    torch.testing.assert_close(end, expected, rtol=1e-9, atol=1e-9)


@every_name
@pytest.mark.parametrize("num_steps", [1, 2, 7])
def test_the_network_is_asked_as_often_as_said(name, num_steps):
    sampler, asked = SAMPLERS[name](), []

    def denoise(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        assert t.shape == (3,)
        assert t.dtype == torch.float64
        asked.append(t[0].item())
        return wild(COSINE)(z, t)

    sample(denoise, COSINE, sampler, z=randn(*Z_SHAPE), num_steps=num_steps, noise=noise_source(Z_SHAPE, 4))
    times = [i / num_steps for i in range(num_steps, 0, -1)]
    assert asked == (sorted([*times, *times[1:]], reverse=True) if name == "heun" else times)
    assert len(asked) == sampler.evaluations(num_steps) == (2 * num_steps - 1 if name == "heun" else num_steps)


@every_name
@pytest.mark.parametrize("options", [{}, {"threshold": 0.8}], ids=["clip", "threshold"])
def test_an_image_is_its_own_whatever_its_batch(name, options):
    if name == "clipped":
        options = {}
    z, n = 2 * randn(5, 2, 3, 4), randn(5, 2, 3, 4, seed=1)

    def draw(rows: list[int]) -> torch.Tensor:
        return sample(wild(COSINE), COSINE, SAMPLERS[name](**options), z=z[rows], num_steps=6, noise=lambda: n[rows])

    whole = draw([0, 1, 2, 3, 4])
    for rows in ([2], [4, 1], [3, 2, 1, 0]):
        torch.testing.assert_close(draw(rows), whole[rows], rtol=1e-9, atol=1e-9)


@every_name
def test_nothing_is_kept_from_one_run_to_another(name):
    """One sampler draws the same again, also while it draws something else."""
    sampler, z = SAMPLERS[name](), randn(*Z_SHAPE)

    def draw(denoise) -> torch.Tensor:
        return sample(denoise, COSINE, sampler, z=z, num_steps=5, noise=noise_source(Z_SHAPE, 5))

    def distracted(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        draw(gaussian(COSINE, 0.5))
        return wild(COSINE)(z, t)

    alone = draw(wild(COSINE))
    assert torch.equal(draw(wild(COSINE)), alone)
    assert torch.equal(draw(distracted), alone)
    assert hash(sampler) == hash(SAMPLERS[name]())


@every_name
def test_float32_is_near_float64(name):
    ends = []
    for dtype in (torch.float64, torch.float32):
        noise = noise_source(Z_SHAPE, 6)
        ends.append(
            sample(
                mixture(COSINE, c=0.3),
                COSINE,
                SAMPLERS[name](),
                z=randn(*Z_SHAPE, dtype=dtype),
                num_steps=32,
                noise=lambda noise=noise, dtype=dtype: noise().to(dtype),
            )
        )
    torch.testing.assert_close(ends[1].double(), ends[0], rtol=2e-4, atol=2e-4)


@every_name
def test_a_step_outside_of_a_run_is_the_first_of_a_long_one(name):
    sampler, z, times = SAMPLERS[name](), randn(*Z_SHAPE), grid_times(8)
    angle_t, angle_s = (angle.expand(3) for angle in grid_angles(COSINE, times)[[8, 7]])
    prediction = wild(COSINE)(z, times[8].expand(3))
    arguments = {"z": z, "prediction": prediction, "angle_t": angle_t, "angle_s": angle_s, "noise": no_noise}
    if name == "heun":
        with pytest.raises(ValueError, match="outside of a run there is none"):
            sampler.step(**arguments)
    elif name not in ("ddpm", "consistency", "clipped"):
        expected = ddim_step(z, prediction.clip(z, angle_t, 1.0).v, angle_t, angle_s)
        torch.testing.assert_close(sampler.step(**arguments), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "clipped"])
def test_dynamic_thresholding_reaches_every_sampler_that_clips(name):
    """With the quantile 1 nothing is cut, only scaled down: other images than with the clip, and all within 1."""
    z, schedule = randn(*Z_SHAPE), DdpmCosineSchedule()

    def draw(**options) -> torch.Tensor:
        return sample(
            wild(schedule), schedule, SAMPLERS[name](**options), z=z, num_steps=4, noise=noise_source(Z_SHAPE, 7)
        )

    scaled = draw(threshold=1.0)
    assert (scaled - draw()).abs().max() > 0.01
    assert scaled.abs().max() <= 1 + 1e-9


# Limits


@pytest.mark.parametrize("p", [0.01, 0.5, 0.77, 0.995, 1.0])
@pytest.mark.parametrize("shape", [(3, 2, 5, 7), (2, 1, 1, 1), (1, 3, 4, 4)])
def test_quantile_is_torch_s(p, shape):
    values = randn(*shape)
    torch.testing.assert_close(quantile(values, p), values.flatten(1).quantile(p, dim=1), rtol=1e-12, atol=1e-12)
    half = quantile(values.half(), p)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, values.half().float().flatten(1).quantile(p, dim=1))


def test_quantile_takes_large_images():
    values = torch.arange(1 << 14, dtype=torch.float32).repeat(1, 1 << 11)
    assert quantile(values, 0.999).item() == pytest.approx(0.999 * (1 << 14), abs=2)


def test_dynamic_thresholding_written_out():
    x = torch.tensor([[[[0.5, -4.0, 1.0, 2.0]]], [[[0.1, 0.2, -0.9, 0.3]]]])
    found = Limits(threshold=2 / 3).limit(x)  # of |x|: 0.5, 1, 2, 4 → 2
    torch.testing.assert_close(found[0], torch.tensor([[[0.25, -1.0, 0.5, 1.0]]]))
    assert torch.equal(found[1], x[1])  # below 1: as it is
    halved = Limits(clipping_value=0.5, threshold=2 / 3).limit(x)
    torch.testing.assert_close(halved[0], found[0] / 2)
    assert torch.equal(halved[1], x[1].clamp(-0.5, 0.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clipping_value": 0.0}, "clipping_value must be a positive number, got 0.0"),
        ({"clipping_value": math.nan}, "clipping_value must be a positive number, got nan"),
        ({"clipping_value": math.inf}, "clipping_value must be a positive number, got inf"),
        ({"threshold": 0.0}, r"threshold is a quantile in \(0, 1\], got 0.0"),
        ({"threshold": 1.5}, r"threshold is a quantile in \(0, 1\], got 1.5"),
        ({"clipping_value": None, "threshold": 0.9}, "threshold needs a clipping_value"),
    ],
)
def test_limits_that_are_none_are_refused(options, message):
    for sampler in (Ddim, Ddpm, Dpmpp2m, Dpmpp3m, UniPc, Ipndm, Heun):
        with pytest.raises(ValueError, match=message):
            sampler(**options)


def test_orders_and_frames_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="order is 1, 2 or 3, got 4"):
        UniPc(order=4)
    with pytest.raises(ValueError, match="order is 1, 2, 3 or 4, got 5"):
        Ipndm(order=5)
    with pytest.raises(ValueError, match="frame is v or eps, got 'x'"):
        Heun(frame="x")


# The loop


@every_name
def test_on_state_sees_what_the_network_saw(name):
    seen, asked, told = [], [], []

    def denoise(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        asked.append((z, t[0].item()))
        told.append(wild(COSINE)(z, t))
        return told[-1]

    def draw(**options) -> torch.Tensor:
        return sample(
            denoise, COSINE, SAMPLERS[name](), z=randn(*Z_SHAPE), num_steps=4, noise=noise_source(Z_SHAPE, 8), **options
        )

    end = draw(on_state=lambda i, z, prediction: seen.append((i, z, prediction)))
    assert [i for i, _, _ in seen] == [0, 1, 2, 3]
    first = [0, 2, 4, 6] if name == "heun" else [0, 1, 2, 3]
    for k, (_, z, prediction) in zip(first, seen, strict=True):
        assert z is asked[k][0]
        assert prediction is told[k]
    assert [asked[k][1] for k in first] == [1, 0.75, 0.5, 0.25]
    assert torch.equal(draw(), end)


def test_a_grid_of_one_s_own():
    """The network is asked at its times, and the last step of a grid that ends above 0 leaves that much noise."""
    times, asked = torch.tensor([0.2, 0.3, 0.65, 0.9], dtype=torch.float64), []

    def denoise(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        asked.append(t[0].item())
        return gaussian(COSINE, 1.0)(z, t)

    z = randn(*Z_SHAPE)
    end = sample(denoise, COSINE, Ddim(clipping_value=None), z=z, num_steps=3, noise=no_noise, times=times)
    assert asked == [0.9, 0.65, 0.3]
    torch.testing.assert_close(end, z * COSINE.angle(times).diff().cos().prod(), rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="a grid of 4 steps is 5 float64 times"):
        sample(denoise, COSINE, Ddim(), z=z, num_steps=4, noise=no_noise, times=times)


def test_a_table_takes_any_number_of_its_own_levels():
    schedule = DdpmCosineSchedule()
    z = randn(*Z_SHAPE)
    times = grid_of("trailing", schedule, 7)
    end = sample(
        gaussian(schedule, 1.0), schedule, Ddim(clipping_value=None), z=z, num_steps=7, noise=no_noise, times=times
    )
    cosines = column(grid_angles(schedule, times).diff().cos().prod(), z)
    torch.testing.assert_close(end, z * cosines, rtol=1e-12, atol=0)
