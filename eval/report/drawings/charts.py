"""Charts of a report: where the damage lies, how it is spread, and what size buys."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

from ....tables import bytes_text, bytes_unit
from ...comparison import Comparison
from ...metrics.estimate import Estimate
from ...metrics.numbers import nats
from .svg import (
    LOG_RATIO,
    WIDTH,
    Axis,
    Drawing,
    distinct_names,
    linear_axis,
    log_axis,
    series_color,
    short_number,
    shortened,
)

__all__ = [
    "SizedModel",
    "drift_chart",
    "histogram_chart",
    "kinds_chart",
    "planned_chart",
    "positions_chart",
    "size_chart",
]

_HEIGHT = 260
_LEFT = 48
_RIGHT = 14
_BOTTOM = 38

_HALF_CHARACTERS = 23
"""Of a legend's label that takes no more than half of a chart."""

_LOWEST_SHOWN_NATS = 1e-9
"""Smaller divergences are shown as this one on logarithmic axes."""

_Point = tuple[float, Estimate, str]
"""Where a mark stands on the x axis and on the y axis, and what it says on hovering."""


def histogram_chart(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw how many tokens have a divergence of which magnitude; bars for one model, steps for several."""
    drawing, top = _begun("KL divergence of single tokens", _names(comparisons))
    histograms = [each.profile.histogram for each in comparisons]
    x = log_axis(
        max(_LOWEST_SHOWN_NATS, min(h.edge_nats(0) for h in histograms)),
        max(10 * _LOWEST_SHOWN_NATS, *(h.edge_nats(len(h.counts)) for h in histograms)),
    )
    shares = [[100 * count / sum(h.counts) for count in h.counts] for h in histograms]
    y = linear_axis(0.0, max(map(max, shares)))
    place = _Frame(drawing, x, y, top)
    place.axes("nats", "% of tokens", short_number, "{:g}".format)
    for number, (h, values) in enumerate(zip(histograms, shares, strict=True)):
        edges = [h.edge_nats(index) for index in range(len(values) + 1)]
        name = comparisons[number].quantized.name
        if len(comparisons) == 1:
            for low, high, value in zip(edges, edges[1:], values, strict=False):
                left, right, height = place.x(low), place.x(high), place.y(value)
                hint = f"{value:.2f} % of tokens from {low:.2g} to {high:.2g} nats"
                drawing.rectangle(left, height, right - left - 1, place.y(0) - height, color=series_color(0), hint=hint)
        else:
            corners = [(edge, value) for low, high, value in zip(edges, edges[1:], values, strict=False)
                       for edge, value in ((low, value), (high, value))]  # fmt: skip
            outline = [(edges[0], 0.0), *corners, (edges[-1], 0.0)]
            points = [(place.x(edge), place.y(value)) for edge, value in outline]
            drawing.path(points, color=series_color(number), hint=name)
        mean = max(comparisons[number].summary.kl_nats.value, x.low)
        drawing.line(place.x(mean), place.y(y.high), place.x(mean), place.y(0), color=series_color(number))
    drawing.text(drawing.width, top - 4, "vertical line: mean", anchor="end", kind="small")
    return drawing


def positions_chart(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw the divergence against the number of tokens that a prediction sees; whiskers are one standard error."""
    buckets = comparisons[0].profile.positions
    high = 1.1 * math.sqrt(buckets[-1].first * buckets[-1].last)
    ticks = [float(bucket.first) for bucket in buckets if bucket.first <= high]
    x = Axis(low=0.8, high=max(2.0, high), ticks=tuple(ticks[:: -(-len(buckets) // 7)]), log=True)
    curves: list[tuple[str, list[_Point]]] = []
    for each in comparisons:
        points: list[_Point] = []
        for bucket in each.profile.positions:
            hint = f"nats after {bucket.first} to {bucket.last} tokens"
            points.append((math.sqrt(bucket.first * bucket.last), bucket.kl_nats, hint))
        curves.append((each.quantized.name, points))
    return _curves("KL divergence by position in the text", "tokens before the predicted one", x, curves)


def kinds_chart(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw the divergence on each kind of text; whiskers are one standard error."""
    kinds = comparisons[0].profile.kinds
    drawing = Drawing(WIDTH, 1, "KL divergence by kind of text")
    top = _legend(drawing, _names(comparisons))
    drawing.height = top + 24 * len(kinds) + _BOTTOM
    x = _nats_axis([kind.kl_nats for each in comparisons for kind in each.profile.kinds])
    labels = [f"{shortened(kind.kind)} ({kind.rows})" for kind in kinds]
    left, right = 14 + 6.5 * max(map(len, labels)), drawing.width - _RIGHT

    def at(value: float) -> float:
        return left + (right - left) * x.share(value)

    bottom = drawing.height - _BOTTOM
    for tick in x.ticks:
        drawing.line(at(tick), top, at(tick), bottom)
        drawing.text(at(tick), bottom + 14, short_number(tick), anchor="middle", kind="small")
    drawing.text((left + right) / 2, bottom + 30, "nats/token", anchor="middle", kind="small")
    for row, kind in enumerate(kinds):
        y = top + 24 * row + 14
        drawing.text(left - 8, y + 4, labels[row], anchor="end")
        for number, each in enumerate(comparisons):
            value = each.profile.kinds[row].kl_nats
            color, error = series_color(number), value.standard_error or 0.0
            drawing.line(at(value.value - error), y, at(value.value + error), y, color=color, width=2)
            drawing.dot(at(value.value), y, color=color, hint=f"{each.quantized.name}, {kind.kind}: {nats(value)} nats")
    return drawing


def drift_chart(comparisons: Sequence[Comparison], *, first_token: bool) -> Drawing | None:
    """Draw the relative error of hidden states after each block; None if it is not known of every model.

    Args:
        comparisons: At least one.
        first_token: Of the first token of each row, instead of the others.
    """
    if not all(each.drift for each in comparisons):
        return None
    curves = [
        (
            comparison.quantized.name,
            [
                (float(each.block), each.first_token if first_token else each.error, f"after block {each.block}")
                for each in comparison.drift
                if each.block is not None
            ],
        )
        for comparison in comparisons
    ]
    title = f"Measured error by block, {'first token' if first_token else 'other tokens'}"
    x = linear_axis(0, max(block for _, points in curves for block, *_ in points))
    return _curves(title, "block", x, curves, name_y="relative error of hidden states", radius=2.5)


@dataclass(frozen=True, slots=True)
class SizedModel:
    """One point of ``size_chart``.

    Attributes:
        name: Name of the model.
        stored_bytes: Size of all files with weights; None if it is not known.
        kl_nats: Mean KL divergence from the original, nats per token.
    """

    name: str
    stored_bytes: int | None
    kl_nats: Estimate


def size_chart(models: Sequence[SizedModel]) -> Drawing | None:
    """Draw the divergence against the size, each model with its name; None if fewer than two have a known size.

    The line joins those that no smaller model comes as close to the original as.
    """
    found = sorted((each.stored_bytes, number) for number, each in enumerate(models) if each.stored_bytes)
    if len(found) < 2:
        return None
    unit, unit_bytes = bytes_unit(found[-1][0])
    sized = [(size / unit_bytes, number) for size, number in found]
    names = distinct_names([each.name for each in models])
    drawing = Drawing(WIDTH, _HEIGHT, "KL divergence against size")
    values = [models[number].kl_nats for _, number in sized]
    place = _Frame(drawing, linear_axis(sized[0][0], sized[-1][0]), _nats_axis(values), 36)
    place.axes(unit, "nats/token", "{:.6g}".format, short_number)
    points = [(place.x(size), place.y(value.value)) for (size, _), value in zip(sized, values, strict=True)]
    lowest = list(accumulate((value.value for value in values), min))
    best = [
        point
        for number, (point, value) in enumerate(zip(points, values, strict=True))
        if number == 0 or value.value < lowest[number - 1]
    ]
    if len(best) > 1:
        drawing.path(best, color="var(--bp-muted)", hint="the closest to the original at each size")
    for (x_at, y_at), (size, number), value in zip(points, found, values, strict=True):
        hint = f"{models[number].name}: {nats(value)} nats at {bytes_text(size)}"
        drawing.dot(x_at, y_at, color=series_color(number), hint=hint, radius=5)
    _label(drawing, [(*point, names[number]) for point, (_, number) in zip(points, sized, strict=True)])
    return drawing


def _label(drawing: Drawing, labels: Sequence[tuple[float, float, str]]) -> None:
    # Names beside their points, on the side with more room; lower where another stands already.
    taken: list[tuple[float, float, float]] = []
    for x, y, name in sorted(labels, key=lambda each: each[1]):
        width, left = 6.4 * len(name), x > drawing.width / 2
        start = x - 9 - width if left else x + 9
        line = y + 4
        while any(abs(line - other) < 13 and start < end and begin < start + width for other, begin, end in taken):
            line += 3
        taken.append((line, start, start + width))
        drawing.text(x - 9 if left else x + 9, line, name, anchor="end" if left else "start", kind="label")


def planned_chart(curves: Mapping[str, Sequence[tuple[int, float, str]]]) -> Drawing:
    """Draw predicted damage against size, one line for each format.

    Args:
        curves: By format, its plans from the smallest to the largest: size in bytes, damage in nats per token, and what
            to say on hovering after format and damage.
    """
    sizes = [size for points in curves.values() for size, *_ in points]
    unit, unit_bytes = bytes_unit(max(sizes))
    marks = [
        (name, [(size / unit_bytes, Estimate(damage, None), hint) for size, damage, hint in points])
        for name, points in curves.items()
    ]
    x = linear_axis(min(sizes) / unit_bytes, max(sizes) / unit_bytes)
    return _curves("Predicted damage against size", unit, x, marks, radius=3)


def _curves(
    title: str,
    name_x: str,
    x: Axis,
    curves: Sequence[tuple[str, Sequence[_Point]]],
    *,
    name_y: str = "nats/token",
    radius: float = 3.5,
) -> Drawing:
    # A line for each series, with a mark for each of its points; whiskers are one standard error.
    drawing, top = _begun(title, [name for name, _ in curves])
    place = _Frame(drawing, x, _nats_axis([value for _, points in curves for _, value, _ in points]), top)
    place.axes(name_x, name_y, "{:.6g}".format, short_number)
    for number, (name, points) in enumerate(curves):
        color, places = series_color(number), []
        for at, value, hint in points:
            error = value.standard_error or 0.0
            places.append((place.x(at), place.y(value.value)))
            low, high = place.y(value.value - error), place.y(value.value + error)
            drawing.line(place.x(at), low, place.x(at), high, color=color)
            drawing.dot(*places[-1], color=color, hint=f"{name}: {nats(value)} {hint}", radius=radius)
        if len(places) > 1:
            drawing.path(places, color=color, hint=name)
    return drawing


class _Frame:
    """Two axes in a drawing."""

    def __init__(self, drawing: Drawing, x: Axis, y: Axis, top: float) -> None:
        self._drawing = drawing
        self._x, self._y = x, y
        self._top, self._bottom = top + 9, drawing.height - _BOTTOM
        self._right = drawing.width - _RIGHT

    def x(self, value: float) -> float:
        return _LEFT + (self._right - _LEFT) * self._x.share(value)

    def y(self, value: float) -> float:
        return self._bottom - (self._bottom - self._top) * self._y.share(value)

    def axes(self, name_x: str, name_y: str, str_x: Callable[[float], str], str_y: Callable[[float], str]) -> None:
        drawing = self._drawing
        for tick in self._y.ticks:
            drawing.line(_LEFT, self.y(tick), self._right, self.y(tick))
            drawing.text(_LEFT - 6, self.y(tick) + 4, str_y(tick), anchor="end", kind="small")
        for tick in self._x.ticks:
            drawing.line(self.x(tick), self._bottom, self.x(tick), self._bottom + 4)
            drawing.text(self.x(tick), self._bottom + 16, str_x(tick), anchor="middle", kind="small")
        drawing.text((_LEFT + self._right) / 2, self._bottom + 32, name_x, anchor="middle", kind="small")
        drawing.text(0, self._top - 13, name_y, kind="small")


def _begun(title: str, names: Sequence[str]) -> tuple[Drawing, float]:
    drawing = Drawing(WIDTH, _HEIGHT, title)
    top = _legend(drawing, names) + 16
    drawing.height = _HEIGHT + top - 36
    return drawing, top


def _names(comparisons: Iterable[Comparison]) -> list[str]:
    return [each.quantized.name for each in comparisons]


def _legend(drawing: Drawing, names: Sequence[str]) -> float:
    if len(names) < 2:
        return 20
    labels = distinct_names(names)
    return drawing.legend(labels, 32, columns=2 if max(map(len, labels)) <= _HALF_CHARACTERS else 1)


def _nats_axis(values: Sequence[Estimate]) -> Axis:
    numbers = [value.value for value in values]
    highs = [value.value + (value.standard_error or 0.0) for value in values]
    low, high = max(min(numbers), _LOWEST_SHOWN_NATS), max(*highs, 2 * _LOWEST_SHOWN_NATS)
    if high / low > LOG_RATIO:
        return log_axis(low, high)
    return linear_axis(0.0, high)
