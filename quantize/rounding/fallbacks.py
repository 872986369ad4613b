"""Linears that were rounded with more damping than was measured, or without error feedback."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ...measure.measurement import Measurement

__all__ = ["damping_fallbacks", "fallback_entries", "fallback_lines"]

_LEAST_RAISE = 1.001
"""Dampings that differ by less are the same, read back from float32."""


def damping_fallbacks(measurement: Measurement, dampings: Mapping[str, float]) -> dict[str, float]:
    """Return the linears whose Gram matrix could not be factored with the measured damping.

    Args:
        measurement: Gives the measured dampings.
        dampings: Relative damping that each rounded linear took, by name; infinite without error feedback.

    Returns:
        Of these linears, in model order, the damping that was taken.
    """
    return {
        linear.name: dampings[linear.name]
        for linear in (*measurement.linears, measurement.head)
        if linear.name in dampings
        and (math.isinf(dampings[linear.name]) or dampings[linear.name] > _LEAST_RAISE * linear.damping)
    }


def fallback_lines(fallbacks: Mapping[str, float]) -> list[str]:
    """Return the fallbacks as lines for a terminal."""
    return [f"fallback    {name}: {_words(damping)}" for name, damping in fallbacks.items()]


def fallback_entries(fallbacks: Mapping[str, float]) -> dict[str, str | float]:
    """Return what a report says of fallbacks: entry -> value; words where there is no number."""
    return {f"damping of {name}": _words(x) if math.isinf(x) else x for name, x in fallbacks.items()}


def _words(damping: float) -> str:
    return "rounded without error feedback" if math.isinf(damping) else f"damping raised to {damping:g}"
