"""Averages with standard errors that take the rows, not their tokens, as independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["CONFIDENCE", "Estimate", "Interval", "confidence_interval", "mean_over_rows"]

CONFIDENCE = 0.95
"""Probability with which intervals hold the true value: the usual choice."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number and how far it may be off, both in the same unit.

    Attributes:
        value: The number.
        standard_error: Its standard error; None where a single row leaves it unknown.
    """

    value: float
    standard_error: float | None

    def scaled(self, value: float, slope: float) -> Estimate:
        """Return a smooth function of this estimate by the delta method.

        Args:
            value: The function's value there.
            slope: Its derivative there.
        """
        error = self.standard_error
        return Estimate(value, None if error is None else abs(slope) * error)


@dataclass(frozen=True, slots=True)
class Interval:
    """Where a number probably lies.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether zero lies outside, so that the sign of the number is known."""
        return self.low > 0 or self.high < 0


def mean_over_rows(values: Tensor) -> Estimate:
    """Average over all tokens, with a standard error clustered by row.

    The tokens of a row share a topic and a style, so they are correlated, and counting them as independent would give
    a standard error that is several times too small. Rows come from different places: the standard error is the
    sample standard deviation of the row means over the square root of the number of rows.

    Args:
        values: One number a token, shape (rows, tokens), any real dtype; at least one row and one token.
    """
    means = values.double().mean(dim=1)
    rows = len(means)
    error = float(means.std(correction=1)) / math.sqrt(rows) if rows > 1 else None
    return Estimate(float(means.mean()), error)


def confidence_interval(estimate: Estimate, rows: int) -> Interval | None:
    """Return the interval that holds the true value with 95 % probability, by Student's t over the rows.

    Args:
        estimate: An average over rows with its standard error.
        rows: Number of rows behind it.

    Returns:
        The interval, or None where a single row leaves it unknown.
    """
    if estimate.standard_error is None:
        return None
    reach = _student_quantile(rows - 1) * estimate.standard_error
    return Interval(estimate.value - reach, estimate.value + reach)


def _student_quantile(degrees: int) -> float:
    # |t| stays below it with probability CONFIDENCE. Bisection in the angle atan(t / sqrt(degrees)), where all is tame.
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _student_probability(middle, degrees) < CONFIDENCE else (low, middle)
    return math.tan(low) * math.sqrt(degrees)


def _student_probability(angle: float, degrees: int) -> float:
    # P(|t| < tan(angle) sqrt(degrees)): Abramowitz and Stegun, 26.7.3 for odd degrees of freedom and 26.7.4 for even.
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = cosine if odd else 1.0, 0.0
    for step in range(1 + odd, degrees, 2):
        total += term
        term *= cosine * cosine * step / (step + 1)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
