"""Parameterisations against the families' own formulas, samplers and ODEs, written down here or by other libraries."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from scipy.integrate import solve_ivp
from torch import Tensor

from tests.oracles import column, no_noise, randn
from vdiff.diffusion.grids import grid_of
from vdiff.diffusion.parameterisation import (
    PARAMETERISATIONS,
    Edm,
    Flow,
    Parameterisation,
    Vp,
    build_parameterisation,
    normal_angles,
)
from vdiff.diffusion.samplers import SAMPLERS, Ddim, Heun, sample
from vdiff.diffusion.schedules import (
    CosineSchedule,
    EdmSchedule,
    FlowSchedule,
    LinearSchedule,
    Schedule,
    grid_angles,
    grid_times,
    logsnr,
)
from vdiff.diffusion.weighting import WEIGHTINGS, weighting_of
from vdiff.models.backbone import Backbone
from vdiff.models.condition import SECOND_TIME, Condition, Signature
from vdiff.models.denoiser import Denoiser

MEANS, VARIANCES, SHARES = (-0.9, 0.2, 0.8), (0.3**2, 0.5**2, 0.4**2), (0.5, 0.2, 0.3)
"""The data: pixels that are independent draws of this mixture of Gaussians."""


def posterior_mean(state: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """E[x | a x + b ε = state]: the closed form, by the variance of each part."""
    terms = []
    for mean, variance, share in zip(MEANS, VARIANCES, SHARES, strict=True):
        total = a**2 * variance + b**2
        terms.append(
            (math.log(share) - 0.5 * total.log() - (state - a * mean) ** 2 / (2 * total), mean, variance / total)
        )
    weights = torch.stack([term[0] for term in terms]).softmax(0)
    means = torch.stack([mean + gain * a * (state - a * mean) for _, mean, gain in terms])
    return (weights * means).sum(0)


class Closed(Backbone):
    """A network of one pixel's functions: `answer(state, timestep)`, both as the family gives them."""

    kind = "python"

    def __init__(self, answer: Callable[[Tensor, Tensor], Tensor], channels: int = 2, factor: int = 1) -> None:
        super().__init__()
        self.answer = answer
        self.signature = Signature(channels, channels * factor, (SECOND_TIME,))
        self.seen: list[tuple[Tensor, Tensor, dict[str, Tensor]]] = []

    def forward(self, z: Tensor, timestep: Tensor, **condition: Tensor) -> Tensor:
        self.seen.append((z, timestep, condition))
        return self.answer(z, column(timestep, z))


@dataclass(frozen=True)
class Family:
    """A family as its own papers write it.

    Attributes:
        network: (input, timestep) → output of the perfect network.
        process: its noise level → (a, b) of the state a x + b ε.
        slope: (state, level, x̂) → d state/d level.
    """

    parameterisation: Parameterisation
    schedule: Schedule
    network: Callable[[Tensor, Tensor], Tensor]
    process: Callable[[Tensor], tuple[Tensor, Tensor]]
    slope: Callable[[Tensor, Tensor, Tensor], Tensor]


def edm(noise_scale: float, noise_offset: float, sigma_data: float = 0.5) -> Callable[[Tensor, Tensor], Tensor]:
    """F(c_in X; c_noise) = (D(X; s) − c_skip X)/c_out."""

    def network(state: Tensor, told: Tensor) -> Tensor:
        s = ((told - noise_offset) / noise_scale).exp()
        total = s**2 + sigma_data**2
        x = state * total.sqrt()
        return (posterior_mean(x, torch.ones_like(s), s) - sigma_data**2 / total * x) / (s * sigma_data / total.sqrt())

    return network


def exploding(state: Tensor, told: Tensor) -> Tensor:
    """D(X; s) = X + s F(X; ln(s/2))."""
    s = 2 * told.exp()
    return (posterior_mean(state, torch.ones_like(s), s) - state) / s


