"""Curves as SVG, drawn here so that a page needs no library; a script may show the values under the pointer."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

MOST_POINTS = 600
"""Of one curve: more than a screen shows beside each other would only make the page larger."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One line of a chart."""

    name: str
    points: Sequence[Point]
    """By rising x."""
    role: str
    """What it is, as a class of the style sheet, which gives it its colour."""
    faint: bool = False
    """The raw values behind another curve."""


@dataclass(frozen=True, kw_only=True)
class Chart:
    """Curves over one axis."""

    title: str
    curves: Sequence[Curve]
    write: Callable[[float], str]
    """A value in words."""
    x_name: str = "step"
    width: int = 370
    height: int = 170
    from_zero: bool = False
    newest: bool = True
    """Whether the last point of a curve is worth a number beside its name."""

    @property
    def drawn(self) -> list[Curve]:
        """The curves that have a point."""
        return [curve for curve in self.curves if curve.points]


def smooth(points: Sequence[Point]) -> list[Point]:
    """The mean around each point, of a twentieth of them all: it lags behind nothing, as a running mean does."""
    half = len(points) // 40
    sums = [0.0]
    for _, value in points:
        sums.append(sums[-1] + value)
    found = []
    for index, (x, _) in enumerate(points):
        first, end = max(index - half, 0), min(index + half + 1, len(points))
        found.append((x, (sums[end] - sums[first]) / (end - first)))
    return found


def thinned(points: Sequence[Point]) -> list[Point]:
    """So few points that the curve looks the same: of each stretch the lowest and the highest."""
    if len(points) <= MOST_POINTS:
        return list(points)
    stretch = math.ceil(2 * len(points) / MOST_POINTS)
    found = []
    for start in range(0, len(points), stretch):
        part = points[start : start + stretch]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        found += sorted(ends)
    return found


LEFT, RIGHT, TOP, BOTTOM = 52, 12, 10, 34
"""Margins around the curves, in the units of the drawing."""


def draw(chart: Chart) -> str:
    """The chart as a figure."""
    curves = [(curve, thinned(curve.points)) for curve in chart.drawn]
    x_range, y_range = _x_range(curves), _y_range(curves, from_zero=chart.from_zero)
    right, bottom = chart.width - RIGHT, chart.height - BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        y = min(max(y, y_range[0]), y_range[1])
        across = (x - x_range[0]) / (x_range[1] - x_range[0])
        up = (y - y_range[0]) / (y_range[1] - y_range[0])
        return LEFT + across * (right - LEFT), bottom - up * (bottom - TOP)

    parts = []
    for value in ticks(*y_range, chart.height // 50):
        _, y = place(0, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(chart.write(value))}</text>')
    for value in ticks(*x_range, chart.width // 90):
        x, _ = place(value, 0)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{value:,.10g}</text>')
    parts.append(f'<text x="{right}" y="{bottom + 30}" text-anchor="end">{escape(chart.x_name)}</text>')
    for curve, points in curves:
        line = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in points)
        faint = " faint" if curve.faint else ""
        parts.append(f'<polyline class="{curve.role}{faint}" points="{line}"/>')
        if len(points) <= FEW and not curve.faint:
            parts += [
                '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="3"/>'.format(curve.role, *place(*p)) for p in points
            ]
    known = {
        "x": x_range, "y": y_range, "box": [LEFT, TOP, right, bottom], "unit": chart.x_name,
        "curves": [
            {"name": curve.name, "role": curve.role, "points": [[x, y, chart.write(y)] for x, y in _short(points)]}
            for curve, points in curves
        ],
    }  # fmt: skip
    return (
        f'<figure class="chart"><figcaption><b>{escape(chart.title)}</b>{_legend(chart)}</figcaption>'
        f'<svg viewBox="0 0 {chart.width} {chart.height}" role="img" aria-label="{escape(chart.title)}" '
        f"data-plot='{escape(json.dumps(known))}'>{''.join(parts)}</svg></figure>"
    )


FEW = 40
"""Points that are marked one by one: between so few the line is a guess."""


def _legend(chart: Chart) -> str:
    """Each curve with its newest value; a single one needs no name, and raw values need none behind their mean."""
    curves = [curve for curve in chart.drawn if not curve.faint]
    entries = []
    for curve in curves:
        name = escape(curve.name) if len(curves) > 1 else ""
        value = f" <b>{escape(chart.write(curve.points[-1][1]))}</b>" if chart.newest else ""
        key = f'class="key {curve.role}"' if len(curves) > 1 else 'class="key only"'
        entries.append(f"<span {key}>{name}{value}</span>")
    return "".join(entries)


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers in a range, some ``about`` of them."""
    rough = (high - low) / about
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 5, 10) if size * factor >= rough)
    first = math.ceil(low / step - 1e-9)
    return [round(index * step, 12) for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _short(points: Sequence[Point]) -> list[Point]:
    """With as many digits as a reader takes in."""
    return [(x, float(f"{y:.5g}")) for x, y in points]


def _x_range(curves: list[tuple[Curve, list[Point]]]) -> tuple[float, float]:
    values = [x for _, points in curves for x, _ in points]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _y_range(curves: list[tuple[Curve, list[Point]]], *, from_zero: bool) -> tuple[float, float]:
    """What the values span and a little more. Of many faint values, the rarest at the ends are cut at the edge."""
    values = []
    for curve, points in curves:
        found = sorted(y for _, y in points)
        cut = len(found) // 100 if curve.faint else 0
        values += found[cut : len(found) - cut]
    low, high = min(values), max(values)
    low = min(low, 0.0) if from_zero else low
    room = (high - low or abs(high) or 1.0) * 0.06
    return (low if from_zero and low == 0 else low - room), high + room
