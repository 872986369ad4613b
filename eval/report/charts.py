"""The drawings of a report: where the damage lies, how it is spread, and what size buys."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean

from ...convert.format import LinearCost
from ..comparison import Comparison
from ..metrics.estimate import Estimate
from ..tasks.needle import DEPTHS, NeedleModel
from .numbers import nats
from .svg import Axis, Drawing, linear_axis, log_axis, series_color, shortened

__all__ = [
    "bits_map",
    "damage_map",
    "drift_chart",
    "histogram_chart",
    "kinds_chart",
    "needle_map",
    "planned_chart",
    "positions_chart",
    "size_chart",
]

_WIDTH = 400
_HEIGHT = 260
_LEFT = 48
_RIGHT = 14
_BOTTOM = 38

_ROW = 20.0
_LEGEND_STEPS = 16

_LOG_RATIO = 8
"""Where the largest number is that many times the smallest, a logarithmic axis shows more."""

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Kinds of linears from top to bottom, in the order of computation; others follow by name."""

_SHOWN_BPW = (2.0, 8.5)
"""Ends of the scale of bits per weight: the same in all maps, so that they can be compared."""

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
    drawing.text(drawing.width, top - 4, "vertical line: mean", anchor="end", kind="small")
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
    labels = [f"{shortened(kind.kind)} ({kind.rows})" for kind in kinds]
    left, right = 14 + 6.5 * max(map(len, labels)), drawing.width - _RIGHT

    def at(value: float) -> float:
        return left + (right - left) * x.share(value)

    bottom = drawing.height - _BOTTOM
    for tick in x.ticks:
        drawing.line(at(tick), top, at(tick), bottom)
        drawing.text(at(tick), bottom + 14, _short(tick), anchor="middle", kind="small")
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
    which = "first token" if first_token else "other tokens"
    drawing, top = _begun(f"Measured error by block, {which}", comparisons)
    curves = [
        [
            (each.block, each.first_token if first_token else each.error)
            for each in comparison.drift
            if each.block is not None
        ]
        for comparison in comparisons
    ]
    x = linear_axis(0, max(block for curve in curves for block, _ in curve))
    place = _Frame(drawing, x, _nats_axis([error for curve in curves for _, error in curve]), top)
    place.axes("block", "relative error of hidden states", str_x=lambda value: f"{value:g}")
    for number, curve in enumerate(curves):
        color, name = series_color(number), comparisons[number].quantized.name
        points = [
            place.estimate(block, error, color, f"{name}: {nats(error)} after block {block}", radius=2.5)
            for block, error in curve
        ]
        drawing.path(points, color=color, hint=name)
    return drawing


def needle_map(model: NeedleModel) -> Drawing:
    """Draw what a model finds, by depth of the needle and length of the prompt."""
    left, top, width, height = 60.0, 30.0, 74.0, 30.0
    lengths = [each.length for each in model.lengths]
    bottom = top + height * len(DEPTHS)
    title = f"Needles found — {shortened(model.name)}"
    drawing = Drawing(max(_WIDTH, left + width * len(lengths) + 4), bottom + 36, title)
    for row, depth in enumerate(DEPTHS):
        drawing.text(left - 8, top + height * row + 19, f"{100 * depth:.0f} %", anchor="end", kind="small")
    for column, length in enumerate(lengths):
        drawing.text(left + width * (column + 0.5), bottom + 14, str(length), anchor="middle", kind="small")
    drawing.text(0, bottom + 32, "depth of the needle downwards, tokens to the right", kind="small")
    for cell in model.cells:
        x, y = left + width * lengths.index(cell.length), top + height * DEPTHS.index(cell.depth)
        hint = (
            f"{100 * cell.found:.0f} % found at {100 * cell.depth:.0f} % of {cell.length} tokens, "
            f"{cell.nats:.3g} nats for the number"
        )
        # No more than half covered: the number on it must be read on either background.
        shade = 0.5 * _shade(cell.found)
        drawing.rectangle(x, y, width - 2, height - 2, color="var(--bp-cool)", hint=hint, opacity=shade)
        drawing.text(x + width / 2, y + 19, f"{100 * cell.found:.0f} %", anchor="middle")
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
    values = list(known.values())
    low, high = min(values), max(values)
    spread = low > 0 and high / low > _LOG_RATIO
    scale = Axis(low=low, high=high if high > low else low + 1, ticks=(), log=spread)
    title = f"Predicted damage by layer and linear — {shortened(name)}"
    damaged = [cost for cost in costs if cost.name in known]
    return _heat_map(damaged, lambda cost: known[cost.name], scale, title, "nats/token", "var(--bp-heat)", sum)


