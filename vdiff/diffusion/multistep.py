"""Samplers of higher order: they use earlier steps, or evaluate the network twice per step.

With λ' = log(α/σ) = −log tan φ, h = λ'_s − λ'_t and u = (λ' − λ'_t)/h, the probability flow from φ_t to φ_s is

    z_s = (σ_s/σ_t) z_t + g ∫₀¹ x̂(u) p(u) du,    g = α_s (1 − e^−h) = sin(φ_t − φ_s)/σ_t,    p(u) ∝ e^(u h), ∫ p = 1,

DDIM sets x̂(u) = x̂_t. Solvers with data prediction (DPM-Solver++, UniPC) set x̂(u) to a polynomial through the x̂ of
several steps. Nothing is divided by α, which is nearly zero at t = 1. On a grid's last step φ_s = 0 and h is infinite;
the samplers end with x̂ as published: g = 1 and σ_s = 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vdiff.diffusion.prediction import Prediction
from vdiff.diffusion.schedules import coefficient
from vdiff.diffusion.stepping import PastStep, SolverState, StatefulSampler, ddim_step
from vdiff.settings import setting

if TYPE_CHECKING:
    from torch import Tensor

ORDER = "Order of the sampler: 1 to 3 for unipc, 1 to 4 for ipndm."
FEW_STEPS = 15
"""Below this number of steps, the second-to-last step has at most order 2, as in the code of Lu et al. 2022."""


def half_logsnr(angle: Tensor) -> Tensor:
    """λ' = log(α/σ) = −log tan φ: ∞ for the clean image."""
    return -angle.tan().log()


def data_gain(angle_t: Tensor, angle_s: Tensor) -> Tensor:
    """g = sin(φ_t − φ_s)/σ_t: the coefficient of x̂ in a step with data prediction."""
    return (angle_t - angle_s).sin() / angle_t.sin()


def data_step(z: Tensor, x: Tensor, angle_t: Tensor, angle_s: Tensor) -> Tensor:
    """z_s = (σ_s/σ_t) z_t + g x; x = x̂_t is DDIM."""
    kept = angle_s.sin() / angle_t.sin()
    return coefficient(kept, z) * z + coefficient(data_gain(angle_t, angle_s), z) * x


def moments(h: Tensor, count: int) -> list[Tensor]:
    """m_k = ∫₀¹ u^k p(u) du for k = 1 … `count`, p(u) = h e^(u h)/(e^h − 1); h finite.

    Integration by parts: m_k = 1/(1 − e^−h) − (k/h) m_(k−1), m_0 = 1. m_k is 1/(k + 1) for small h, and 1 for large h.
    """
    import torch

    found, moment = [], torch.ones_like(h)
    for k in range(1, count + 1):
        moment = 1 / -torch.expm1(-h) - k / h * moment
        found.append(moment)
    return found


def places(history: list[PastStep], angle_t: Tensor, angle_s: Tensor) -> list[Tensor]:
    """u_j = (λ'_j − λ'_t)/h of earlier steps: negative."""
    here = half_logsnr(angle_t)
    h = half_logsnr(angle_s) - here
    return [(half_logsnr(past.angle) - here) / h for past in history]


def difference_weights(u: Tensor, h: Tensor) -> Tensor:
    """ρ (B, K) with ∫ x̂ p du = x̂_t + Σ_j ρ_j (x̂_j − x̂_t)/u_j for every polynomial x̂ of degree K in u.

    Solves Σ_j ρ_j u_j^(k−1) = m_k for k = 1 … K; `u` (B, K) are the points, except 0, at which x̂_j is known.
    Source: Zhao et al. 2023, *UniPC*: the condition on its coefficients for order K + 1.
    """
    import torch

    powers = torch.stack([u**k for k in range(u.shape[1])], 1)
    return torch.linalg.solve(powers, torch.stack(moments(h, u.shape[1]), 1))


def differences(x: Tensor, history: list[PastStep], angle_t: Tensor, angle_s: Tensor) -> Tensor:
    """Σ_j ρ_j (x̂_j − x̂_t)/u_j; ρ = 1/2 for a single one; 0 for none."""
    import torch

    if not history:
        return torch.zeros_like(x)
    u = torch.stack(places(history, angle_t, angle_s), 1)
    rho = torch.full_like(u, 0.5)
    if len(history) > 1:
        rho = difference_weights(u, half_logsnr(angle_s) - half_logsnr(angle_t))
    total = torch.zeros_like(x)
    for weight, past in zip((rho / u).unbind(1), history, strict=True):
        total = total + coefficient(weight, x) * (past.value - x)
    return total


