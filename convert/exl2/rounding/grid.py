"""The EXL2 grid of one row group: which largest scale and which scale codes cost least.

A column's scale in a group is ``fp16((code + 1)^2 * unit)`` with a 4-bit code and a unit shared by all columns of
the group (``fp16(max_scale / 256)``). Adjacent codes differ by 13 % at the top and by a factor of four at the bottom;
the unit is coarse where it is subnormal, so the search runs against the scales that a reader will really compute.

Notes:
    With q_kn = clamp(round(w_kn / s), -2^(b-1), 2^(b-1) - 1) the error of column n at scale s and width b is
    ``E_n(s) = sum_k (w_kn - s q_kn)^2 R_kk^2``. The group's unit u, and with it ``max_scale = 256 u``, minimises
    ``sum_n F_n min_c E_n((c + 1)^2 u)``; then every column takes its best code c, 0 to 15. Weights R_kk^2 are what
    an error costs under feedback (see ``feedback``); F_n is the Fisher weight of the column.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..file.linear import effective_scale

__all__ = ["GroupGrid", "WidthTables", "search_grids"]

_CHUNK_ELEMENTS = 1 << 19
"""Trial errors computed at a time: few enough to stay in the processor's second-level cache."""

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
_LARGEST_UNIT = 65504.0 / 256
"""At codes of one step: the largest scale is 256 units, and readers multiply it by up to 2^(bits - 1) in float16."""


@dataclass(frozen=True, slots=True, eq=False)
class GroupGrid:
    """Chosen scales of one row group.

    Attributes:
        max_scale: ``q_scale_max``, float16, shape ().
        codes: Scale codes 0 to 15, uint8, shape (columns,).
        scales: The scales that a reader computes from the two, float32, shape (columns,).
    """

    max_scale: Tensor
    codes: Tensor
    scales: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class WidthTables:
    """Constants of a search, on the device of the weights.

    Made once a linear, not once a group: a GPU ends all its work before it takes a copy from the host.

    Attributes:
        bits: The widths, 2 to 8 bits.
        halves: ``2^(bits - 1)`` of each, int64, shape (S, 1): codes run from -half to half - 1.
        logs: Logarithms of the ends of each one's ``_SCALE_RANGE``, float32, shape (S, 2).
        units: ``_UNIT_FACTORS``, float32, shape (units, 1).
        limits: The smallest and the largest unit of each, float32, shape (2, S).
    """

    bits: tuple[int, ...]
    halves: Tensor
    logs: Tensor
    units: Tensor
    limits: Tensor

    @classmethod
    def of(cls, bits: Sequence[int], device: torch.device) -> WidthTables:
        """Return those of some widths."""
        logs = [[math.log(end) for end in _SCALE_RANGE[each]] for each in bits]
        return cls(
            bits=tuple(bits),
            halves=torch.tensor([1 << (each - 1) for each in bits], device=device)[:, None],
            logs=torch.tensor(logs, device=device),
            units=torch.tensor(_UNIT_FACTORS, device=device)[:, None],
            limits=torch.tensor([[_SMALLEST_UNIT, _LARGEST_UNIT / (1 << (each - 1))] for each in bits]).T.to(device),
        )

    def only(self, bits: int) -> WidthTables:
        """Return those of one of the widths; nothing is copied."""
        place = self.bits.index(bits)
        here = slice(place, place + 1)
        return WidthTables((bits,), self.halves[here], self.logs[here], self.units, self.limits[:, here])


