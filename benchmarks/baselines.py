"""What to compare with: plans of uniform widths, and rounding to nearest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from bpwise.convert.exl2.file.layout import WIDTHS, RowGroup, group_rows, linear_bits, padded_columns
from bpwise.convert.exl2.plan.measured import exl2_curves
from bpwise.convert.exl2.plan.plan import Exl2Plan, LinearPlan
from bpwise.convert.exl2.rounding.feedback import round_linear
from bpwise.errors import BudgetError
from bpwise.measure.measurement import MeasuredLinear, Measurement
from torch import Tensor

__all__ = ["Widths", "round_to_nearest", "uniform_plan"]


@dataclass(slots=True)
class Widths:
    """Row groups of one linear while its widths are being chosen.

    Attributes:
        linear: The linear.
        rows: Rows of each group, in the order in which the groups are cut.
        bits: Width of each group.
    """

    linear: MeasuredLinear
    rows: list[int]
    bits: list[int]

    @property
    def stored_bits(self) -> int:
        """Stored size in bits, overheads included."""
        return linear_bits(self.linear.out_features, map(RowGroup, self.bits, self.rows))


def _budget_bits(measurement: Measurement, bpw: float) -> int:
    """Return the bits that all linears of the decoder may take together, overheads included."""
    return int(bpw * sum(linear.in_features * linear.out_features for linear in measurement.linears))


def uniform_plan(measurement: Measurement, bpw: float, head_bits: int) -> Exl2Plan:
    """Give every linear the same share of rows at each of two neighbouring widths, the wider rows first.

    Args:
        measurement: Gives the linears, and the rows of a group.
        bpw: Decoder bits per weight, overheads included; met from below.
        head_bits: Width of the head.

    Returns:
        The plan, without predictions, less than one row group's widening below the target.

    Raises:
        BudgetError: Not even the smallest width fits.
    """
    budget, group_size = _budget_bits(measurement, bpw), exl2_curves(measurement).group_size
    for bits in WIDTHS:
        plan = [_uniform(linear, group_size, bits) for linear in measurement.linears]
        if sum(widths.stored_bits for widths in plan) <= budget:
            _spend(plan, budget)
            return _plan_of(measurement, [*plan, _uniform(measurement.head, group_size, head_bits)], bpw, head_bits)
    raise BudgetError(f"{bpw:g} bits per weight: too few for uniform widths on this model. Ask for more.")


def _spend(plan: Sequence[Widths], budget: int) -> None:
    """Widen row groups in place by one width each, as far as the budget goes.

    The narrowest groups come first, and among equals the first groups of all linears, so that the share of widened
    rows grows evenly over the model.

    Args:
        plan: The groups of all linears.
        budget: Bits that all of them may take, overheads included.
    """
    left = budget - sum(widths.stored_bits for widths in plan)
    candidates = sorted(
        (bits, (group + 1) / len(widths.bits), index, group)
        for index, widths in enumerate(plan)
        for group, bits in enumerate(widths.bits)
        if bits != WIDTHS[0]
    )
    for bits, _, index, group in candidates:
        wider = WIDTHS[WIDTHS.index(bits) - 1]
        widths = plan[index]
        cost = widths.rows[group] * padded_columns(widths.linear.out_features) * (wider - bits)
        if cost <= left:
            widths.bits[group] = wider
            left -= cost


def _plan_of(measurement: Measurement, chosen: Sequence[Widths], bpw: float, head_bits: int) -> Exl2Plan:
    *linears, head = map(_linear_plan, chosen)
    return Exl2Plan(
        linears=tuple(linears),
        head=head,
        target_bpw=bpw,
        head_bits=head_bits,
        lower_bound_nats=math.nan,
        measurement=measurement.fingerprint,
    )


def _linear_plan(widths: Widths) -> LinearPlan:
    return LinearPlan(
        name=widths.linear.name,
        in_features=widths.linear.in_features,
        out_features=widths.linear.out_features,
        group_rows=tuple(widths.rows),
        group_bits=tuple(widths.bits),
        damage_nats=math.nan,
    )


def round_to_nearest(weight: Tensor, plan: LinearPlan, device: torch.device) -> Tensor:
    """Round a weight on the searched grid, in natural row order, no error fed back and nothing weighted.

    Args:
        weight: Shape (out, in), any floating dtype.
        plan: Its row groups.
        device: Where to compute.

    Returns:
        The decoded weight, float16, shape (out, in), on the CPU.
    """
    rows = weight.shape[1]
    linear, _ = round_linear(
        weight.to(device, torch.float32).T,
        torch.eye(rows, device=device),
        plan.stored_groups,
        torch.arange(rows, device=device),
        torch.ones(weight.shape[0], device=device),
    )
    linear.validate(plan.name)
    return linear.dequantize().cpu()


def _uniform(linear: MeasuredLinear, group_size: int, bits: int) -> Widths:
    rows = group_rows(linear.in_features, group_size)
    return Widths(linear, rows, [bits] * len(rows))