@dataclass(frozen=True)
class Dpmpp2m(StatefulSampler):
    """DPM-Solver++(2M): a line through the current and the previous x̂, at the middle of the step.

    z_s = (σ_s/σ_t) z_t + g (x̂_t + D/2), D = (h/h₋)(x̂_t − x̂₋), where h₋ is the previous step.

    The first step and the last are DDIM. Source: Lu et al. 2022, *DPM-Solver++*, algorithm 2.
    """

    def advance(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, state: SolverState
    ) -> Tensor:
        """`data_step` with x̂_t + D/2."""
        x = mean = prediction.x
        if state.history and state.steps_left > 1:
            (u,) = places(state.history[:1], angle_t, angle_s)
            mean = x + coefficient(0.5 / u, z) * (state.history[0].value - x)
        state.history = [PastStep(angle_t, x)]
        return data_step(z, mean, angle_t, angle_s)


@dataclass(frozen=True)
class Dpmpp3m(StatefulSampler):
    """DPM-Solver++(3M), the third-order multistep rule of the code of Lu et al. 2022: a parabola through three x̂.

    z_s = (σ_s/σ_t) z_t + g (x̂_t + m_1 D₁ + w m_2 D₂), D₁ and D₂ the slope and the curvature at u = 0 of the parabola
    x̂_t + D₁ u + D₂ u². The published code has w = 1/2, which gives order 2; w = 1 gives order 3.

    The first steps have order 1 and 2 (`Dpmpp2m`). The last step is DDIM; below 15 steps, the one before has order 2.

    Attributes:
        curvature: w.
    """

    curvature: float = setting(
        "Weight of the curvature in dpmpp_3m: 0.5 as published, 1 for third order.", default=0.5, low=0, high=1
    )

    def advance(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, state: SolverState
    ) -> Tensor:
        """`data_step` with the parabola's mean."""
        x = mean = prediction.x
        order = min(3, len(state.history) + 1)
        if state.steps_left <= (2 if state.num_steps < FEW_STEPS else 1):
            order = min(order, int(state.steps_left))
        u = places(state.history[: order - 1], angle_t, angle_s)
        slopes = [coefficient(1 / at, z) * (past.value - x) for past, at in zip(state.history, u, strict=False)]
        if order == 2:
            mean = x + 0.5 * slopes[0]
        elif order == 3:
            near, far = u
            m_1, m_2 = moments(half_logsnr(angle_s) - half_logsnr(angle_t), 2)
            bend = coefficient(1 / (near - far), z) * (slopes[0] - slopes[1])
            slope = slopes[0] - coefficient(near, z) * bend
            mean = x + coefficient(m_1, z) * slope + coefficient(self.curvature * m_2, z) * bend
        state.history = [PastStep(angle_t, x), *state.history[:1]]
        return data_step(z, mean, angle_t, angle_s)


@dataclass(frozen=True)
class UniPc(StatefulSampler):
    """UniPC with B₂(h), data prediction: a polynomial through the last x̂, and z corrected with the new one.

    Predictor of order p, from the corrected z_t:

        z_s = (σ_s/σ_t) z_t + g (x̂_t + Σ_j ρ_j (x̂_j − x̂_t)/u_j)    over the p − 1 steps before.

    Corrector, after the evaluation at that z_s: the same sum with x̂_s at u = 1 as an additional point. It costs no
    evaluation. As published, ρ = 1/2 for a single difference, else `difference_weights`. The order rises from 1, and is
    1 again in the last step, which ends with x̂.
    Source: Zhao et al. 2023, *UniPC*, the algorithms with data prediction in its appendix.

    Attributes:
        order: p, 1 to 3. With strong guidance the authors use 2.

    Raises:
        ValueError: another order.
    """

    order: int = setting(ORDER, default=3, low=1, high=3)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in (1, 2, 3):
            raise ValueError(f"order is 1, 2 or 3, got {self.order}")

    def advance(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, state: SolverState
    ) -> Tensor:
        """Correct z_t, then predict z_s."""
        x, history = prediction.x, state.history
        if history:
            z = self.correct(x, angle_t, history)
        order = int(min(self.order, len(history) + 1, state.steps_left))
        mean = x + differences(x, history[: order - 1], angle_t, angle_s)
        state.history = [
            PastStep(angle_t, x, z),
            *(PastStep(past.angle, past.value) for past in history[: self.order - 1]),
        ]
        return data_step(z, mean, angle_t, angle_s)

    def correct(self, x: Tensor, angle: Tensor, history: list[PastStep]) -> Tensor:
        """The corrected z_t, from the corrected z of the previous step, the earlier x̂ and now x̂_t."""
        last = history[0]
        assert last.z is not None
        mean = last.value + differences(last.value, [*history[1:], PastStep(angle, x)], last.angle, angle)
        return data_step(last.z, mean, last.angle, angle)


