"""Bit allocation: the widths of all row groups of all linears that cost least within an exact budget of bits.

Every row group of every linear chooses one width. Minimising the summed damage under one budget is a multiple-choice
knapsack. Its relaxation is solved exactly by walking the lower convex hulls of all groups' curves in order of damage
saved per bit; the Lagrangian dual at the last price bounds what any choice could reach. What is left of the budget
is filled by the upgrades that save most and still fit. No torch, no model: a second for billions of weights.
Source: Everett, Generalized Lagrange multiplier method (Operations Research 11, 1963), and the greedy solution of the
linear multiple-choice knapsack (Zemel, 1980).

Notes:
    Minimise ``sum_g D_g(o_g)`` over options o_g with ``sum_g B_g(o_g) <= B``. For every price p >= 0 per bit
    ``L(p) = sum_g min_o (D_g(o) + p B_g(o)) - p B`` is at most the minimum. The walk takes upgrades in order of their
    slopes ``(D_g(o) - D_g(o')) / (B_g(o') - B_g(o))``; with p the slope at which the budget ends, ``damage - L(p)``
    bounds how far the choice is from the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Allocation", "allocate"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Allocation:
    """A solved allocation.

    Attributes:
        choice: Index of the option that each group takes, int64, shape (groups,).
        bits: Bits that the choice takes.
        damage: Summed damage of the choice, in the curves' unit.
        lower_bound: No choice within the budget can have a smaller damage than this (Lagrangian dual).
    """

    choice: NDArray[np.int64]
    bits: int
    damage: float
    lower_bound: float


def allocate(damage: NDArray[np.float64], bits: NDArray[np.int64], budget_bits: int) -> Allocation:
    """Choose one option per group.

    Args:
        damage: Damage of every option, shape (groups, options), not negative; infinite for one that may not be taken.
            Every group has an option of finite damage.
        bits: Bits of every option, same shape, strictly decreasing or increasing along the options.
        budget_bits: Most bits that all groups together may take; at least the sum of the smallest options that
            may be taken.

    Returns:
        The choice, within the budget.
    """
    start = np.where(np.isfinite(damage), bits, np.iinfo(np.int64).max).argmin(axis=1)
    steps = _hull_steps(damage, bits, start)
    order = np.lexsort((steps.target, steps.group, -steps.slope))
    choice = start.copy()
    left = budget_bits - int(bits[np.arange(len(bits)), choice].sum())
    assert left >= 0, "the caller checks that the smallest options fit"
    price = 0.0
    # Hull slopes fall along each group, so this order never takes a group's second step before its first, except
    # after a step that did not fit: then the group is left to the greedy fill.
    blocked = np.zeros(len(bits), dtype=bool)
    for index in order:
        group, target = steps.group[index], steps.target[index]
        cost = int(bits[group, target] - bits[group, choice[group]])
        if blocked[group] or cost > left:
            price = max(price, float(steps.slope[index])) if not blocked.any() else price
            blocked[group] = True
            continue
        choice[group] = target
        left -= cost
    left = _fill(damage, bits, choice, left)
    rows = np.arange(len(bits))
    return Allocation(
        choice=choice,
        bits=budget_bits - left,
        damage=float(damage[rows, choice].sum()),
        lower_bound=float((damage + price * bits).min(axis=1).sum() - price * budget_bits),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Steps:
    """Upgrades along the groups' convex hulls: group, option reached, damage saved per bit."""

    group: NDArray[np.int64]
    target: NDArray[np.int64]
    slope: NDArray[np.float64]


def _hull_steps(damage: NDArray[np.float64], bits: NDArray[np.int64], start: NDArray[np.int64]) -> _Steps:
    # Lower convex hulls of all groups at once: from the option where a group stands, the next hull point is the one
    # with the steepest saving per bit (among equals the farthest).
    rows = np.arange(len(bits))
    current = start.copy()
    groups, targets, slopes = [], [], []
    for _ in range(bits.shape[1] - 1):
        extra = bits - bits[rows, current][:, None]
        saved = damage[rows, current][:, None] - damage
        slope = np.where((extra > 0) & (saved > 0), saved / np.maximum(extra, 1), 0.0)
        best = slope.max(axis=1)
        target = np.where(slope == best[:, None], bits, -1).argmax(axis=1)
        moves = best > 0
        groups.append(rows[moves])
        targets.append(target[moves])
        slopes.append(best[moves])
        current = np.where(moves, target, current)
    return _Steps(np.concatenate(groups), np.concatenate(targets), np.concatenate(slopes))


def _fill(damage: NDArray[np.float64], bits: NDArray[np.int64], choice: NDArray[np.int64], left: int) -> int:
    # Spend what is left on single upgrades, hull points or not, the best saving per bit first. Changes `choice`.
    rows = np.arange(len(bits))
    while True:
        extra = bits - bits[rows, choice][:, None]
        saved = damage[rows, choice][:, None] - damage
        fits = (extra > 0) & (extra <= left) & (saved > 0)
        if not fits.any():
            return left
        slope = np.where(fits, saved / np.maximum(extra, 1), 0.0)
        group, option = np.unravel_index(int(slope.argmax()), slope.shape)
        left -= int(extra[group, option])
        choice[group] = option
