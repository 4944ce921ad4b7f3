"""The page's plots: drawn by matplotlib, converted to SVG with the page's colours and font."""

from __future__ import annotations

import io
import logging
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from vdiff.errors import printable
from vdiff.report.formatting import bounded
from vdiff.report.formatting import figure as number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS_AN_INCH = 72
MARKERS = ("o", "s", "^", "D", "v", "P")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (2, 2)), (0, (6, 2, 1, 2)), (0, (1, 1.5)), (0, (8, 3)))
WIDE, NARROW = (940, 430), (350, 330)
SERIES = 6
INK, SOFT, LINE, CARD = "#010203", "#010204", "#010205", "#010206"
COLOURS = {INK: "ink", SOFT: "soft", LINE: "line", CARD: "card"}
"""Colours of a figure, and the page's custom properties that replace them."""
NAMESPACE = re.compile(r"\{[^}]*\}")
REFERENCE = re.compile(r"url\(#([^)]+)\)")
FONT = re.compile(r"'DejaVu Sans'[^;\"]*")


@dataclass(frozen=True)
class Point:
    """A measured value at `x`, with the bounds of its interval, if any."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Curve:
    """A named list of points in the order of x."""

    label: str
    points: tuple[Point, ...]


def trade(
    name: str, size: tuple[int, int], curves: Sequence[Curve], x_label: str, y_label: str, levels: Mapping[str, float]
) -> str:
    """Curves over the number of evaluations, both axes logarithmic; the first one is emphasised.

    Args:
        levels: values to compare with the curves, as level lines with these names.
    """
    figure, axes = _canvas(size)
    titles = {}
    middle = (min(levels.values(), default=0.0) + max(levels.values(), default=0.0)) / 2
    for text, level in levels.items():
        is_high = level > middle  # curves fall to the right: names go where the curves are not
        axes.axhline(level, color=SOFT, linewidth=1, linestyle=(0, (3, 3)) if not text else (0, (1, 3)), zorder=1)
        place, aligned = axes.get_yaxis_transform(), ("right", "bottom") if is_high else ("left", "top")
        axes.text(is_high, level, text, transform=place, color=SOFT, fontsize=10, ha=aligned[0], va=aligned[1])
    for k, curve in reversed(list(enumerate(curves))):
        _curve(axes, curve, k, gid := f"points-{k}")
        titles[gid] = [f"{curve.label}: {point_text(point, x_label)}" for point in curve.points]
    for point in curves[0].points if curves else ():
        axes.annotate(
            number(point.y, 2 if point.y < 100 else 3), (point.x, point.low or point.y), (0, -8), ha="center", va="top",
            textcoords="offset points", color=INK, fontsize=11, zorder=9, bbox={"fc": CARD, "ec": "none", "pad": 1},
        )  # fmt: skip
    every = [point for curve in curves for point in curve.points]
    every += [Point(every[0].x, level) for level in levels.values()]
    _logarithmic(axes, every, narrow=size[0] < WIDE[0])
    axes.set_xlabel(x_label, color=SOFT, fontsize=12)
    axes.set_title(printable(y_label), loc="left", color=SOFT, fontsize=12, pad=10, x=0, parse_math=False)
    labels = ", ".join(curve.label for curve in curves)
    description = f"Curves: {labels}. The figures are in the table below."
    return to_svg(figure, name=name, title=f"{y_label} by {x_label}", description=description, titles=titles)


def losses(name: str, points: Sequence[tuple[int, float]], of: str) -> str:
    """The loss of one model over its updates, with a logarithmic loss axis."""
    figure, axes = _canvas((320, 190))
    x, y = [step for step, _ in points], [loss for _, loss in points]
    axes.plot(x, y, color=series(0), linewidth=1.8, marker="o" if len(x) < 12 else "", markersize=4, gid="points-0")
    axes.set_xlim(0, max(x) * 1.04)
    if min(y) > 0:
        axes.set_yscale("log")
        _ticks(axes.yaxis, *_margins(y, 0.12), 4)
    x_ticks = _round_steps(max(x))
    axes.set_xticks(x_ticks, [f"{tick:,.0f}" for tick in x_ticks])
    description = f"From {number(y[0])} at update {x[0]:,} to {number(y[-1])} at update {x[-1]:,}."
    titles = {"points-0": [f"update {step:,}: {number(loss)}" for step, loss in points]}
    return to_svg(figure, name=name, title=f"Loss of {of}", description=description, titles=titles)


def point_text(point: Point, unit: str) -> str:
    """`0.36 (0.35 to 0.37) at 1 network evaluations per image`."""
    return f"{bounded(point.y, point.low, point.high)} at {number(point.x)} {unit}"


def _canvas(size: tuple[int, int]) -> tuple[Figure, Axes]:
    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # a read-only HOME is harmless
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
    """Bounds of a logarithmic axis, with margins."""
    low, high = math.log10(min(values)), math.log10(max(values))
    room = max((high - low) * share, 0.08)
    return 10 ** (low - 1.4 * room), 10 ** (high + room)


def _ticks(axis: Any, low: float, high: float, at_most: int) -> None:
    """Round numbers between `low` and `high`: 1, 2, 5, 10 …, or fewer."""
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


def series(k: int) -> str:
    """The colour of curve `k`, which the page replaces by `--s0`, `--s1` …"""
    return f"#0102{0x10 + k % SERIES:02x}"


def to_svg(figure: Figure, *, name: str, title: str, description: str, titles: Mapping[str, Sequence[str]]) -> str:
    """The figure as an HTML element.

    Args:
        name: unique on the page.
        title, description: for screen readers.
        titles: the tooltips of each group of markers, by the group's gid.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(buffer.getvalue())
    for element in root.iter():
        element.tag = NAMESPACE.sub("", element.tag)
        for key in list(element.attrib):
            element.set(NAMESPACE.sub("", key), _of_the_page(element.attrib.pop(key), name))
    for group in root.iter("g"):
        for marker, text in zip(list(group.iter("use")), titles.get(group.get("id", ""), ()), strict=False):
            ElementTree.SubElement(marker, "title").text = printable(text)
    _rename(root, name)
    for element in root.findall("metadata"):
        root.remove(element)
    root.attrib = {
        "viewBox": root.get("viewBox", ""),
        "role": "img",
        "aria-labelledby": f"{name}-title {name}-desc",
        "xmlns": "http://www.w3.org/2000/svg",
    }
    for tag, text in (("desc", description), ("title", title)):
        words = ElementTree.Element(tag, {"id": f"{name}-{tag}"})
        words.text = printable(text)
        root.insert(0, words)
    return ElementTree.tostring(root, encoding="unicode")


def _of_the_page(value: str, name: str) -> str:
    """An attribute with the page's colours and font, and references to this figure's own definitions."""
    for colour, variable in {**COLOURS, **{series(k): f"s{k}" for k in range(SERIES)}}.items():
        value = value.replace(colour, f"var(--{variable})")
    return REFERENCE.sub(rf"url(#{name}-\1)", FONT.sub("var(--sans)", value))


def _rename(root: ElementTree.Element, name: str) -> None:
    """Prefix referenced ids with the figure's name, and remove the others."""
    for element in root.iter():
        if (target := element.get("href", "")).startswith("#"):
            element.set("href", f"#{name}-{target[1:]}")
    text = ElementTree.tostring(root, encoding="unicode")
    for element in root.iter():
        if old := element.attrib.pop("id", ""):
            new = f"{name}-{old}"
            if f"url(#{new})" in text or f'"#{new}"' in text:
                element.set("id", new)