ADAMS_BASHFORTH = {
    1: (1.0,),
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}
"""Order → weights of the current and the previous slopes, for equal steps."""


@dataclass(frozen=True)
class Ipndm(StatefulSampler):
    """iPNDM: the DDIM step, with ε̂ extrapolated from the last ones by an Adams-Bashforth sum.

    ε̃ = Σ_j b_j ε̂_j; z_s = α_s (z_t − σ_t ε̃)/α_t + σ_s ε̃ = ddim + sin(φ_t − φ_s)/α_t · (ε̂_t − ε̃).

    At t = 1, where α is nearly zero, ε̃ = ε̂_t and nothing is divided. The weights are for equal steps; as the steps of
    σ/α are unequal, the rule has at most order 2 for any `order`. The order rises from 1. The last step also uses ε̃, so
    it ends with x̂ + tan φ_t (ε̂_t − ε̃), within ±`clip`.
    Source: Liu et al. 2022, *PNDM*, the linear multistep rule; the start with lower orders: Zhang & Chen 2022, *DEIS*.

    Attributes:
        order: 1 to 4.

    Raises:
        ValueError: another order.
    """

    order: int = setting(ORDER, default=4, low=1, high=4)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.order not in ADAMS_BASHFORTH:
            raise ValueError(f"order is 1, 2, 3 or 4, got {self.order}")

    def advance(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, state: SolverState
    ) -> Tensor:
        """The rotation, plus the effect of ε̃ − ε̂."""
        eps = prediction.eps
        end = ddim_step(z, prediction.v, angle_t, angle_s)
        earlier = state.history[: self.order - 1]
        if earlier:
            weights = ADAMS_BASHFORTH[len(earlier) + 1][1:]
            change = sum(weight * (past.value - eps) for weight, past in zip(weights, earlier, strict=True))
            end = end - coefficient((angle_t - angle_s).sin() / angle_t.cos(), z) * change
            if state.steps_left == 1:
                end = self.limit(end)
        state.history = [PastStep(angle_t, eps), *earlier]
        return end


@dataclass(frozen=True)
class Heun(StatefulSampler):
    """Heun's method: the mean of the slopes at both ends of a step; two evaluations per step, one in the last.

    Slopes are compared in the frame of one angle ψ: as a function of τ = tan(ψ − φ), the line z = α x̂ + σ ε̂ through a
    prediction has the slope −w of z/cos(ψ − φ), where w = ε̂ cos ψ − x̂ sin ψ. The trapezoid over τ is

    z_s = ddim + sin(φ_t − φ_s)/cos(ψ − φ_t) · (w_t − w_s)/2.

    Attributes:
        frame: "v": ψ = φ_t, velocities in the frame of the step's start; nothing is divided, and the order is 2 from
            t = 1 to 0. "eps": ψ = 0, noise over σ/α: Heun's method of Karras et al. 2022, algorithm 1. It divides by
            α_t, so it is useful only if σ/α is moderate at t = 1.

    Raises:
        ValueError: an unknown frame.
    """

    frame: str = setting(
        "Slopes that heun averages: of v, in the frame of the step's start, or of eps over σ/α (Karras et al. 2022).",
        default="v", choices=("v", "eps"),
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.frame not in ("v", "eps"):
            raise ValueError(f"frame is v or eps, got {self.frame!r}")

    def evaluations(self, num_steps: int) -> int:
        """2N − 1."""
        return 2 * num_steps - 1

    def advance(
        self, *, z: Tensor, prediction: Prediction, angle_t: Tensor, angle_s: Tensor, state: SolverState
    ) -> Tensor:
        """The rotation; then, if φ_s > 0, the trapezoid over it."""
        end = ddim_step(z, prediction.v, angle_t, angle_s)
        if state.steps_left <= 1:
            return end
        second = self.limited(state.at_end(end), end, angle_s)
        seen_from = angle_t if self.frame == "v" else 0 * angle_t
        slope = coefficient(seen_from.cos(), z) * (prediction.eps - second.eps)
        slope = slope - coefficient(seen_from.sin(), z) * (prediction.x - second.x)
        return end + coefficient((angle_t - angle_s).sin() / (2 * (seen_from - angle_t).cos()), z) * slope
