"""Every prediction with every weighting of the paper's Table 1, on eight Gaussians whose best denoiser is known.

    python benchmarks/predictions.py             # results/predictions.md and predictions_errors.md
    python benchmarks/predictions.py --quick     # a minute, to see that it runs; writes nothing

The networks are the MLPs of `plane.py`; they differ in what their output means and in the loss weighting only. Two
tables: the sliced 2-Wasserstein distance of DDIM samples to the data, with x̂ clipped to ±1 in each step as sample.py
does, and the error of the unclipped x̂ against the posterior mean E[x | z] at some noise levels. Mean ± standard
deviation over seeds.

With x a mixture of Gaussians of means μ_k and deviation s, z = α x + σ ε is a mixture of means α μ_k and variance
α² s² + σ². So E[x | z] = Σ_k p(k | z) (μ_k + α s² / (α² s² + σ²) · (z − α μ_k)).
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from statistics import fmean, stdev

import click
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

import vdiff
from benchmarks import plane
from benchmarks.report import machine, write_report
from vdiff.diffusion.schedules import logsnr

PREDICTIONS = ("v", "x", "eps", "both")
WEIGHTINGS = ("snr", "truncated_snr", "snr_plus_one")
UNSTABLE = ("eps", "truncated_snr")
"""vdiff refuses this pair; the paper found that its training diverges."""
STEPS = (1, 2, 4, 8, 64)
LEVELS = (10, 5, 0, -5, -10, -15, -20)
"""λ = log α²/σ², from little noise to nothing but noise."""
FULL = plane.Scale(seeds=2, teacher=1000)
QUICK = plane.Scale(seeds=1, data=2**14, teacher=30, points=256, directions=16)
Figures = dict[tuple[str, str], dict[int, list[float]]]


class Network(plane.Mlp):
    """The MLP of the plane with an output for each prediction: `both` needs two vectors."""

    def __init__(self, prediction: str) -> None:
        super().__init__()
        if prediction == "both":
            self.end = torch.nn.Linear(self.end.in_features, 4)


def posterior_mean(z: Tensor, angle: Tensor) -> Tensor:
    """E[x | z] of the ring at the angle (B,), in float64: (B, 2)."""
    alpha, sigma = angle.cos()[:, None], angle.sin()[:, None]
    turn = torch.arange(plane.MODES, dtype=torch.float64) * (2 * math.pi / plane.MODES)
    means = plane.RADIUS * torch.stack([turn.cos(), turn.sin()], 1)
    variance = (alpha * plane.SPREAD).square() + sigma.square()
    offset = z[:, None] - alpha[..., None] * means
    chance = (-offset.square().sum(-1) / (2 * variance)).softmax(1)
    each = means + (alpha * plane.SPREAD**2 / variance)[..., None] * offset
    return (chance[..., None] * each).sum(1)


def network_of(prediction: str, weighting: str, seed: int, scale: plane.Scale, data: list[plane.Points]) -> vdiff.Model:
    """A trained network, with the settings of `plane.new_teacher`."""
    torch.manual_seed(seed)
    model = vdiff.wrap(Network(prediction), (2,), prediction=prediction, num_timesteps=plane.TEACHER_STEPS)
    return vdiff.train(
        model, data, num_iters=scale.teacher, batch_size=scale.teacher_batch_size, seed=seed, weighting=weighting,
        lr=2e-3, lr_schedule="cosine", ema=0.0,
    ).finish()  # fmt: skip


def errors(model: vdiff.Model, points: Tensor, z: Tensor) -> dict[int, float]:
    """λ → RMSE of x̂ against the posterior mean, for noisy points (n, 2)."""
    found = {}
    schedule = model.denoiser.schedule
    for level in LEVELS:
        edge = schedule.angle(torch.tensor([0.0, 1.0], dtype=torch.float64))
        angle = torch.full((len(points),), math.atan(math.exp(-level / 2)), dtype=torch.float64).clamp(*edge)
        noisy = angle.cos()[:, None] * points.double() + angle.sin()[:, None] * z.double()
        x = model.denoise(noisy.float(), t=schedule.time(angle)).x
        assert logsnr(angle).allclose(torch.tensor(float(level), dtype=torch.float64))
        found[level] = plane.rms(x.double() - posterior_mean(noisy, angle))
    return found


def rows_of(figures: Figures, columns: tuple[int, ...]) -> list[list[str]]:
    """Lines of a table: mean ± standard deviation over seeds; nothing of the pair that is refused."""
    rows = []
    for prediction in PREDICTIONS:
        for weighting in WEIGHTINGS:
            found = figures.get((prediction, weighting))
            cells = [spread(found[column]) if found else "refused" for column in columns]
            rows.append([prediction, weighting, *cells])
    return rows


def spread(values: list[float]) -> str:
    """Mean ± standard deviation; the mean alone of a single value."""
    return f"{fmean(values):.3g}" + (f" ± {stdev(values):.1g}" if len(values) > 1 else "")


@click.command()
@click.option("--quick", is_flag=True, help="Small, to see that it runs; writes nothing.")
def main(quick: bool) -> None:
    """Train, measure, and write both tables."""
    scale = QUICK if quick else FULL
    distances, wrong = Figures(), Figures()
    for seed in range(scale.seeds):
        generator = torch.Generator().manual_seed(1 + seed)
        data, real = (plane.ring(count, generator) for count in (scale.data, scale.points))
        z = torch.randn(scale.points, 2, generator=torch.Generator().manual_seed(0))
        shadows = plane.shadows(real[0], scale.directions)
        for pair in [(p, w) for p in PREDICTIONS for w in WEIGHTINGS if (p, w) != UNSTABLE]:
            began = time.monotonic()
            model = network_of(*pair, seed, scale, [data])
            for steps in STEPS:
                points = model.sample(noise=z, steps=steps, batch_size=len(z), clipping_value=1.0)
                distance = plane.rms(plane.shadows(points, scale.directions) - shadows)
                distances.setdefault(pair, {}).setdefault(steps, []).append(distance)
            for level, error in errors(model, real[0], z).items():
                wrong.setdefault(pair, {}).setdefault(level, []).append(error)
            print(f"{pair}, seed {seed}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
    tables = {
        "predictions": ("Sliced Wasserstein distance of DDIM samples to the data, by steps", distances, STEPS),
        "predictions_errors": ("RMSE of x̂ to the posterior mean, by noise level λ", wrong, LEVELS),
    }
    for name, (title, figures, columns) in tables.items():
        rows = rows_of(figures, columns)
        if quick:
            print("\n".join(" ".join(row) for row in rows))
        else:
            done = f"{scale.teacher:,} updates × {scale.teacher_batch_size}"
            note = f"ring, {done}, n = {scale.points}, {scale.seeds} seeds"
            write_report(name, f"{title}; {note}", ["predicts", "weighting", *map(str, columns)], rows, machine())


if __name__ == "__main__":
    main()
