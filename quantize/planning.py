"""What every size would cost, before anything is quantized: plans from the smallest to the largest, in both formats."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..convert.exl2.plan.plan import Plan, bpw_range, make_plan, measured_limit
from ..convert.exl2.plan.problem import HeadBits, WidthOverride
from ..convert.exl2.plan.unquantized import FLOAT16_BITS
from ..convert.format import LinearCost
from ..convert.gguf.plan import make_type_plan, size_range
from ..measure.measurement import Measurement

__all__ = ["PlanPoint", "exl2_points", "gguf_points", "plan_costs"]

_STEP_BPW = 0.25
"""Distance of the plans, in bits per weight."""

_HIGHEST_GGUF_BPW = 8.5
"""Q8_0: above it the damage is below what evaluation can see."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPoint:
    """One plan.

    Attributes:
        bpw: As asked for with ``--bpw``: EXL2, of the decoder; GGUF, of all tensors.
        stored_bytes: Size of all tensors together, metadata and tokenizer excluded.
        damage_nats: Predicted damage, nats per token.
        shares: Share of the planned weights at each width (``4 bits``) or in each type (``Q4_K``), the largest first.
        costs: Bits and damage of every linear.
    """

    bpw: float
    stored_bytes: int
    damage_nats: float
    shares: dict[str, float]
    costs: tuple[LinearCost, ...]


def exl2_points(
    measurement: Measurement,
    head_bits: HeadBits,
    overrides: Sequence[WidthOverride] = (),
    keep_fp16: Sequence[str] = (),
) -> list[PlanPoint]:
    """Return EXL2 plans in steps of a quarter bit, the smallest first.

    Args:
        measurement: The measured curves.
        head_bits: Bits of the output head, as ``make_plan`` takes them.
        overrides: As ``make_plan`` takes them.
        keep_fp16: As ``make_plan`` takes them.

    Raises:
        ConfigError: As ``make_plan``.
    """
    lowest, highest = bpw_range(measurement, head_bits, overrides, keep_fp16)
    beside = measured_limit(measurement, 0)
    points = []
    for bpw in _steps(lowest, highest):
        plan = make_plan(measurement, bpw=bpw, head_bits=head_bits, overrides=overrides, keep_fp16=keep_fp16)
        head_bytes = plan.head.stored_bits // 8 if plan.head else beside.float16_head_bytes
        points.append(
            PlanPoint(
                bpw=bpw,
                stored_bytes=plan.decoder_bits // 8 + head_bytes + beside.other_bytes,
                damage_nats=plan.damage_nats,
                shares={f"{bits} bits": share for bits, share in plan.weights_per_width().items()},
                costs=plan_costs(plan),
            )
        )
    return points


def plan_costs(plan: Plan) -> tuple[LinearCost, ...]:
    """Return what every linear gets and is expected to cost: those in float16 nothing; the head, if it is quantized."""
    costs = [LinearCost(linear.name, linear.bpw, linear.damage_nats) for linear in plan.linears]
    costs += [LinearCost(linear.name, float(FLOAT16_BITS), 0.0) for linear in plan.kept]
    costs.sort(key=lambda cost: -1 if cost.block is None else cost.block)
    return (*costs, *([LinearCost(plan.head.name, plan.head.bpw, plan.head.damage_nats)] if plan.head else []))


def gguf_points(measurement: Measurement) -> list[PlanPoint]:
    """Return GGUF plans in steps of a quarter bit, the smallest first; none where no types were measured."""
    if not measurement.types:
        return []
    least, most = size_range(measurement)
    weights = make_type_plan(measurement, tensor_bytes=most).weights
    points = []
    for bpw in _steps(8 * least / weights, min(_HIGHEST_GGUF_BPW, 8 * most / weights)):
        plan = make_type_plan(measurement, bpw=bpw)
        points.append(
            PlanPoint(
                bpw=bpw,
                stored_bytes=plan.stored_bytes,
                damage_nats=plan.damage_nats,
                shares=plan.weights_per_type(),
                costs=tuple(
                    LinearCost(tensor.name, tensor.kind.bits_per_weight, tensor.damage_nats) for tensor in plan.tensors
                ),
            )
        )
    return points


def _steps(lowest: float, highest: float) -> Iterator[float]:
    first = np.ceil(lowest / _STEP_BPW)
    yield from (float(step * _STEP_BPW) for step in np.arange(first, np.floor(highest / _STEP_BPW) + 1))