def flow(time_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """u = ε − x = (state − x̂)/τ."""

    def network(state: Tensor, told: Tensor) -> Tensor:
        tau = told / time_scale
        return (state - posterior_mean(state, 1 - tau, tau)) / tau

    return network


def preserving(schedule: Schedule, predicts: str) -> Callable[[Tensor, Tensor], Tensor]:
    """x̂, or ε̂ = (z − α x̂)/σ, or v̂ = α ε̂ − σ x̂."""

    def network(z: Tensor, told: Tensor) -> Tensor:
        angle = schedule.angle((told.double() + 1) / schedule.label_scale)
        a, b = angle.cos().to(z), angle.sin().to(z)
        x = posterior_mean(z, a, b)
        eps = (z - a * x) / b
        return {"x": x, "eps": eps, "v": a * eps - b * x, "both": torch.cat([x, eps], 1)}[predicts]

    return network


def vp_family(predicts: str, schedule: Schedule) -> Family:
    return Family(
        Vp(predicts),
        schedule,
        preserving(schedule, predicts),
        lambda s: (1 / (1 + s**2).sqrt(), s / (1 + s**2).sqrt()),
        # d(z √(1 + s²))/ds = ε: Song et al. 2021, *Denoising Diffusion Implicit Models*, eq. 14
        lambda z, s, x: ((z * (1 + s**2).sqrt() - x) / s - s * z / (1 + s**2).sqrt()) / (1 + s**2).sqrt(),
    )


def edm_family(parameterisation: Edm, network: Callable[[Tensor, Tensor], Tensor], **schedule: float) -> Family:
    return Family(
        parameterisation,
        EdmSchedule(**schedule),  # type: ignore[arg-type]
        network,
        lambda s: (torch.ones_like(s), s),
        lambda state, s, x: (state - x) / s,  # Karras et al. 2022, algorithm 1
    )


def flow_family(shift: float, time_scale: float) -> Family:
    return Family(
        Flow(time_scale),
        FlowSchedule(shift),
        flow(time_scale),
        lambda tau: (1 - tau, tau),
        lambda state, tau, x: (state - x) / tau,
    )


FAMILIES = {
    "vp, v": vp_family("v", CosineSchedule()),
    "vp, x": vp_family("x", CosineSchedule()),
    "vp, both": vp_family("both", CosineSchedule()),
    "vp, eps on a table": vp_family("eps", LinearSchedule()),
    "edm": edm_family(Edm(), edm(0.25, 0.0)),
    "edm, other data": edm_family(Edm(sigma_data=1.3), edm(0.25, 0.0, 1.3), sigma_max=20.0),
    "edm, 250 ln s": edm_family(Edm(noise_scale=250.0), edm(250.0, 0.0)),
    "edm, ve": edm_family(
        Edm(scaled_input=False, noise_output=True, noise_scale=1.0, noise_offset=-math.log(2)), exploding
    ),
    "flow": flow_family(1.0, 1000.0),
    "flow, shifted": flow_family(3.0, 1.0),
}
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def denoiser_of(family: Family) -> Denoiser:
    return Denoiser(
        Closed(family.network, factor=family.parameterisation.channel_factor), family.schedule, family.parameterisation
    )


def levels_of(family: Family, times: Tensor) -> Tensor:
    """The family's noise levels at the times of a grid, of which the first is the clean image."""
    return family.parameterisation.level(grid_angles(family.schedule, times))


def ours(family: Family, z: Tensor, num_steps: int, times: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        return sample(
            denoiser_of(family), family.schedule, Ddim(clipping_value=None), z=z, num_steps=num_steps, noise=no_noise,
            times=times,
        )  # fmt: skip


def scale_of(family: Family, level: Tensor) -> Tensor:
    """√(a² + b²): the state is z times it."""
    a, b = family.process(level)
    return (a**2 + b**2).sqrt()


@every_family
def test_a_perfect_network_says_the_posterior_mean_of_z(family):
    t = torch.cat([torch.linspace(1 / 512, 1, 40, dtype=torch.float64)])
    z = randn(len(t), 2, 3, 3)
    angle = family.schedule.angle(t)
    found = denoiser_of(family)(z, t)
    a, b = column(angle.cos(), z), column(angle.sin(), z)
    x = posterior_mean(z, a, b)
    # a factor 1/α goes before the output of ε
    scale = 1 / a.clamp(min=1e-6) if family.parameterisation.predicts_noise else 1
    assert ((found.x - x).abs() <= 2e-9 * scale).all()
    torch.testing.assert_close(a * found.x + b * found.eps, z, rtol=0, atol=1e-9)
    torch.testing.assert_close(found.v, a * found.eps - b * found.x, rtol=0, atol=1e-9)


@every_family
def test_ddim_is_euler_in_the_familys_own_state_and_levels(family):
    """The state's straight line through x̂ and ε̂ at the next level, computed from a, b and x̂ alone."""
    times = grid_times(16)
    levels = levels_of(family, times)
    z = randn(2, 2, 3, 3)
    state = z * scale_of(family, levels[-1])
    for i in range(16, 0, -1):
        (a, b), (a_next, b_next) = family.process(levels[i]), family.process(levels[i - 1])
        x = posterior_mean(state, a, b)
        if isinstance(family.parameterisation, Vp):  # Euler of z/α over σ/α
            moved = state / a + (b_next / a_next - b / a) * (state - a * x) / b
            state = a_next * moved
        else:
            state = state + (levels[i - 1] - levels[i]) * family.slope(state, levels[i], x)
    tolerance = 1e-10 if not family.parameterisation.predicts_noise else 1e-9
    torch.testing.assert_close(ours(family, z, 16), state, rtol=0, atol=tolerance)


@every_family
def test_many_steps_reach_the_solution_of_the_familys_ode(family):
    """Richardson's 2 z(4096) − z(2048) against DOP853 in the family's own state and level."""
    fine, coarse = grid_times(4096), grid_times(4096)[::2]
    if family.schedule.num_levels:
        fine, coarse = grid_times(1000), grid_times(500)
    first = 0.02
    fine, coarse = first + (1 - first) * fine, first + (1 - first) * coarse
    z = randn(1, 2, 2, 2, seed=3)
    level, last = (float(levels_of(family, fine[[k]])[0]) for k in (-1, 0))
    start = (z * scale_of(family, torch.tensor(level))).flatten()

    def slope(s: float, state: np.ndarray) -> np.ndarray:
        here, at = torch.from_numpy(state), torch.tensor(s, dtype=torch.float64)
        return family.slope(here, at, posterior_mean(here, *family.process(at))).numpy()

    solved = solve_ivp(slope, (level, last), start.numpy(), method="DOP853", rtol=1e-11, atol=1e-12)
    assert solved.success
    due = torch.from_numpy(solved.y[:, -1]).reshape(z.shape) / scale_of(family, torch.tensor(last))
    found = 2 * ours(family, z, len(fine) - 1, fine) - ours(family, z, len(coarse) - 1, coarse)
    torch.testing.assert_close(found, due, rtol=0, atol=1e-5)


@every_family
def test_levels_angles_and_timesteps_are_inverse_up_to_the_ends(family):
    used, schedule = family.parameterisation, family.schedule
    t = torch.linspace(1 / schedule.label_scale, 1, 997, dtype=torch.float64)
    angle = schedule.angle(t)
    near = {"rtol": 1e-10, "atol": 1e-10}
    ends = torch.tensor([0.0, math.pi / 2], dtype=torch.float64)
    for each in (angle, ends):
        torch.testing.assert_close(used.angle(used.level(each)), each, **near)
    torch.testing.assert_close(used.angle_of_timestep(schedule, used.timestep(schedule, t)), angle, **near)
    torch.testing.assert_close(schedule.time(used.angle_of_timestep(schedule, used.timestep(schedule, t))), t, **near)


@every_family
def test_states_are_the_familys_own_and_reading_is_finite_at_both_ends(family):
    """c · z is what the family gives its network for a x + b ε; at φ = 0 and φ = π/2 too."""
    used, z = family.parameterisation, randn(4, 2, 2, 2)
    angle = torch.tensor([0.0, 0.3, 1.2, math.atan(80)], dtype=torch.float64)
    level = column(used.level(angle), z)
    process = family.process(level)
    state = z * (process[0] ** 2 + process[1] ** 2).sqrt()
    if isinstance(used, Edm) and used.scaled_input:
        state = state / (level**2 + used.sigma_data**2).sqrt()
    torch.testing.assert_close(used.state(z, angle), state, rtol=1e-10, atol=1e-10)
    if used.predicts_noise or used.prediction == "x":
        return  # nothing is said there
    ends = torch.tensor([0.0, math.pi / 2], dtype=torch.float64)
    if used.prediction != "both":
        said = used.read(z[:2], torch.ones_like(z[:2]), ends)
        assert all(part.isfinite().all() for part in (said.x, said.eps, said.v))
        torch.testing.assert_close(said.x[0], z[0], rtol=0, atol=1e-10)
        torch.testing.assert_close(said.eps[1], z[1], rtol=0, atol=1e-10)


def edm_heun(network: Callable[[Tensor, Tensor], Tensor], latents: Tensor, num_steps: int) -> Tensor:
    """Algorithm 1 of Karras et al. 2022 with S_churn = 0, and their preconditioning, as written in the paper."""
    sigma_min, sigma_max, rho, sigma_data = 0.002, 80.0, 7.0, 0.5
    index = torch.arange(num_steps, dtype=torch.float64)
    root = sigma_max ** (1 / rho) + index / (num_steps - 1) * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))
    levels = torch.cat([root**rho, torch.zeros(1, dtype=torch.float64)])

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
        c_in, c_noise = 1 / (sigma_data**2 + sigma**2).sqrt(), sigma.log() / 4
        return c_skip * x + c_out * network(c_in * x, c_noise.expand(len(x)))

    x = latents * levels[0]
    for now, after in pairwise(levels):
        slope = (x - denoise(x, now)) / now
        moved = x + (after - now) * slope
        if after > 0:
            moved = x + (after - now) * (slope + (moved - denoise(moved, after)) / after) / 2
        x = moved
    return x


