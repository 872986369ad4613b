"""The drawings of a report: where the damage lies, how it is spread, and what size buys."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from .comparison import Comparison
from .estimate import Estimate
from .format import nats
from .layers import LinearCost
from .svg import Axis, Drawing, linear_axis, log_axis, series_color

__all__ = ["bits_map", "damage_map", "histogram_chart", "kinds_chart", "positions_chart", "size_chart"]

_WIDTH = 440
_HEIGHT = 270
_LEFT = 52
_RIGHT = 10
_BOTTOM = 38

_LOG_RATIO = 8
"""Where the largest number is that many times the smallest, a logarithmic axis shows more."""

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Kinds of linears from top to bottom, in the order of computation; others follow by name."""

_LOWEST_SHOWN_NATS = 1e-9
"""Smaller divergences are shown as this one on logarithmic axes."""


def histogram_chart(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw how many tokens have a divergence of which magnitude; bars for one model, steps for several."""
    drawing, top = _begun("KL divergence of single tokens", comparisons)
    histograms = [each.profile.histogram for each in comparisons]
    x = log_axis(
        max(_LOWEST_SHOWN_NATS, min(h.edge_nats(0) for h in histograms)),
        max(10 * _LOWEST_SHOWN_NATS, *(h.edge_nats(len(h.counts)) for h in histograms)),
    )
    shares = [[100 * count / sum(h.counts) for count in h.counts] for h in histograms]
    y = linear_axis(0.0, max(map(max, shares)))
    place = _Frame(drawing, x, y, top)
    place.axes("nats", "% of tokens", str_y=lambda value: f"{value:g}")
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
    drawing.text(drawing.width, 13, "vertical line: mean", anchor="end", kind="small")
    return drawing


def positions_chart(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw the divergence against the number of tokens that a prediction sees; whiskers are one standard error."""
    drawing, top = _begun("KL divergence by position in the text", comparisons)
    buckets = comparisons[0].profile.positions
    middles = [math.sqrt(bucket.first * bucket.last) for bucket in buckets]
    x = Axis(
        low=0.8,
        high=max(2.0, 1.1 * middles[-1]),
        ticks=tuple(float(bucket.first) for bucket in buckets if bucket.first <= 1.1 * middles[-1])[
            :: -(-len(buckets) // 7)
        ],
        log=True,
    )
    y = _nats_axis([bucket.kl_nats for each in comparisons for bucket in each.profile.positions])
    place = _Frame(drawing, x, y, top)
    place.axes("tokens before the predicted one", "nats/token", str_x=lambda value: f"{value:g}")
    for number, each in enumerate(comparisons):
        color = series_color(number)
        points = []
        for middle, bucket in zip(middles, each.profile.positions, strict=True):
            hint = f"{each.quantized.name}: {nats(bucket.kl_nats)} nats after {bucket.first} to {bucket.last} tokens"
            points.append(place.estimate(middle, bucket.kl_nats, color, hint))
        drawing.path(points, color=color, hint=each.quantized.name)
    return drawing


def kinds_chart(comparisons: Sequence[Comparison]) -> Drawing:
    """Draw the divergence on each kind of text; whiskers are one standard error."""
    kinds = comparisons[0].profile.kinds
    drawing = Drawing(_WIDTH, 1, "KL divergence by kind of text")
    top = _legend(drawing, comparisons)
    drawing.height = top + 24 * len(kinds) + _BOTTOM
    x = _nats_axis([kind.kl_nats for each in comparisons for kind in each.profile.kinds])
    left, right = 150.0, drawing.width - _RIGHT

    def at(value: float) -> float:
        return left + (right - left) * x.share(value)

    bottom = drawing.height - _BOTTOM
    for tick in x.ticks:
        drawing.line(at(tick), top, at(tick), bottom)
        drawing.text(at(tick), bottom + 14, _short(tick), anchor="middle", kind="small")
    drawing.text((left + right) / 2, bottom + 30, "nats/token", anchor="middle", kind="small")
    for row, kind in enumerate(kinds):
        y = top + 24 * row + 14
        drawing.text(left - 8, y + 4, f"{kind.kind[:18]} ({kind.rows})", anchor="end")
        for number, each in enumerate(comparisons):
            value = each.profile.kinds[row].kl_nats
            color, error = series_color(number), value.standard_error or 0.0
            drawing.line(at(value.value - error), y, at(value.value + error), y, color=color, width=2)
            drawing.dot(at(value.value), y, color=color, hint=f"{each.quantized.name}, {kind.kind}: {nats(value)} nats")
    return drawing


def size_chart(comparisons: Sequence[Comparison]) -> Drawing | None:
    """Draw the divergence against the size; None if fewer than two models have a known one."""
    sized = [
        (number, each, each.quantized.stored_bytes / 1e9)
        for number, each in enumerate(comparisons)
        if each.quantized.stored_bytes
    ]
    if len(sized) < 2:
        return None
    drawing, top = _begun("KL divergence against size", comparisons)
    x = linear_axis(min(size for *_, size in sized), max(size for *_, size in sized))
    y = _nats_axis([each.summary.kl_nats for _, each, _ in sized])
    place = _Frame(drawing, x, y, top)
    place.axes("GB", "nats/token", str_x=lambda value: f"{value:.3g}")
    for number, each, size in sized:
        hint = f"{each.quantized.name}: {nats(each.summary.kl_nats)} nats at {size:.3f} GB"
        place.estimate(size, each.summary.kl_nats, series_color(number), hint, radius=5)
    return drawing


def damage_map(costs: Sequence[LinearCost], name: str) -> Drawing | None:
    """Draw the predicted damage of every linear, by block and kind; None if it is not known."""
    known = {cost.name: cost.damage_nats for cost in costs if cost.damage_nats is not None}
    if not known:
        return None
    return _heat_map(
        [cost for cost in costs if cost.name in known],
        lambda cost: known[cost.name],
        title=f"Predicted damage by layer and linear — {name}",
        unit="nats/token",
        color="var(--bp-heat)",
        summed=True,
    )


def bits_map(costs: Sequence[LinearCost], name: str) -> Drawing | None:
    """Draw the bits per weight of every linear, by block and kind; None if nothing is quantized."""
    if not costs:
        return None
    return _heat_map(
        costs,
        lambda cost: cost.bpw,
        title=f"Bits per weight by layer and linear — {name}",
        unit="bits per weight",
        color="var(--bp-cool)",
        summed=False,
    )


class _Frame:
    """Two axes in a drawing."""

    def __init__(self, drawing: Drawing, x: Axis, y: Axis, top: float) -> None:
        self._drawing = drawing
        self._x, self._y = x, y
        self._top, self._bottom = top + 4, drawing.height - _BOTTOM
        self._right = drawing.width - _RIGHT

    def x(self, value: float) -> float:
        return _LEFT + (self._right - _LEFT) * self._x.share(value)

    def y(self, value: float) -> float:
        return self._bottom - (self._bottom - self._top) * self._y.share(value)

    def axes(
        self,
        name_x: str,
        name_y: str,
        *,
        str_x: Callable[[float], str] | None = None,
        str_y: Callable[[float], str] | None = None,
    ) -> None:
        drawing = self._drawing
        for tick in self._y.ticks:
            drawing.line(_LEFT, self.y(tick), self._right, self.y(tick))
            drawing.text(_LEFT - 6, self.y(tick) + 4, (str_y or _short)(tick), anchor="end", kind="small")
        for tick in self._x.ticks:
            drawing.line(self.x(tick), self._bottom, self.x(tick), self._bottom + 4)
            drawing.text(self.x(tick), self._bottom + 16, (str_x or _short)(tick), anchor="middle", kind="small")
        drawing.text((_LEFT + self._right) / 2, self._bottom + 32, name_x, anchor="middle", kind="small")
        drawing.text(0, self._top - 8, name_y, kind="small")

    def estimate(self, x: float, value: Estimate, color: str, hint: str, *, radius: float = 3.5) -> tuple[float, float]:
        error = value.standard_error or 0.0
        place = self.x(x), self.y(value.value)
        self._drawing.line(place[0], self.y(value.value - error), place[0], self.y(value.value + error), color=color)
        self._drawing.dot(*place, color=color, hint=hint, radius=radius)
        return place


def _begun(title: str, comparisons: Sequence[Comparison]) -> tuple[Drawing, float]:
    drawing = Drawing(_WIDTH, _HEIGHT, title)
    top = _legend(drawing, comparisons) + 16
    drawing.height = _HEIGHT + top - 36
    return drawing, top


def _legend(drawing: Drawing, comparisons: Sequence[Comparison]) -> float:
    return drawing.legend([each.quantized.name for each in comparisons], 32) if len(comparisons) > 1 else 20


def _nats_axis(values: Sequence[Estimate]) -> Axis:
    numbers = [value.value for value in values]
    highs = [value.value + (value.standard_error or 0.0) for value in values]
    low, high = max(min(numbers), _LOWEST_SHOWN_NATS), max(*highs, 2 * _LOWEST_SHOWN_NATS)
    if high / low > _LOG_RATIO:
        return log_axis(low, high)
    return linear_axis(0.0, high)


def _short(value: float) -> str:
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e4:
        return f"{value:.3g}"
    mantissa, _, exponent = f"{value:.1e}".partition("e")
    return f"{mantissa.removesuffix('.0')}e{int(exponent)}"


def _heat_map(
    costs: Sequence[LinearCost],
    value_of: Callable[[LinearCost], float],
    *,
    title: str,
    unit: str,
    color: str,
    summed: bool,
) -> Drawing:
    cells: dict[tuple[str, int], list[float]] = {}
    outside: list[LinearCost] = []
    for cost in costs:
        if cost.block is None:
            outside.append(cost)
        else:
            cells.setdefault((cost.kind, cost.block), []).append(value_of(cost))
    numbers = {place: sum(found) / (1 if summed else len(found)) for place, found in cells.items()}
    kinds = sorted({kind for kind, _ in numbers}, key=lambda kind: (_ORDER.index(kind) if kind in _ORDER else 99, kind))
    blocks = max((block for _, block in numbers), default=-1) + 1
    values = [*numbers.values(), *map(value_of, outside)]
    shade = _shades(values)
    left, cell, high = 96.0, min(26.0, max(9.0, 820 / max(blocks, 1))), 20.0
    rows = [*kinds, *dict.fromkeys(cost.kind for cost in outside)]
    drawing = Drawing(max(_WIDTH, left + cell * blocks + 4), 34 + high * len(rows) + 62, title)
    for row, kind in enumerate(rows):
        drawing.text(left - 8, 34 + high * row + 14, kind, anchor="end")
    for (kind, block), value in numbers.items():
        x, y = left + cell * block, 34 + high * kinds.index(kind)
        hint = f"block {block}, {kind}: {value:.3g} {unit}"
        drawing.rectangle(x, y, cell - 1, high - 1, color=color, hint=hint, opacity=shade(value))
    for cost in outside:
        y, value = 34 + high * rows.index(cost.kind), value_of(cost)
        drawing.rectangle(
            left, y, cell - 1, high - 1, color=color, hint=f"{cost.name}: {value:.3g} {unit}", opacity=shade(value)
        )
        drawing.text(left + cell + 6, y + 14, f"{value:.3g}", kind="small")
    bottom = 34 + high * len(rows)
    every = max(1, round(48 / cell / 2))
    for block in range(0, blocks, every):
        drawing.text(left + cell * (block + 0.5) - 0.5, bottom + 13, str(block), anchor="middle", kind="small")
    _heat_legend(drawing, left, bottom + 26, values, shade, color, unit)
    return drawing


def _heat_legend(
    drawing: Drawing,
    x: float,
    y: float,
    values: Sequence[float],
    shade: Callable[[float], float],
    color: str,
    unit: str,
) -> None:
    low, high = min(values), max(values)
    drawing.text(x, y + 22, f"{low:.3g}", kind="small")
    drawing.text(x + 160, y + 22, f"{high:.3g} {unit}", anchor="end" if len(unit) < 12 else "middle", kind="small")
    for step in range(16):
        share = step / 15
        value = low * (high / low) ** share if _spread(values) else low + (high - low) * share
        drawing.rectangle(x + 10 * step, y, 10, 8, color=color, hint=f"{value:.3g} {unit}", opacity=shade(value))


def _spread(values: Sequence[float]) -> bool:
    return min(values) > 0 and max(values) / min(values) > _LOG_RATIO


def _shades(values: Sequence[float]) -> Callable[[float], float]:
    # The faintest must still be seen on either background.
    low, high = min(values), max(values)
    if low == high:
        return lambda _: 0.6
    axis = Axis(low=low, high=high, ticks=(), log=_spread(values))
    return lambda value: 0.08 + 0.92 * axis.share(value)
