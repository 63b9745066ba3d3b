"""Geometry of the report's charts; `charts.html` draws it as inline SVG.

Why not matplotlib: its SVG brings fixed colours, and the page follows the reader's light or dark theme. Two kinds of
chart are all that is needed, and each is a page of arithmetic. What we give up: anything interactive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from headspring.line.report.formats import significant

WIDTH, HEIGHT = 520.0, 230.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 14.0, 12.0, 34.0
POINTS = 240  # a series longer than this is averaged in buckets

Points = list[tuple[float, float]]


@dataclass(frozen=True)
class Series:
    """A named line; `markers` draws its points too (few and measured, such as validation losses)."""

    name: str
    points: Points
    markers: bool = False


@dataclass(frozen=True)
class Tick:
    at: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """A series in SVG coordinates: the line, the band between each bucket's least and greatest value, the markers."""

    name: str
    line: str
    band: str
    markers: list[tuple[float, float, str]]


@dataclass(frozen=True)
class LineChart:
    title: str
    x_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    series: list[Drawn]
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


def line_chart(title: str, series: Sequence[Series], x_label: str = "step", from_zero: bool = False) -> LineChart | None:
    """A chart of the series that have points, or None where none has."""
    series = [one for one in series if one.points]
    if not series:
        return None
    xs = [x for one in series for x, _ in one.points]
    ys = shown_range([y for one in series for _, y in one.points], from_zero)
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = ys

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        up = (min(max(y, y_low), y_high) - y_low) / (y_high - y_low)
        return round(across, 1), round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1)

    return LineChart(
        title,
        x_label,
        _ticks(nice_ticks(x_low, x_high), lambda x: place(x, y_low)[0]),
        _ticks(nice_ticks(y_low, y_high), lambda y: place(x_low, y)[1]),
        [_draw(one, place) for one in series],
    )


def _ticks(values: list[float], place: Callable[[float], float]) -> list[Tick]:
    step = values[1] - values[0] if len(values) > 1 else None
    return [Tick(place(value), significant(value, step)) for value in values]


def shown_range(values: Sequence[float], from_zero: bool) -> tuple[float, float]:
    """From the least value to the greatest, but at most to where the first steps' losses would flatten the rest.

    The upper end is cut at the 98th percentile plus half the range below it; what lies above is drawn at the edge."""
    ordered = sorted(values)
    low = 0.0 if from_zero else ordered[0]
    typical = ordered[int(0.98 * (len(ordered) - 1))]
    high = min(ordered[-1], typical + 0.5 * (typical - low)) if typical > low else ordered[-1]
    room = 0.05 * (high - low) or 0.5 * abs(high) or 1.0
    return (low if from_zero else low - room), high + room


def nice_ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) between `low` and `high`."""
    rough = (high - low) / wanted
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(k * step, 12) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _draw(series: Series, place) -> Drawn:
    buckets = bucketed(series.points)
    line = "M" + "L".join("{},{}".format(*place(x, mean)) for x, mean, _, _ in buckets)
    band = ""
    if len(series.points) > len(buckets):
        upper = ["{},{}".format(*place(x, high)) for x, _, _, high in buckets]
        lower = ["{},{}".format(*place(x, low)) for x, _, low, _ in reversed(buckets)]
        band = "M" + "L".join(upper + lower) + "Z"
    markers = [(*place(x, y), f"{series.name} {significant(y)} at {significant(x)}") for x, y in series.points]
    return Drawn(series.name, line, band, markers if series.markers else [])


def bucketed(points: Points, limit: int = POINTS) -> list[tuple[float, float, float, float]]:
    """(x, mean, least, greatest) of at most `limit` runs of neighbouring points of equal length."""
    size = math.ceil(len(points) / limit)
    runs = [points[start : start + size] for start in range(0, len(points), size)]
    return [(run[-1][0], sum(y for _, y in run) / len(run), min(y for _, y in run), max(y for _, y in run)) for run in runs]


@dataclass(frozen=True)
class Bar:
    """A row of a bar chart; `share` of the longest bar, 0 … 1. `ours` gets the accent colour."""

    label: str
    value: float
    text: str
    share: float
    ours: bool = False
    note: str = ""


def bars(rows: Sequence[tuple[str, float, str, bool, str]]) -> list[Bar]:
    """(label, value, text, ours, note) → bars scaled to the greatest value."""
    greatest = max((value for _, value, *_ in rows), default=0.0) or 1.0
    return [Bar(label, value, text, value / greatest, ours, note) for label, value, text, ours, note in rows]