def small_network(state: Tensor, told: Tensor) -> Tensor:
    """Random, smooth, and no denoiser of anything."""
    matrix = randn(state[0].numel(), state[0].numel(), seed=5).to(state) / state[0].numel() ** 0.5
    return torch.tanh(state.flatten(1) @ matrix + 0.3 * told.reshape(-1, 1).to(state)).reshape(state.shape)


@pytest.mark.parametrize("num_steps", [2, 7, 18])
def test_heun_on_the_grid_karras_is_edms_sampler(num_steps):
    schedule = EdmSchedule()
    denoiser = Denoiser(Closed(small_network), schedule, Edm())
    noise = randn(3, 2, 4, 4)
    angle = schedule.angle(torch.ones(1, dtype=torch.float64))
    found = sample(
        denoiser, schedule, Heun(clipping_value=None, frame="eps"), z=noise * angle.sin(), num_steps=num_steps,
        noise=no_noise, times=grid_of("karras", schedule, num_steps),
    )  # fmt: skip
    due = edm_heun(small_network, noise, num_steps)
    torch.testing.assert_close(found, due, rtol=0, atol=1e-4)
    assert (found - due).abs().max() < 1e-9


def test_the_uniform_grid_of_all_steps_is_edms():
    schedule = EdmSchedule(label_scale=40)
    karras = grid_of("karras", schedule, 40)
    torch.testing.assert_close(karras, grid_times(40), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        Edm().level(schedule.angle(karras[[1, -1]])),
        torch.tensor([0.002, 80.0], dtype=torch.float64),
        rtol=1e-10,
        atol=0,
    )


