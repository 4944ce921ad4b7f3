"""Formatting of numbers for readers."""

from __future__ import annotations

import math

NOTHING = "–"


def figure(value: float | None, digits: int = 3) -> str:
    """`0.000123`, `0.36`, `16`, `1,150`: `digits` significant digits, no powers of ten up to a million."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if abs(value) >= 10**digits - 0.5:
        text = f"{value:,.0f}" if abs(value) < 1e9 else f"{value:.{digits}g}"
    else:
        places = digits - 1 - math.floor(math.log10(abs(value)))
        text = f"{value:.{places}f}" if places <= 8 else f"{value:.{digits}g}"
        text = text.rstrip("0").rstrip(".") if "." in text and "e" not in text else text
    return text.replace("-", "−")


def whole(value: float | None) -> str:
    """`1,797`."""
    return NOTHING if value is None else f"{value:,.0f}"


def bounded(value: float | None, low: float | None, high: float | None) -> str:
    """`0.36 (0.35 to 0.37)`; empty if there is no value."""
    bounds = "" if low is None else f" ({figure(low)} to {figure(high)})"
    return "" if value is None else f"{figure(value)}{bounds}"


def seconds_text(seconds: float | None) -> str:
    """`13.4 s`, `2 min 39 s`, `5 h 07 min`."""
    if seconds is None:
        return NOTHING
    if seconds < 59.95:
        return f"{figure(seconds)} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours:,} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"


def milliseconds_text(milliseconds: float | None) -> str:
    """`0.61 ms`, `692 ms`, `12.3 s`."""
    if milliseconds is None:
        return NOTHING
    return f"{figure(milliseconds)} ms" if milliseconds < 999.5 else seconds_text(milliseconds / 1000)


def times_text(ratio: float) -> str:
    """`1.9 times`, `1,150 times`."""
    return f"{figure(ratio, 2) if ratio < 100 else whole(float(f'{ratio:.3g}'))} times"
