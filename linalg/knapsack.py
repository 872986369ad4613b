"""One option for every tensor, at least damage within a budget: the multiple-choice knapsack, solved exactly.

A few hundred tensors with a dozen options each. At the price of a bit at which the Lagrangian dual is highest, an
option's reduced cost is how much it adds to the dual bound; a choice whose reduced costs sum to more than the gap
between the bound and a known solution cannot be better than that. So few partial choices are left to go through, and
of those of equal size only the best. Source: Dyer, Kayal and Walker, A branch and bound algorithm for solving the
multiple-choice knapsack problem (Journal of Computational and Applied Mathematics 11, 1984).

Notes:
    Minimise ``sum_i D_i(o_i)`` with ``sum_i B_i(o_i) <= B``. At the price p that maximises the dual bound
    ``L = sum_i min_o (D_i(o) + p B_i(o)) - p B``, the reduced cost is ``r_i(o) = D_i(o) + p B_i(o) - min`` over the
    item's options. A choice within the budget has ``D >= L + sum_i r_i(o_i)``; so with a solution of damage D* only
    choices with ``sum_i r_i(o_i) <= D* - L`` need be looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Choice", "choose"]

_MOST_STATES = 200_000
"""Partial choices kept at once. Beyond it the best in reduced cost are kept, and the bound says what that may cost."""

_BISECTIONS = 200


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """A solved knapsack.

    Attributes:
        options: Index of the option that each item takes.
        damage: Summed damage of the choice, in the unit given.
        lower_bound: No choice within the budget has a smaller damage. Equal to ``damage`` where that is proven.
    """

    options: tuple[int, ...]
    damage: float
    lower_bound: float


@dataclass(frozen=True, slots=True, eq=False)
class _States:
    """Partial choices over the items so far, by rising size: what they take, cost, and came from."""

    size: NDArray[np.int64]
    damage: NDArray[np.float64]
    reduced: NDArray[np.float64]
    parent: NDArray[np.int64]
    option: NDArray[np.int64]


def choose(damages: Sequence[NDArray[np.float64]], sizes: Sequence[NDArray[np.int64]], budget: int) -> Choice:
    """Choose one option for every item.

    Args:
        damages: Damage of each option of each item, not negative; infinite for one that cannot be taken. Every item
            has an option of finite damage.
        sizes: What each option takes of the budget, in any unit.
        budget: Most that all items together may take; no less than all items take at their smallest.

    Returns:
        The choice of least damage.
    """
    price = _best_price(damages, sizes, budget)
    values = [damage + price * size for damage, size in zip(damages, sizes, strict=True)]
    bound = max(0.0, sum(float(value.min()) for value in values) - price * budget)
    reduced = [value - value.min() for value in values]
    least = [int(size[np.isfinite(damage)].min()) for damage, size in zip(damages, sizes, strict=True)]
    # The gap is not known before there is a solution: start from a narrow one and widen it until a solution shows.
    spread = sorted(float(cost) for costs in reduced for cost in costs if 0 < cost < np.inf)
    gap = spread[0] if spread else 0.0
    while True:
        found, complete = _search(damages, sizes, reduced, least, budget, gap)
        if found is not None:
            excess = found[1] - bound
            # Nothing outside the gap searched can be better than the solution: it is the best.
            if complete and excess <= gap:
                return Choice(options=found[0], damage=found[1], lower_bound=found[1])
            if not complete:
                return Choice(options=found[0], damage=found[1], lower_bound=bound)
            gap = excess
        else:
            gap *= 4


def _best_price(damages: Sequence[NDArray[np.float64]], sizes: Sequence[NDArray[np.int64]], budget: int) -> float:
    # The dual is concave in the price and its slope is the size of the cheapest choice less the budget: bisection.
    def size_at(price: float) -> int:
        total = 0
        for damage, size in zip(damages, sizes, strict=True):
            value = damage + price * size
            total += int(size[value == value.min()].min())
        return total

    if size_at(0.0) <= budget:
        return 0.0
    high = max(float(damage[np.isfinite(damage)].max()) for damage in damages) or 1.0
    low = 0.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if size_at(middle) <= budget else (middle, high)
        if high - low <= 1e-12 * high:
            break
    return high


def _search(
    damages: Sequence[NDArray[np.float64]],
    sizes: Sequence[NDArray[np.int64]],
    reduced: Sequence[NDArray[np.float64]],
    least: Sequence[int],
    budget: int,
    gap: float,
) -> tuple[tuple[tuple[int, ...], float] | None, bool]:
    # The best choice whose reduced costs sum to no more than the gap, and whether no partial choice was left out.
    zero = np.zeros(1, dtype=np.int64)
    layers = [_States(zero, np.zeros(1), np.zeros(1), zero, zero)]
    remaining = sum(least)
    complete = True
    for damage, size, cost, smallest in zip(damages, sizes, reduced, least, strict=True):
        remaining -= smallest
        layer, whole = _extended(layers[-1], damage, size, cost, budget - remaining, gap)
        if not len(layer.size):
            return None, True
        complete &= whole
        layers.append(layer)
    best = int(layers[-1].damage.argmin())
    total = float(layers[-1].damage[best])
    options: list[int] = []
    for layer in reversed(layers[1:]):
        options.append(int(layer.option[best]))
        best = int(layer.parent[best])
    return (tuple(reversed(options)), total), complete


def _extended(
    states: _States,
    damage: NDArray[np.float64],
    size: NDArray[np.int64],
    cost: NDArray[np.float64],
    most: int,
    gap: float,
) -> tuple[_States, bool]:
    # One more item: every state with every option that stays within the gap and the budget, without those that another
    # one beats in size and damage.
    parents, options = np.nonzero(
        (states.reduced[:, None] + cost[None] <= gap * (1 + 1e-9)) & (states.size[:, None] + size[None] <= most)
    )
    sizes = states.size[parents] + size[options]
    damages = states.damage[parents] + damage[options]
    order = np.lexsort((damages, sizes))
    before = np.minimum.accumulate(np.concatenate([[np.inf], damages[order][:-1]]))
    kept = order[damages[order] < before]
    whole = len(kept) <= _MOST_STATES
    reduced = states.reduced[parents[kept]] + cost[options[kept]]
    if not whole:
        nearest = np.sort(np.argpartition(reduced, _MOST_STATES)[:_MOST_STATES])
        kept, reduced = kept[nearest], reduced[nearest]
    return _States(sizes[kept], damages[kept], reduced, parents[kept], options[kept]), whole