@pytest.mark.parametrize(("shift", "num_steps"), [(1.0, 10), (3.0, 7), (3.0, 28)])
def test_ddim_of_a_flow_is_diffusers_flow_match_euler(shift, num_steps):
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=shift)
    schedule = FlowSchedule(shift)
    # as the pipelines of FLUX give them, before the shift
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / num_steps, num_steps).tolist())
    denoiser = Denoiser(Closed(small_network), schedule, Flow())
    z = noise = randn(3, 2, 4, 4)
    for time in scheduler.timesteps:
        z = scheduler.step(small_network(z, time.expand(len(z)).double()), time, z, return_dict=False)[0]
    found = sample(
        denoiser, schedule, Ddim(clipping_value=None), z=noise, num_steps=num_steps, noise=no_noise
    )  # fmt: skip
    torch.testing.assert_close(found, z.double(), rtol=0, atol=1e-4)
    told = [float(seen[1][0]) for seen in denoiser.network.seen]  # type: ignore[union-attr]
    torch.testing.assert_close(torch.tensor(told), scheduler.timesteps.float(), rtol=1e-5, atol=1e-3)


def test_ddim_of_a_table_is_diffusers_ddim():
    schedule = LinearSchedule()
    scheduler = DDIMScheduler(1000, clip_sample=False, timestep_spacing="trailing", set_alpha_to_one=True)
    scheduler.set_timesteps(20)
    z = noise = randn(3, 2, 4, 4)
    for time in scheduler.timesteps:
        z = scheduler.step(small_network(z, time.expand(len(z))), int(time), z).prev_sample
    denoiser = Denoiser(Closed(small_network), schedule, Vp("eps"))
    found = sample(denoiser, schedule, Ddim(clipping_value=None), z=noise, num_steps=20, noise=no_noise)
    scale = z.abs().max()
    torch.testing.assert_close(found / scale, z / scale, rtol=0, atol=1e-4)