def bits_map(costs: Sequence[LinearCost], name: str) -> Drawing | None:
    """Draw the bits per weight of every linear, by block and kind; None if nothing is quantized."""
    if not costs:
        return None
    scale = Axis(low=_SHOWN_BPW[0], high=_SHOWN_BPW[1], ticks=())
    title = f"Bits per weight by layer and linear — {shortened(name)}"
    return _heat_map(costs, lambda cost: cost.bpw, scale, title, "bits per weight", "var(--bp-cool)", fmean)


def planned_chart(curves: Mapping[str, Sequence[tuple[float, float, str]]]) -> Drawing:
    """Draw predicted damage against size, one line for each format.

    Args:
        curves: By format, its plans from the smallest to the largest: size in GB, damage in nats per token, and what
            to say on hovering.
    """
    drawing = Drawing(_WIDTH, _HEIGHT, "Predicted damage against size")
    top = drawing.legend(list(curves), 32) + 16
    drawing.height = _HEIGHT + top - 36
    points = [point for curve in curves.values() for point in curve]
    sizes, damages = [size for size, _, _ in points], [max(damage, _LOWEST_SHOWN_NATS) for _, damage, _ in points]
    place = _Frame(drawing, linear_axis(min(sizes), max(sizes)), log_axis(min(damages), 1.01 * max(damages)), top)
    place.axes("GB", "nats/token", str_x=lambda value: f"{value:.3g}")
    for number, (name, curve) in enumerate(curves.items()):
        color = series_color(number)
        places = [(place.x(size), place.y(damage)) for size, damage, _ in curve]
        drawing.path(places, color=color, hint=name)
        for (x, y), (_, _, hint) in zip(places, curve, strict=True):
            drawing.dot(x, y, color=color, hint=hint, radius=3)
    return drawing


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
    scale: Axis,
    title: str,
    unit: str,
    color: str,
    joined: Callable[[Sequence[float]], float],
) -> Drawing:
    # Kinds of linears downwards, blocks to the right; experts of one kind and block share a cell. What is outside of
    # the blocks (embeddings, head) has a row of its own below.
    cells: dict[tuple[str, int], list[float]] = {}
    for cost in costs:
        cells.setdefault((cost.kind, -1 if cost.block is None else cost.block), []).append(value_of(cost))
    blocks = max(block for _, block in cells) + 1
    inside = sorted({kind for kind, block in cells if block >= 0}, key=_kind_order)
    rows = [*((kind, True) for kind in inside), *((kind, False) for kind, block in cells if block < 0)]
    left, top, cell = 100.0, 30.0, min(26.0, max(9.0, 820 / max(blocks, 1)))
    bottom = top + _ROW * len(rows)
    drawing = Drawing(max(_WIDTH, left + cell * blocks + 4), bottom + 52, title)
    for row, (kind, _) in enumerate(rows):
        drawing.text(left - 8, top + _ROW * row + 14, kind, anchor="end")
    for (kind, block), values in cells.items():
        x, y, value = left + cell * max(block, 0), top + _ROW * rows.index((kind, block >= 0)), joined(values)
        hint = f"{kind}{f' of block {block}' if block >= 0 else ''}: {value:.3g} {unit}"
        drawing.rectangle(x, y, cell - 1, _ROW - 1, color=color, hint=hint, opacity=_shade(scale.share(value)))
        if block < 0:
            drawing.text(left + cell + 6, y + 14, f"{value:.3g}", kind="small")
    for block in range(0, blocks, max(1, round(24 / cell))):
        drawing.text(left + cell * (block + 0.5) - 0.5, bottom + 13, str(block), anchor="middle", kind="small")
    _heat_legend(drawing, left, bottom + 40, scale, color, unit)
    return drawing


def _heat_legend(drawing: Drawing, x: float, y: float, scale: Axis, color: str, unit: str) -> None:
    drawing.text(x - 8, y, _short(scale.low), anchor="end", kind="small")
    for step in range(_LEGEND_STEPS):
        drawing.swatch(x + 8 * step, y - 9, 8, 10, color=color, opacity=_shade(step / (_LEGEND_STEPS - 1)))
    drawing.text(x + 8 * _LEGEND_STEPS + 8, y, f"{_short(scale.high)} {unit}", kind="small")


def _kind_order(kind: str) -> tuple[int, str]:
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)


def _shade(share: float) -> float:
    # The faintest must still be seen on either background.
    return 0.08 + 0.92 * share
