"""Samplers of higher order: how fast their errors fall, and their formulas."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from scipy.integrate import quad

from tests.foreign import wild
from tests.oracles import Z_SHAPE, gaussian, mixture, no_noise, randn
from vdiff.diffusion.multistep import difference_weights, moments
from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.samplers import Ddim, Dpmpp2m, Dpmpp3m, Heun, Ipndm, UniPc, sample
from vdiff.diffusion.schedules import CosineSchedule, grid_angles, grid_times
from vdiff.diffusion.stepping import PastStep, SolverState

COSINE = CosineSchedule()
INNER, WHOLE = (0.1, 0.8), (0.0, 1.0)

ORDERS = {
    "ddim": (Ddim(clipping_value=None), 1),
    "dpmpp_2m": (Dpmpp2m(clipping_value=None), 2),
    "dpmpp_3m": (Dpmpp3m(clipping_value=None), 2),
    "unipc_1": (UniPc(clipping_value=None, order=1), 2),
    "unipc_2": (UniPc(clipping_value=None, order=2), 3),
    "unipc_3": (UniPc(clipping_value=None, order=3), 4),
    "ipndm_2": (Ipndm(clipping_value=None, order=2), 2),
    "ipndm_3": (Ipndm(clipping_value=None, order=3), 2),
    "ipndm_4": (Ipndm(clipping_value=None, order=4), 2),
    "heun": (Heun(clipping_value=None), 2),
    "heun_eps": (Heun(clipping_value=None, frame="eps"), 2),
}
"""The order of the error at the end of a path. UniPC's corrector adds one to its predictor's."""


def slopes(errors: list[float]) -> list[float]:
    """Orders: log₂ of how much a halved step lessens the error."""
    return [math.log2(one / two) for one, two in pairwise(errors)]


def classical_flow(denoise, z, start: float, end: float, num_steps: int = 1024) -> torch.Tensor:
    """dz/dφ = v from t = `start` down to `end` by the classical Runge-Kutta rule, 4 evaluations a step.

    φ is linear in t, so `end` may lie below 0: where φ is 0.
    """
    step = (end - start) / num_steps

    def slope(z: torch.Tensor, t: float) -> torch.Tensor:
        return denoise(z, torch.tensor([t], dtype=torch.float64)).v * COSINE.span

    for i in range(num_steps):
        t = start + i * step
        a = slope(z, t)
        b = slope(z + step / 2 * a, t + step / 2)
        c = slope(z + step / 2 * b, t + step / 2)
        z = z + step / 6 * (a + 2 * b + 2 * c + slope(z + step * c, t + step))
    return z


TEACHERS = {"gaussian": gaussian(COSINE, 0.5), "mixture": mixture(COSINE, c=0.3)}


@pytest.fixture(scope="module", params=[(name, span) for name in TEACHERS for span in (INNER, WHOLE)], ids=str)
def flow(request):
    """A teacher, noisy images, the grid's ends, and what the images flow to."""
    name, (low, high) = request.param
    denoise, z = TEACHERS[name], randn(1, 1, 1, 64)
    end = classical_flow(denoise, z, high, low or -COSINE.first / COSINE.span)
    if name == "gaussian":
        angles = grid_angles(COSINE, torch.tensor([low, high], dtype=torch.float64))
        d = angles.cos() ** 2 * 0.25 + angles.sin() ** 2
        torch.testing.assert_close(end, (d[0] / d[1]).sqrt() * z, rtol=1e-9, atol=1e-9)
    return denoise, z, (low, high), end


@pytest.mark.parametrize("name", ORDERS)
def test_errors_fall_with_the_order_of_the_sampler(flow, name):
    """Between two times where nothing is singular; rules in angles also from noise to image.

    At both ends σ/α or its inverse grows without bound, so that rules in λ fall short of their order there.
    """
    denoise, z, (low, high), exact = flow
    sampler, order = ORDERS[name]
    errors = []
    for num_steps in (32, 64, 128):
        times = low + (high - low) * grid_times(num_steps)
        end = sample(denoise, COSINE, sampler, z=z, num_steps=num_steps, noise=no_noise, times=times)
        errors.append(((end - exact).norm() / exact.norm()).item())
    found = slopes(errors)[-1]
    if (low, high) == INNER:
        # the leading terms of two orders may nearly cancel while steps are long: then the slope is steeper at first
        more = 0.8 if name in ("dpmpp_3m", "ipndm_3", "ipndm_4") else 0.25
        assert order - 0.35 < found < order + more, (errors, slopes(errors))
        assert errors[-1] < (1e-2 if order == 1 else 1e-3)
    elif name in ("ddim", "heun", "ipndm_2"):
        assert order - 0.15 < found < order + 0.15, (errors, slopes(errors))
    elif name != "heun_eps":
        assert found > 1, (errors, slopes(errors))