def search_grids(targets: Tensor, row_weights: Tensor, column_weights: Tensor, widths: WidthTables) -> list[GroupGrid]:
    """Choose largest scale and scale codes that minimise the weighted squared rounding error of row groups.

    Args:
        targets: Weights to represent, groups of one shape, float32, shape (targets, rows, columns).
        row_weights: Cost of a squared error in each row, float32, shape (rows,), common to all targets; R_kk^2
            under error feedback.
        column_weights: Cost of a squared error in each column, float32, shape (columns,), common to all. Only weighs
            columns against each other in the choice of their common largest scale.
        widths: Width of each target's codes.

    Returns:
        One grid for each target. An all-zero group gets the smallest scales.
    """
    # Dimensions: trials or units first, then targets (S), then columns (N).
    # Codes run from -half to half - 1; half - 0.5 lets the larger side clip by half a step at most.
    unclipped = targets.abs().amax(dim=1) / (widths.halves - 0.5)
    logs = widths.logs
    step = (logs[:, 1:] - logs[:, :1]) / (_TRIAL_SCALES - 1)  # (S, 1)
    factors = (logs[:, :1] + step * torch.arange(_TRIAL_SCALES, device=targets.device)[:, None, None]).exp()
    trials = factors * unclipped
    errors = _errors(targets, trials, row_weights, widths.bits)
    wanted = _at_least_error(trials, errors)

    units = (wanted.amax(dim=1) / 256 * widths.units).clamp(*widths.limits).half().float()
    # Error of the two codes around the wanted scale, read off the table of trial errors.
    lower = ((wanted / units[:, :, None]).sqrt() - 1).floor().clamp(0, 15)
    candidates = torch.stack([lower, (lower + 1).clamp(max=15)])
    scales = units[:, :, None] * (candidates + 1).square()
    costs = _interpolate(errors, scales.flatten(0, 1), trials[0], step).view(scales.shape).amin(dim=0)
    best_unit = units.gather(0, (costs @ column_weights).argmin(dim=0, keepdim=True))[0]

    nearest = ((wanted / best_unit[:, None]).sqrt() - 1).round()
    codes = torch.stack([(nearest + shift).clamp(0, 15) for shift in (-1, 0, 1)])
    max_scales = (best_unit * 256).half()
    chosen = _at_least_error(
        codes, _errors(targets, effective_scale(max_scales, codes).float(), row_weights, widths.bits)
    )
    scales = effective_scale(max_scales, chosen).float()
    return [GroupGrid(*parts) for parts in zip(max_scales, chosen.to(torch.uint8), scales, strict=True)]


def _at_least_error(values: Tensor, errors: Tensor) -> Tensor:
    # Per column the (larger) value with the least error. Values are not negative. Much faster than argmin and gather.
    return torch.where(errors == errors.amin(dim=0), values, 0).amax(dim=0)


def _errors(targets: Tensor, scales: Tensor, row_weights: Tensor, widths: Sequence[int]) -> Tensor:
    # Weighted squared rounding error of every column at every scale: scales and result are (trials, S, N).
    inverse = torch.where(scales > 0, 1 / scales, 0)
    errors = torch.empty_like(scales)
    columns_at_once = max(1, _CHUNK_ELEMENTS // (scales.shape[0] * targets.shape[0] * targets.shape[1]))
    for first in range(0, targets.shape[2], columns_at_once):
        columns = slice(first, first + columns_at_once)
        part = targets[:, :, columns]
        rounded = (part * inverse[:, :, None, columns]).round_()
        for bits, of_width in zip(widths, rounded.unbind(1), strict=True):  # much faster than limits in a tensor
            of_width.clamp_(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        rounded.mul_(scales[:, :, None, columns]).sub_(part).square_()
        errors[:, :, columns] = row_weights @ rounded
    return errors


def _interpolate(errors: Tensor, scales: Tensor, lowest: Tensor, step: Tensor) -> Tensor:
    # errors: (trials, S, N) at log-spaced scales from `lowest`; read linearly at `scales` (any, S, N).
    # Above the table nothing is clipped any more and the error grows with the square of the scale. Below it clipping
    # takes over, and a steep growth with the distance keeps such scales from being chosen.
    last = errors.shape[0] - 1
    position = (scales / lowest.clamp(min=torch.finfo(torch.float32).tiny)).log() / step
    inside = position.clamp(0, last)
    below = inside.floor().clamp(max=last - 1)
    fraction = inside - below
    index = below.long()
    value = torch.gather(errors, 0, index).mul_(1 - fraction)
    value.add_(torch.gather(errors, 0, index + 1).mul_(fraction))
    above = (position - last).clamp(min=0, max=100)  # of a column of zeros it would be infinite
    below_table = (-position).clamp(min=0)
    return value.mul_((2 * step * above).exp()).mul_((1 + below_table).square())