# the sampler consistency needs a network that jumps to samples; the mean of a perfect denoiser is no sample
@pytest.mark.parametrize("name", sorted(SAMPLERS.keys() - {"consistency"}))
@pytest.mark.parametrize("family", ["edm", "flow, shifted"])
def test_every_sampler_draws_the_data_of_a_perfect_network(family, name):
    """Mean and variance of 4,000 samples; those of the mixture."""
    family = FAMILIES[family]
    denoiser = denoiser_of(family)
    generator = torch.Generator().manual_seed(0)

    def noise() -> Tensor:
        return torch.randn(20, 2, 10, 10, generator=generator, dtype=torch.float64)

    with torch.no_grad():
        found = sample(
            denoiser, family.schedule, SAMPLERS[name](clipping_value=10.0), z=noise(), num_steps=64, noise=noise
        )  # fmt: skip
    mean = sum(share * mean for share, mean in zip(SHARES, MEANS, strict=True))
    square = sum(s * (m**2 + v) for s, m, v in zip(SHARES, MEANS, VARIANCES, strict=True))
    assert float(found.mean()) == pytest.approx(mean, abs=0.06)
    assert float(found.square().mean()) == pytest.approx(square, abs=0.06)


@pytest.mark.parametrize("family", ["edm", "flow, shifted"])
def test_the_sampler_consistency_jumps_to_the_image_and_adds_noise_in_every_family(family):
    """In the family's own state and levels: x̂ of the state, then a x̂ + b n at the next level."""
    family = FAMILIES[family]
    times, z = grid_times(5), randn(2, 2, 3, 3)
    levels = levels_of(family, times)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    noises = [lambda g=g: torch.randn(z.shape, generator=g, dtype=z.dtype) for g in generators]
    state = z * scale_of(family, levels[-1])
    for i in range(5, 0, -1):
        x = posterior_mean(state, *family.process(levels[i]))
        a, b = family.process(levels[i - 1])
        state = a * x + b * noises[0]()
    with torch.no_grad():
        found = sample(
            denoiser_of(family), family.schedule, SAMPLERS["consistency"](clipping_value=10.0), z=z, num_steps=5,
            noise=noises[1],
        )  # fmt: skip
    torch.testing.assert_close(found, state, rtol=0, atol=1e-9)


@every_family
def test_the_weighting_output_is_the_error_of_the_networks_own_output(family):
    """w(λ) (x − x̂)² for two outputs whose difference is 1."""
    used, z = family.parameterisation, randn(5, 2, 1, 1)
    if used.prediction == "both":
        pytest.skip("its two outputs are two errors")
    angle = torch.tensor([0.05, 0.4, 0.9, 1.3, 1.5], dtype=torch.float64)
    output = randn(5, 2, 1, 1, seed=1)
    difference = used.read(z, output + 1, angle).x - used.read(z, output, angle).x
    weight = column(weighting_of("output", used.output_weight, zero_snr=False)(logsnr(angle)), z)
    torch.testing.assert_close(weight * difference**2, torch.ones_like(z), rtol=1e-9, atol=1e-9)
    assert weighting_of("snr", used.output_weight, zero_snr=False) is WEIGHTINGS["snr"]


