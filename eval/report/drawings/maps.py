"""Maps of a report: a cell for each linear or for each place of a needle, the darker the more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean

from ....convert.plan import LinearCost
from ...tasks.needle import DEPTHS, NeedleModel
from .svg import LOG_RATIO, WIDTH, Axis, Drawing, short_number, shortened

__all__ = ["bits_map", "damage_map", "needle_map"]

_ROW = 20.0
_LEGEND_STEPS = 16

_ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Kinds of linears from top to bottom, in the order of computation; others follow by name."""

_SHOWN_BPW = (2.0, 8.5)
"""Ends of the scale of bits per weight: the same in all maps, so that they can be compared."""


def needle_map(model: NeedleModel) -> Drawing:
    """Draw what a model finds, by depth of the needle and length of the prompt."""
    left, top, width, height = 60.0, 30.0, 74.0, 30.0
    lengths = [each.length for each in model.lengths]
    bottom = top + height * len(DEPTHS)
    title = f"Needles found — {shortened(model.name)}"
    drawing = Drawing(max(WIDTH, left + width * len(lengths) + 4), bottom + 36, title)
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


def damage_map(costs: Sequence[LinearCost], name: str = "") -> Drawing | None:
    """Draw the predicted damage of every linear, by block and kind; None if it is not known.

    Args:
        costs: The linears of one model.
        name: What tells the model from others that are shown; empty for a single one.
    """
    known = {cost.name: cost.damage_nats for cost in costs if cost.damage_nats is not None}
    if not known:
        return None
    values = list(known.values())
    low, high = min(values), max(values)
    spread = low > 0 and high / low > LOG_RATIO
    scale = Axis(low=low, high=high if high > low else low + 1, ticks=(), log=spread)
    title = _titled("Damage", name)
    damaged = [cost for cost in costs if cost.name in known]
    unit = "nats/token, predicted"
    return _heat_map(damaged, lambda cost: known[cost.name], scale, title, unit, "var(--bp-heat)", sum)


def bits_map(costs: Sequence[LinearCost], name: str = "") -> Drawing | None:
    """Draw the bits per weight of every linear, by block and kind; None if nothing is quantized.

    Args:
        costs: The linears of one model.
        name: As in ``damage_map``.
    """
    if not costs:
        return None
    scale = Axis(low=_SHOWN_BPW[0], high=_SHOWN_BPW[1], ticks=())
    title = _titled("Bits per weight", name)
    return _heat_map(costs, lambda cost: cost.bpw, scale, title, "bits per weight", "var(--bp-cool)", fmean)


def _titled(what: str, name: str) -> str:
    # Short enough for a phone, where a map is moved aside to be seen whole.
    return f"{what} — {name}" if name else what


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
    drawing = Drawing(max(WIDTH, left + cell * blocks + 4), bottom + 52, title)
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
    _heat_legend(drawing, left / 2, bottom + 40, scale, color, unit)
    return drawing


def _heat_legend(drawing: Drawing, x: float, y: float, scale: Axis, color: str, unit: str) -> None:
    drawing.text(x - 8, y, short_number(scale.low), anchor="end", kind="small")
    for step in range(_LEGEND_STEPS):
        drawing.rectangle(x + 8 * step, y - 9, 8, 10, color=color, opacity=_shade(step / (_LEGEND_STEPS - 1)))
    drawing.text(x + 8 * _LEGEND_STEPS + 8, y, f"{short_number(scale.high)} {unit}", kind="small")


def _kind_order(kind: str) -> tuple[int, str]:
    return (_ORDER.index(kind) if kind in _ORDER else len(_ORDER), kind)


def _shade(share: float) -> float:
    # The faintest must still be seen on either background.
    return 0.08 + 0.92 * share