@pytest.mark.parametrize(
    ("sampler", "order"),
    [
        (Dpmpp2m(clipping_value=None), 2),
        (Dpmpp3m(clipping_value=None), 2),
        (Dpmpp3m(clipping_value=None, curvature=1.0), 3),
        (UniPc(clipping_value=None, order=1), 1),
        (UniPc(clipping_value=None, order=2), 2),
        (UniPc(clipping_value=None, order=3), 3),
        (Ipndm(clipping_value=None, order=2), 2),
        (Heun(clipping_value=None), 2),
        (Heun(clipping_value=None, frame="eps"), 2),
    ],
    ids=str,
)
def test_one_step_after_an_exact_past_errs_by_its_order_and_one(sampler, order):
    """On the closed-form path of N(0, c²): only the one step errs. The steps behind are unequal, but for iPNDM."""
    denoise = TEACHERS["gaussian"]
    places = (0, 1, 2, 3) if isinstance(sampler, Ipndm) else (0, 1, 2.3, 3.1)
    errors = []
    for width in (0.04, 0.02, 0.01):
        times = torch.tensor([0.5 + place * width for place in places], dtype=torch.float64)
        angles = COSINE.angle(times)
        path = (angles.cos() ** 2 * 0.25 + angles.sin() ** 2).sqrt()
        state = SolverState(num_steps=100, denoise=denoise)
        for i in (3, 2, 1):  # z is put back on the path at each step
            z = path[i].reshape(1, 1, 1, 1)
            state.t_s = times[i - 1 : i]
            found = sampler.step(
                z=z, prediction=denoise(z, times[i : i + 1]), angle_t=angles[i : i + 1], angle_s=angles[i - 1 : i],
                noise=no_noise, state=state,
            )  # fmt: skip
            if isinstance(sampler, UniPc):  # the z that it goes on from is the corrected one: put back as well
                corrected = state.history[0].z
                state.history[0] = PastStep(state.history[0].angle, state.history[0].value, z)
                found = found + angles[i - 1].sin() / angles[i].sin() * (z - corrected)
        errors.append(abs(found.item() - path[0].item()))
    assert order + 0.7 < slopes(errors)[-1] < order + 1.3, (errors, slopes(errors))


@pytest.mark.parametrize("order", [1, 2, 3])
def test_the_corrector_gains_an_order(order):
    denoise, errors = TEACHERS["gaussian"], []
    for width in (0.04, 0.02, 0.01):
        times = torch.tensor([0.5, 0.5 + width, 0.5 + 2.3 * width, 0.5 + 3.1 * width], dtype=torch.float64)
        angles = COSINE.angle(times)
        path = (angles.cos() ** 2 * 0.25 + angles.sin() ** 2).sqrt().reshape(4, 1, 1, 1)
        x = denoise(path, times).x
        notes = [PastStep(angles[i : i + 1], x[i : i + 1], path[i : i + 1]) for i in range(1, order + 1)]
        found = UniPc(order=order).correct(x[:1], angles[:1], notes)
        errors.append(abs(found.item() - path[0].item()))
    assert order + 1.7 < slopes(errors)[-1] < order + 2.3


@pytest.mark.parametrize("h", [0.03, 0.4, 2.5, 11.0])
def test_moments_are_integrals(h):
    total = quad(lambda u: math.exp((u - 1) * h), 0, 1, epsabs=1e-13)[0]
    exact = [quad(lambda u, k=k: math.exp((u - 1) * h) * u**k, 0, 1, epsabs=1e-13)[0] / total for k in (1, 2, 3)]
    found = [moment.item() for moment in moments(torch.tensor([h], dtype=torch.float64), 3)]
    assert found == pytest.approx(exact, rel=1e-8)


def test_weights_of_differences_integrate_polynomials():
    """∫ x p du of x(u) = 2 − u + 3u² − 0.5u³, through the values at 0 and three other places."""
    u, h = torch.tensor([[-0.7, -1.9, 1.0]], dtype=torch.float64), torch.tensor([1.3], dtype=torch.float64)
    values = 2 - u + 3 * u**2 - 0.5 * u**3
    found = 2 + (difference_weights(u, h) / u * (values - 2)).sum().item()
    m_1, m_2, m_3 = (moment.item() for moment in moments(h, 3))
    assert found == pytest.approx(2 - m_1 + 3 * m_2 - 0.5 * m_3, rel=1e-12)


def test_heun_averages_the_velocities_as_seen_from_the_start():
    """z_s = cos δ z_t − sin δ (v_t + v′)/2 with v′ = cos δ v_s − sin δ z_s turned back by δ."""
    denoise, z = wild(COSINE), randn(*Z_SHAPE)
    times = grid_times(4)
    angle_t, angle_s = (angle.expand(3) for angle in grid_angles(COSINE, times)[[3, 2]])
    cos, sin = (angle_t - angle_s)[0].cos(), (angle_t - angle_s)[0].sin()
    first = denoise(z, times[3].expand(3))
    tried = cos * z - sin * first.v
    turned = cos * denoise(tried, times[2].expand(3)).v - sin * tried
    state = SolverState(denoise=denoise, t_s=times[2].expand(3))
    found = Heun(clipping_value=None).step(
        z=z, prediction=first, angle_t=angle_t, angle_s=angle_s, noise=no_noise, state=state
    )
    torch.testing.assert_close(found, cos * z - sin * (first.v + turned) / 2, rtol=1e-12, atol=1e-12)


def test_heun_limits_what_it_is_told_the_second_time():
    """Clipped predictions are what both slopes are made of."""
    z, limit = randn(*Z_SHAPE), 0.3

    def clipped_before(z: torch.Tensor, t: torch.Tensor) -> Prediction:
        return wild(COSINE)(z, t).clip(z, COSINE.angle(t), limit)

    ends = [
        sample(denoise, COSINE, Heun(clipping_value=clip), z=z, num_steps=4, noise=no_noise)
        for denoise, clip in ((wild(COSINE), limit), (clipped_before, None))
    ]
    torch.testing.assert_close(*ends, rtol=1e-10, atol=1e-10)
