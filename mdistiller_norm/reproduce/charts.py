"""Line charts as inline SVG: coloured by the page's style sheet, so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLOURS = 8  # --c0 ... in the style sheet
_WIDTH, _HEIGHT = 420, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 26, 34
_POINTS = 160  # of a line; more cannot be seen


class Line(NamedTuple):
    """A line of a chart.

    Attributes:
        label: said when pointed at.
        colour: number of the style sheet's colour; past the last one they begin again, dashed.
        x: positions.
        y: heights.
    """

    label: str
    colour: int
    x: Sequence[float]
    y: Sequence[float]


def look(colour: int) -> str:
    """The attributes of a line, or of its mark in a legend, of that colour number."""
    dashed = " dashed" if colour // COLOURS % 2 else ""
    return f'class="line{dashed}" style="--colour: var(--c{colour % COLOURS})"'


def nice_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round numbers from ``low`` to ``high``."""
    if high <= low:
        high = low + 1
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def line_chart(title: str, lines: Sequence[Line]) -> str:
    """An SVG element with epochs on its horizontal axis.

    Args:
        title: above the chart.
        lines: drawn in this order.
    """
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y if math.isfinite(y)]
    if not ys:
        return ""
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    margin = 0.05 * (high - low) or 0.5
    low, high = low - margin, high + margin

    def across(x: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * ((x - left) / (right - left) if right > left else 0.5)

    def down(y: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - y) / (high - low)

    parts = [
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="15">{escape(title)}</text>',
    ]
    for tick in nice_ticks(low, high):
        y = down(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" text-anchor="end" x="{_LEFT - 5}" y="{y + 3.5:.1f}">{tick:g}</text>')
    for tick in nice_ticks(left, right, 6):
        if tick == int(tick):
            parts.append(
                f'<text class="tick" text-anchor="middle" x="{across(tick):.1f}" y="{_HEIGHT - 18}">{tick:g}</text>'
            )
    middle = (_LEFT + _WIDTH) / 2
    parts.append(f'<text class="tick" text-anchor="middle" x="{middle:.0f}" y="{_HEIGHT - 4}">epoch</text>')
    for line in lines:
        stride = max(len(line.x) // _POINTS, 1)
        kept = sorted({*range(0, len(line.x), stride), len(line.x) - 1})
        points = [f"{across(line.x[i]):.1f},{down(line.y[i]):.1f}" for i in kept if math.isfinite(line.y[i])]
        label = f"<title>{escape(line.label)}</title>"
        if len(points) == 1:
            cx, cy = points[0].split(",")
            parts.append(f'<circle {look(line.colour)} cx="{cx}" cy="{cy}" r="2.5">{label}</circle>')
        else:
            parts.append(f'<polyline {look(line.colour)} points="{" ".join(points)}">{label}</polyline>')
    return "".join([*parts, "</svg>"])
