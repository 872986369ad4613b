"""Plans of all sizes, from the smallest to the largest, before anything is quantized."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...convert.conversion import Target
from ...convert.format import Format
from ...convert.options import FormatOptions
from ...convert.plan import Plan
from ...convert.registry import format_asking, formats
from ...measure.measurement import Measurement

__all__ = ["PlanPoint", "make_plan", "plan_points"]

_STEP_BPW = 0.25
"""Distance of the plans, in bits per weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanPoint:
    """One plan.

    Attributes:
        bpw: As asked for with ``--bpw``.
        plan: What every linear or tensor would get.
        damage_nats: Predicted damage, nats per token.
    """

    bpw: float
    plan: Plan
    damage_nats: float


def make_plan(
    measurement: Measurement | str | Path,
    *,
    bpw: float | None = None,
    max_bytes: int | None = None,
    vram_bytes: int | None = None,
    context_tokens: int | None = None,
    options: FormatOptions | None = None,
) -> Plan:
    """Choose what every linear or tensor gets, from a measurement alone.

    Args:
        measurement: A measurement, or its file.
        bpw: Bits per weight, as the format counts them; met from below, never exceeded.
        max_bytes: The same as a size of the file or files in bytes, as far as a measurement tells.
        vram_bytes: Memory of a GPU that weights, cache and what the reader needs beside them should fit into; one of
            the three is given.
        context_tokens: With ``vram_bytes``: length of the context whose cache should fit; None for the model's own.
        options: The format's options, which choose the format too; None for the first format's defaults.

    Returns:
        The plan of least predicted damage.

    Raises:
        BudgetError: No plan has this size; the message gives the range that there is.
        ConfigError: Not exactly one size is given, the format was not measured, or options match nothing.

    Example:
        >>> from bpwise import make_plan
        >>> plan = make_plan("m.safetensors", bpw=4.0)
        >>> 3.9 < plan.bpw <= 4.0
        True
        >>> plan.save("plan.json")
    """
    options = options or next(iter(formats().values())).Options()
    measured = measurement if isinstance(measurement, Measurement) else Measurement.load(measurement)
    target = Target(bpw=bpw, max_bytes=max_bytes, vram_bytes=vram_bytes, context_tokens=context_tokens)
    format_ = format_asking(options)
    if vram_bytes is not None:
        room = vram_bytes - format_.beside_in_vram(measured, options, vram_bytes, context_tokens)
        max_bytes = format_.bytes_for_vram(measured, options, room)
    elif max_bytes is not None:
        max_bytes -= format_.overhead_bytes(measured)
    return format_.plan(measured, options, bpw=target.bpw, max_bytes=max_bytes)


def plan_points(format_: Format, measurement: Measurement, options: Any) -> list[PlanPoint]:
    """Return plans in steps of a quarter bit, the smallest first; none where the format was not measured.

    Args:
        format_: The format.
        measurement: The measured curves.
        options: The format's options.

    Raises:
        ConfigError: Options match nothing or contradict each other.
    """
    found = format_.bpw_range(measurement, options)
    points = []
    for bpw in _steps(*found) if found is not None else ():
        plan = format_.plan(measurement, options, bpw=bpw, max_bytes=None)
        assert plan.damage_nats is not None, "made from a measurement"
        points.append(PlanPoint(bpw=bpw, plan=plan, damage_nats=plan.damage_nats))
    return points


def _steps(lowest: float, highest: float) -> Iterator[float]:
    first = np.ceil(lowest / _STEP_BPW)
    yield from (float(step * _STEP_BPW) for step in np.arange(first, np.floor(highest / _STEP_BPW) + 1))
