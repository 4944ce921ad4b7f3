"""Draw the figures of docs/what_v_is.md from vdiff's own functions: `python docs/make_figures.py`."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Arc

from vdiff.diffusion.prediction import from_v
from vdiff.diffusion.schedules import CosineSchedule
from vdiff.diffusion.weighting import WEIGHTINGS

IMAGES = Path(__file__).parent / "images"
DPI = 110
X_COLOUR, EPS_COLOUR, Z_COLOUR, V_COLOUR = "#1b7f4d", "#b3413b", "#222222", "#2c5fb3"
LINES = {
    "constant": ("#888888", "-"),
    "snr": ("#d98880", "-"),
    "truncated_snr": ("#7dbf9a", "-"),
    "snr_plus_one": ("#2c5fb3", (0, (4, 2))),
    "min_snr": ("#8a5a00", (0, (1, 1.5))),
}


def arrow(axes: Axes, begin: tuple[float, float], end: tuple[float, float], colour: str, width: float = 2.2) -> None:
    """An arrow between two points of the plane."""
    style = {"arrowstyle": "-|>", "color": colour, "lw": width, "shrinkA": 0, "shrinkB": 0, "mutation_scale": 15}
    axes.annotate("", end, begin, arrowprops=style)


def plane_of_x_and_eps(axes: Axes) -> None:
    """The quarter circle from x to ε, without a frame."""
    turn = np.linspace(0, math.pi / 2, 200)
    axes.plot(np.cos(turn), np.sin(turn), color="#bbbbbb", lw=1.2)
    axes.set(xlim=(-0.95, 1.9), ylim=(-0.15, 1.45), aspect="equal")
    axes.axis("off")


def draw_circle(path: Path) -> None:
    """Left: z, v and the angle. Right: one DDIM step is a rotation of z by δ."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 3.6), layout="constrained")
    phi = math.radians(55)
    z, v = (math.cos(phi), math.sin(phi)), (-math.sin(phi), math.cos(phi))
    for axes in (left, right):
        plane_of_x_and_eps(axes)
    arrow(left, (0, 0), (1, 0), X_COLOUR)
    arrow(left, (0, 0), (0, 1), EPS_COLOUR)
    arrow(left, (0, 0), z, Z_COLOUR)
    arrow(left, z, (z[0] + 0.75 * v[0], z[1] + 0.75 * v[1]), V_COLOUR)
    left.plot([z[0], z[0], 0], [0, z[1], z[1]], color="#bbbbbb", lw=1, ls=":")
    left.add_patch(Arc((0, 0), 0.5, 0.5, theta1=0, theta2=55, color="#666666"))
    left.text(0.27, 0.1, "φ", fontsize=13)
    left.text(1.03, -0.03, "x (image)", color=X_COLOUR, fontsize=12)
    left.text(-0.1, 1.06, "ε (noise)", color=EPS_COLOUR, fontsize=12, ha="center")
    left.text(z[0] + 0.04, z[1] + 0.03, "z = cos φ · x + sin φ · ε", color=Z_COLOUR, fontsize=12)
    left.text(-0.9, 1.34, "v = dz/dφ = cos φ · ε − sin φ · x", color=V_COLOUR, fontsize=12)
    left.text(z[0], -0.1, "α = cos φ", fontsize=10, ha="center", color="#555555")
    left.text(-0.04, z[1], "σ = sin φ", fontsize=10, ha="right", va="center", color="#555555")

    delta = math.radians(32)
    point, velocity = (torch.tensor([pair], dtype=torch.float64) for pair in (z, v))
    found = from_v(point, velocity, torch.tensor([phi], dtype=torch.float64))
    end = (math.cos(delta) * point - math.sin(delta) * velocity)[0].tolist()
    arrow(right, (0, 0), z, Z_COLOUR)
    arrow(right, (0, 0), (end[0], end[1]), Z_COLOUR)
    turn = np.linspace(phi, phi - delta, 60)
    right.plot(np.cos(turn), np.sin(turn), color=V_COLOUR, lw=3)
    right.add_patch(Arc((0, 0), 0.7, 0.7, theta1=math.degrees(phi - delta), theta2=55, color="#666666"))
    middle = phi - delta / 2
    right.text(0.41 * math.cos(middle), 0.41 * math.sin(middle) - 0.03, "δ", fontsize=13)
    right.text(z[0] + 0.03, z[1] + 0.05, "$z_t$", fontsize=13)
    right.text(end[0] + 0.04, end[1] + 0.01, "$z_s = \\cos δ · z_t − \\sin δ · \\hat{v}$", fontsize=12)
    x = found.x[0].tolist()
    right.plot([x[0]], [x[1]], "o", color=X_COLOUR)
    right.text(1.07, -0.03, "$\\hat{x}$ = α z − σ $\\hat{v}$", color=X_COLOUR, fontsize=12)
    eps = found.eps[0].tolist()
    right.plot([eps[0]], [eps[1]], "o", color=EPS_COLOUR)
    right.text(-0.05, 1.06, "$\\hat{ε}$ = σ z + α $\\hat{v}$", color=EPS_COLOUR, fontsize=12, ha="right")
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


def draw_weightings(path: Path) -> None:
    """The weight of each error at each noise level, and how often training draws the level."""
    level = torch.linspace(-20, 20, 401, dtype=torch.float64)
    snr = level.exp()
    spaces = {"x": torch.ones_like(snr), "ε": 1 / snr, "v": 1 / (snr + 1)}
    schedule = CosineSchedule()
    angle = torch.atan(torch.exp(-level / 2))
    density = torch.gradient(1 - schedule.time(angle), spacing=(level,))[0]
    figure, plots = plt.subplots(1, 3, figsize=(11, 3.7), sharex=True, layout="constrained")
    for axes, (space, factor) in zip(plots, spaces.items(), strict=True):
        for name, weighting in WEIGHTINGS.items():
            colour, style = LINES[name]
            width = 4 if name in ("snr", "truncated_snr") else 2  # two others lie on top of these
            axes.semilogy(level, weighting(level) * factor, color=colour, ls=style, lw=width, label=name)
        axes.set(xlabel="λ = log SNR (noise ← → image)", ylim=(1e-5, 1e5), title=f"weight of the {space}-error")
        shade = axes.twinx()
        shade.fill_between(level, density, color="#000000", alpha=0.08, lw=0)
        shade.set(ylim=(0, 0.6), yticks=[])
        axes.set_zorder(shade.get_zorder() + 1)
        axes.patch.set_visible(False)
    figure.legend(
        *plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(WEIGHTINGS), frameon=False
    )
    figure.savefig(path, dpi=DPI)
    plt.close(figure)


if __name__ == "__main__":
    draw_circle(IMAGES / "circle.png")
    draw_weightings(IMAGES / "weightings.png")
