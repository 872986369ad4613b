"""Averages with standard errors that take the rows, not their tokens, as independent."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

__all__ = ["Estimate", "mean_over_rows"]


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
