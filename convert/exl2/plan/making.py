"""Making EXL2 plans from a measurement alone, in a second."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ....linalg.allocate import allocate
from ....measure.measurement import MeasuredLinear, Measurement
from ..file.layout import RowGroup, group_rows, linear_bits, padded_columns
from .measured import Exl2Measured, exl2_curves
from .plan import Exl2Plan, LinearPlan
from .problem import AllocationProblem, HeadBits, SizeLimit, WidthOverride, allocation_problem
from .unquantized import FLOAT16_BITS

__all__ = ["exl2_bpw_range", "make_exl2_plan", "measured_limit"]

_FLOAT16_BYTES = 2


def make_exl2_plan(
    measurement: Measurement,
    *,
    bpw: float | None = None,
    size: SizeLimit | None = None,
    head_bits: HeadBits,
    overrides: Sequence[WidthOverride] = (),
    keep_fp16: Sequence[str] = (),
) -> Exl2Plan:
    """Allocate bits to every row group of the decoder and of the head.

    Args:
        measurement: The measured curves.
        bpw: Decoder bits per weight, overheads included, and 16 for each weight in float16; met from below, never
            exceeded. With ``AUTO`` those of decoder and head together.
        size: The same as a size of the whole model; one of the two is given.
        head_bits: Bits of the output head: 2, 3, 4, 5, 6 or 8, as large as if all its codes had that width, though its
            groups may have others; 16 for unquantized; ``AUTO`` to let it share the decoder's budget.
        overrides: Widths that linears may have; of several that match, the last. Those of the head go before
            ``head_bits``.
        keep_fp16: Shell patterns of linears that stay in float16: whole attention blocks, whole MLPs, or the head. What
            EXL2 cannot hold stays so anyway.

    Returns:
        The plan of least predicted damage.

    Raises:
        ConfigError: As ``allocation_problem``.
        BudgetError: No plan has this size; the message gives the range that there is.
    """
    assert (bpw is None) != (size is None), "one target"
    curves = exl2_curves(measurement)
    measured = {linear.name: linear for linear in (*measurement.linears, measurement.head)}
    problem = _problem(measurement, curves.group_size, head_bits, overrides, keep_fp16)
    budget = problem.budget_bits(bpw) if bpw is not None else 0
    if size is not None:
        budget = problem.budget_bits_within(size)
        bpw = math.floor(budget / problem.weights * 1e4) / 1e4
    assert bpw is not None
    linears = [measured[linear.name] for linear in problem.quantized]
    if problem.head_shares_budget:
        linears.append(measurement.head)
    plans, lower_bound = _allocated(linears, curves, problem, budget - problem.unquantized_bits)
    if problem.head is not None and not problem.head_shares_budget:
        head_plans, head_bound = _allocated([measurement.head], curves, problem, problem.head_alone_bits)
        plans, lower_bound = [*plans, *head_plans], lower_bound + head_bound
    count = len(problem.quantized)
    beside = measured_limit(measurement, 0)
    return Exl2Plan(
        linears=tuple(plans[:count]),
        head=plans[count] if len(plans) > count else None,
        target_bpw=bpw,
        head_bits=head_bits,
        lower_bound_nats=lower_bound,
        measurement=measurement.fingerprint,
        unquantized=problem.unquantized,
        head_reason=problem.head_reason,
        other_bytes=beside.other_bytes + (beside.float16_head_bytes if problem.head is None else 0),
    )


def _allocated(
    linears: Sequence[MeasuredLinear], curves: Exl2Measured, problem: AllocationProblem, budget_bits: int
) -> tuple[list[LinearPlan], float]:
    # The linears' plans within a common budget, overheads included, and a lower bound of their damage.
    rows = [group_rows(linear.in_features, curves.group_size) for linear in linears]
    overhead = sum(
        linear_bits(linear.out_features, [RowGroup(0, n) for n in counts])
        for linear, counts in zip(linears, rows, strict=True)
    )
    columns = np.concatenate(
        [
            np.asarray(counts, dtype=np.int64) * padded_columns(linear.out_features)
            for linear, counts in zip(linears, rows, strict=True)
        ]
    )
    allowed = [np.isin(curves.widths, problem.widths[linear.name]) for linear in linears]
    damages = [np.where(a, curves.damage_nats(x.name), np.inf) for x, a in zip(linears, allowed, strict=True)]
    solved = allocate(
        np.concatenate(damages).astype(np.float64),
        columns[:, None] * np.asarray(curves.widths, dtype=np.int64),
        budget_bits - overhead,
    )
    plans = []
    first = 0
    for linear, counts in zip(linears, rows, strict=True):
        choice = solved.choice[first : first + len(counts)]
        damage = curves.damage_nats(linear.name)[np.arange(len(choice)), choice].sum(dtype=np.float64)
        plans.append(
            LinearPlan(
                name=linear.name,
                in_features=linear.in_features,
                out_features=linear.out_features,
                group_rows=tuple(counts),
                group_bits=tuple(curves.widths[option] for option in choice),
                damage_nats=float(damage),
            )
        )
        first += len(counts)
    return plans, solved.lower_bound


def exl2_bpw_range(
    measurement: Measurement,
    head_bits: HeadBits = FLOAT16_BITS,
    overrides: Sequence[WidthOverride] = (),
    keep_fp16: Sequence[str] = (),
) -> tuple[float, float]:
    """Return the smallest and the largest bits per weight that a plan from a measurement can have.

    Args:
        measurement: The measurement.
        head_bits: With ``AUTO`` the head counts too, otherwise only the decoder.
        overrides: As in ``make_exl2_plan``.
        keep_fp16: As in ``make_exl2_plan``.
    """
    group_size = exl2_curves(measurement).group_size
    return _problem(measurement, group_size, head_bits, overrides, keep_fp16).bpw_range


def measured_limit(measurement: Measurement, max_bytes: int) -> SizeLimit:
    """Return the limit of all tensors, without their files' headers, as far as a measurement tells.

    Args:
        measurement: Says how many weights there are beside the linears; they are counted at 2 bytes, though those of a
            float32 checkpoint are carried over in float32.
        max_bytes: Largest size.
    """
    table, head = measurement.embedding, measurement.head
    return SizeLimit(
        total_bytes=max_bytes,
        other_bytes=_FLOAT16_BYTES * (table.tokens * table.hidden_size + measurement.other_weights),
        float16_head_bytes=0 if table.tied else _FLOAT16_BYTES * head.in_features * head.out_features,
    )


def _problem(
    measurement: Measurement,
    group_size: int,
    head_bits: HeadBits,
    overrides: Sequence[WidthOverride],
    keep_fp16: Sequence[str],
) -> AllocationProblem:
    return allocation_problem(
        measurement.linears,
        measurement.head,
        group_size=group_size,
        head_bits=head_bits,
        overrides=overrides,
        keep_fp16=keep_fp16,
    )
