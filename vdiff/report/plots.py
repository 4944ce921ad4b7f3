"""The page's plots, drawn by matplotlib."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vdiff.errors import printable
from vdiff.report.figures import figure as number
from vdiff.report.svg import CARD, INK, LINE, SOFT, series, to_svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_AN_INCH = 72
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1.5)), (0, (8, 3)))
WIDE, NARROW = (940, 430), (350, 330)


@dataclass(frozen=True)
class Point:
    """A measured figure: at `x`, with the bounds of its interval where there are any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """Points in the order of x, and what they are called."""

    label: str
    points: tuple[Point, ...]


def both_sizes(draw: Any, name: str, *args: Any) -> dict[str, str]:
    """A plot for wide and for narrow screens."""
    return {"wide": draw(f"{name}-wide", WIDE, *args), "narrow": draw(f"{name}-narrow", NARROW, *args)}


def trade(
    name: str, size: tuple[int, int], curves: Sequence[Curve], x_label: str, y_label: str, dashed: Point | None
) -> str:
    """Curves over the number of evaluations, both axes logarithmic; the first one is the one that matters.

    Args:
        dashed: the figure that the others are held against, as a level line.
    """
    figure, axes = _canvas(size)
    told = {}
    if dashed is not None:
        axes.axhline(dashed.y, color=SOFT, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for k, curve in reversed(list(enumerate(curves))):
        _curve(axes, curve, k, gid := f"points-{k}")
        told[gid] = [f"{curve.label}: {point_text(point, x_label)}" for point in curve.points]
    for point in curves[0].points if curves else ():
        axes.annotate(
            number(point.y, 2 if point.y < 100 else 3), (point.x, point.low or point.y), (0, -8), ha="center", va="top",
            textcoords="offset points", color=INK, fontsize=11, zorder=9, bbox={"fc": CARD, "ec": "none", "pad": 1},
        )  # fmt: skip
    every = [point for curve in curves for point in curve.points] + ([dashed] if dashed else [])
    _logarithmic(axes, every, narrow=size[0] < WIDE[0])
    axes.set_xlabel(x_label, color=SOFT, fontsize=12)
    axes.set_title(printable(y_label), loc="left", color=SOFT, fontsize=12, pad=10, x=0, parse_math=False)
    labels = ", ".join(curve.label for curve in curves)
    title, words = f"{y_label} by {x_label}", f"Curves: {labels}. The figures are in the table below."
    return to_svg(figure, name=name, title=title, description=words, told=told)


def losses(name: str, points: Sequence[tuple[int, float]], of: str) -> str:
    """The loss of one model over its updates, the loss axis logarithmic."""
    figure, axes = _canvas((320, 190))
    x, y = [step for step, _ in points], [loss for _, loss in points]
    axes.plot(x, y, color=series(0), linewidth=1.8, marker="o" if len(x) < 12 else "", markersize=4, gid="points-0")
    axes.set_xlim(0, max(x) * 1.04)
    if min(y) > 0:
        axes.set_yscale("log")
        _ticks(axes.yaxis, *_margins(y, 0.12), 4)
    x_ticks = _round_steps(max(x))
    axes.set_xticks(x_ticks, [f"{tick:,.0f}" for tick in x_ticks])
    words = f"From {number(y[0])} at update {x[0]:,} to {number(y[-1])} at update {x[-1]:,}."
    told = {"points-0": [f"update {step:,}: {number(loss)}" for step, loss in points]}
    return to_svg(figure, name=name, title=f"Loss of {of}", description=words, told=told)


def point_text(point: Point, unit: str) -> str:
    """`0.36 (0.35 to 0.37) at 1 network evaluations an image`."""
    bounds = f" ({number(point.low)} to {number(point.high)})" if point.low is not None else ""
    return f"{number(point.y)}{bounds} at {number(point.x)} {unit}"


def _canvas(size: tuple[int, int]) -> tuple[Figure, Axes]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it does without a HOME that it can write
    from matplotlib.figure import Figure

    figure = Figure((size[0] / POINTS_AN_INCH, size[1] / POINTS_AN_INCH), dpi=POINTS_AN_INCH, layout="constrained")
    axes: Axes = figure.subplots()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.grid(axis="y", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(which="both", length=0, labelcolor=SOFT, labelsize=11, pad=6)
    return figure, axes


def _curve(axes: Axes, curve: Curve, k: int, gid: str) -> None:
    x, y = [point.x for point in curve.points], [point.y for point in curve.points]
    colour, front = series(k), 10 - k
    for point in curve.points:
        if point.low is not None and point.high is not None and point.low > 0:
            axes.plot([point.x] * 2, [point.low, point.high], color=colour, linewidth=4, alpha=0.35, zorder=front)
    width = 2.6 if k == 0 else 1.6
    axes.plot(x, y, color=colour, linewidth=width, linestyle=DASHES[k % len(DASHES)], zorder=front)
    axes.plot(
        x, y, color=colour, linestyle="", marker=MARKERS[k % len(MARKERS)], markersize=8 if k == 0 else 6,
        markeredgecolor=CARD, markeredgewidth=1.2, zorder=front + 0.5, gid=gid,
    )  # fmt: skip


def _logarithmic(axes: Axes, points: Sequence[Point], *, narrow: bool) -> None:
    xs = sorted({point.x for point in points if point.x > 0})
    ys = [y for point in points for y in (point.y, point.low, point.high) if y is not None and y > 0]
    axes.set_xscale("log", base=2)
    axes.set_xlim(xs[0] / 1.35, xs[-1] * 1.35)
    powers = range(math.ceil(math.log2(xs[0])), math.floor(math.log2(xs[-1])) + 1)
    ticks = [2.0**k for k in powers[:: -(-len(powers) // (7 if narrow else 12)) or 1]] or [xs[0]]
    axes.set_xticks(ticks, [number(x) for x in ticks])
    axes.minorticks_off()
    axes.set_yscale("log")
    _ticks(axes.yaxis, *_margins(ys, 0.1), 7)


def _margins(values: Sequence[float], share: float) -> tuple[float, float]:
    """Bounds of a logarithmic axis, with room below and above."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max((high - low) * share, 0.08)
    return 10 ** (low - 1.4 * room), 10 ** (high + room)


def _ticks(axis: Any, low: float, high: float, at_most: int) -> None:
    """Round numbers between `low` and `high`: 1, 2, 5, 10 … or fewer of them."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for mantissas in ((1, 1.5, 2, 3, 4, 5, 6, 8), (1, 2, 3, 5), (1, 2, 5), (1, 3), (1,)):
        ticks = [m * 10.0**e for e in decades for m in mantissas if low <= m * 10.0**e <= high]
        if len(ticks) <= at_most:
            break
    ticks = ticks[:: -(-len(ticks) // at_most) or 1] or [math.sqrt(low * high)]
    axis.axes.set_ylim(low, high)
    axis.set_ticks(ticks, [number(tick, 2) for tick in ticks])
    axis.set_ticks([], minor=True)


def _round_steps(last: int) -> list[int]:
    """0 and three to five round numbers up to `last`."""
    raw = last / 4
    scale = 10 ** math.floor(math.log10(raw)) if raw >= 1 else 1
    step = next(int(m * scale) for m in (1, 2, 2.5, 5, 10) if m * scale >= raw and (m * scale) % 1 == 0)
    return list(range(0, last + 1, max(step, 1)))