def test_training_levels_are_edms_log_normal_and_the_flows_logit_normal():
    u = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    logs = Edm().level(normal_angles(u, -1.2, 1.2)).log()
    assert float(logs.mean()) == pytest.approx(-1.2, abs=1e-3)
    assert float(logs.std()) == pytest.approx(1.2, abs=1e-3)
    tau = Flow().level(normal_angles(u, 0.0, 1.0))
    logits = (tau / (1 - tau)).log()
    assert (float(logits.mean()), float(logits.std())) == pytest.approx((0, 1), abs=1e-3)
    assert normal_angles(torch.zeros(1, dtype=torch.float64), 0.0, 1.0).isfinite().all()


def test_a_second_time_is_told_in_the_familys_way_and_finite_at_zero():
    second = torch.tensor([0.0, 0.5], dtype=torch.float64)
    t, z = torch.tensor([0.7, 1.0], dtype=torch.float64), randn(2, 2, 1, 1)
    for used, schedule in ((Edm(), EdmSchedule()), (Flow(), FlowSchedule())):
        denoiser = Denoiser(network := Closed(small_network), schedule, used)
        denoiser(z, t, Condition({SECOND_TIME: second}))
        told = network.seen[0][2][SECOND_TIME]
        assert told.isfinite().all()
        torch.testing.assert_close(told, used.timestep(schedule, second))


@pytest.mark.parametrize(
    "used", [Vp("x"), Edm(0.7, noise_scale=250.0), Edm(noise_output=True), Flow(1.0)], ids=lambda used: used.name
)
def test_a_description_gives_back_the_parameterisation(used):
    said = used.config_fields()
    assert build_parameterisation(said["parameterisation"] or {"name": "vp", "predicts": said["prediction"]}) == used
    assert said["prediction"] in ("x", used.name)


def test_students_keep_the_input_and_drop_the_noise():
    ve = Edm(scaled_input=False, noise_output=True, noise_scale=1.0, noise_offset=-math.log(2))
    schedule, t, z = EdmSchedule(), torch.tensor([0.2, 1.0], dtype=torch.float64), randn(2, 2, 1, 1)
    angle = schedule.angle(t)
    for used in (*(kind() for kind in PARAMETERISATIONS.values()), ve, Vp("eps"), Vp("both")):
        student = used.student()
        assert not student.predicts_noise
        assert student == used or used.predicts_noise
        assert torch.equal(student.state(z, angle), used.state(z, angle))
        assert torch.equal(student.timestep(schedule, t), used.timestep(schedule, t))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"name": "edn"}, "unknown parameterisation 'edn'; did you mean 'edm'"),
        ({"name": "edm", "sigma": 1}, "edm has no parameter sigma"),
        ({"name": "edm", "sigma_data": 0}, "sigma_data must be a positive number"),
        ({"name": "edm", "scaled_input": 1}, "scaled_input must be true or false"),
        ({"name": "flow", "time_scale": math.inf}, "time_scale must be a positive number"),
        ({"name": "vp", "predicts": "w"}, "unknown prediction type 'w'"),
    ],
)
def test_descriptions_of_nothing_are_refused(config, words):
    with pytest.raises(ValueError, match=words):
        build_parameterisation(config)


@pytest.mark.parametrize(
    "values", [{"sigma_min": 0.0}, {"sigma_max": 0.001}, {"rho": math.inf}, {"label_scale": 1}, {"label_scale": 3}]
)
def test_schedules_of_edm_that_do_not_rise_are_refused(values):
    with pytest.raises(ValueError, match=r"sigma_min|label_scale"):
        EdmSchedule(**values)


def test_a_shift_that_is_not_positive_is_refused():
    with pytest.raises(ValueError, match="shift must be positive"):
        FlowSchedule(0.0)
