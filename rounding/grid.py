"""The EXL2 grid of one row group: which ceiling and which scale codes cost least.

A column's scale in a group is ``fp16((code + 1)^2 * unit)`` with a 4-bit code and a unit shared by all columns of
the group (``fp16(ceiling / 256)``). Adjacent codes differ by 13 % at the top and by a factor of four at the bottom, and
the unit is coarse where it is subnormal, so the search runs against the scales that a reader will really compute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..convert.exl2.linear import effective_scale

__all__ = ["GroupGrid", "search_grid"]

_CHUNK_COLUMNS = 4096
"""Columns searched at a time: a group of 64 rows then stays in the processor's second-level cache."""

_SCALE_RANGE = {
    2: (0.42, 1.50),
    3: (0.50, 1.20),
    4: (0.60, 1.12),
    5: (0.70, 1.08),
    6: (0.78, 1.06),
    8: (0.86, 1.03),
}
"""Range of trial scales per width, as multiples of the scale at which the largest weight is just not clipped.
Fewer bits pay for clipping with finer steps: 2-bit Gaussian columns have their optimum near 0.6."""

_TRIAL_SCALES = 8
"""Trial scales per column, log-spaced over the range. Twice as many lower the error by less than 0.2 %."""

_UNIT_FACTORS = (0.70, 0.78, 0.85, 0.90, 0.95, 1.00, 1.06, 1.12)
"""Trial units, as multiples of the one whose largest code gives the largest wanted scale."""

_SMALLEST_UNIT = 2.0**-24
_LARGEST_UNIT = 255.0


@dataclass(frozen=True, slots=True, eq=False)
class GroupGrid:
    """Chosen scales of one row group.

    Attributes:
        ceiling: ``q_scale_max``, float16, shape ().
        codes: Scale codes 0 to 15, uint8, shape (columns,).
        scales: The scales that a reader computes from the two, float32, shape (columns,).
    """

    ceiling: Tensor
    codes: Tensor
    scales: Tensor


def search_grid(target: Tensor, row_weights: Tensor, column_weights: Tensor, bits: int) -> GroupGrid:
    """Choose ceiling and scale codes that minimise the weighted squared rounding error of one row group.

    Args:
        target: Weights to represent, float32, shape (rows, columns).
        row_weights: Cost of a squared error in each row, float32, shape (rows,); 1 / U_kk^2 under error feedback.
        column_weights: Cost of a squared error in each column, float32, shape (columns,). Only weighs columns
            against each other in the choice of their common ceiling.
        bits: Width of the codes, 2 to 8.

    Returns:
        The grid. An all-zero group gets the smallest scales.
    """
    half = 1 << (bits - 1)
    # Codes run from -half to half - 1; half - 0.5 lets the larger side clip by half a step at most.
    unclipped = target.abs().amax(dim=0) / (half - 0.5)
    low, high = _SCALE_RANGE[bits]
    step = math.log(high / low) / (_TRIAL_SCALES - 1)
    factors = torch.tensor([low * math.exp(step * trial) for trial in range(_TRIAL_SCALES)], device=target.device)
    trials = factors[:, None] * unclipped
    errors = torch.stack([_errors(target, scale, row_weights, half) for scale in trials])
    wanted = _at_least_error(trials, errors)

    units = (wanted.max() / 256 * torch.tensor(_UNIT_FACTORS, device=target.device)).clamp(
        _SMALLEST_UNIT, _LARGEST_UNIT
    )
    units = units.half().float()
    # Error of the two codes around the wanted scale, read off the table of trial errors.
    lower = ((wanted / units[:, None]).sqrt() - 1).floor().clamp(0, 15)
    candidates = torch.stack([lower, (lower + 1).clamp(max=15)])
    scales = units[:, None] * (candidates + 1).square()
    costs = _interpolate(errors, scales, trials[0], step).amin(dim=0)
    best_unit = units[(costs @ column_weights).argmin()]

    nearest = ((wanted / best_unit).sqrt() - 1).round()
    codes = torch.stack([(nearest + shift).clamp(0, 15) for shift in (-1, 0, 1)])
    ceiling = (best_unit * 256).half()
    scales = effective_scale(ceiling.expand(3), codes).float()
    exact = torch.stack([_errors(target, scale, row_weights, half) for scale in scales])
    chosen = _at_least_error(codes, exact)
    return GroupGrid(
        ceiling=ceiling,
        codes=chosen.to(torch.uint8),
        scales=effective_scale(ceiling, chosen).float(),
    )


def _at_least_error(values: Tensor, errors: Tensor) -> Tensor:
    # Per column the (larger) value with the least error. Values are not negative. Much faster than argmin and gather.
    return torch.where(errors == errors.amin(dim=0), values, 0).amax(dim=0)


def _errors(target: Tensor, scales: Tensor, row_weights: Tensor, half: int) -> Tensor:
    # Weighted squared rounding error of every column, shape (columns,).
    inverse = torch.where(scales > 0, 1 / scales, 0)
    errors = torch.empty_like(scales)
    for first in range(0, target.shape[1], _CHUNK_COLUMNS):
        columns = slice(first, first + _CHUNK_COLUMNS)
        part = target[:, columns]
        rounded = (part * inverse[columns]).round_().clamp_(-half, half - 1)
        rounded.mul_(scales[columns]).sub_(part).square_()
        torch.mv(rounded.T, row_weights, out=errors[columns])
    return errors


def _interpolate(errors: Tensor, scales: Tensor, lowest: Tensor, step: float) -> Tensor:
    # errors: (trials, columns) at log-spaced scales from `lowest`; read linearly at `scales` (..., columns).
    # Above the table nothing is clipped any more and the error grows with the square of the scale. Below it clipping
    # takes over, and a steep growth with the distance keeps such scales from being chosen.
    last = errors.shape[0] - 1
    position = (scales / lowest.clamp(min=torch.finfo(torch.float32).tiny)).log() / step
    inside = position.clamp(0, last)
    below = inside.floor().clamp(max=last - 1)
    fraction = inside - below
    index = below.long()
    table = errors.expand(*scales.shape[:-2], *errors.shape) if scales.dim() > 2 else errors
    value = torch.gather(table, -2, index).mul_(1 - fraction)
    value.add_(torch.gather(table, -2, index + 1).mul_(fraction))
    above = (position - last).clamp(min=0, max=100)  # of a column of zeros it would be infinite
    below_table = (-position).clamp(min=0)
    return value.mul_((2 * step * above).exp()).mul_((1 + below_table).square())
