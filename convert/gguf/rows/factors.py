"""Factors of rows: what a converter multiplied the outputs of a linear with, found from the values.

Falcon-H1 scales keys, gates and the like by constants, and llama.cpp's converter multiplies them into the matrices.
Every value says between which bounds the factor of its row lies, since it was rounded after the multiplication; a row
has one factor if some number is within the bounds of all its values. Neighbouring rows share one as long as they can.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["row_factors"]

_FLOAT32_ERROR = 1e-6
"""Of a product of a few factors, each step rounded, relative."""

_PIECE_VALUES = 1 << 22

Factors = NDArray[np.float32]
Bounds = NDArray[np.float64]


def row_factors(values: Tensor, weight: Tensor) -> Factors | None:
    """Return what a weight's rows were multiplied with, one number a row; None if that is not what the values are.

    Args:
        values: The rows as they are stored, each value off by one unit in the last place at most, shape (rows, K).
        weight: The weight, floating point, shape (rows, K).

    Returns:
        Factors, neither 0 nor infinite, shape (rows,); 1 where all are zeros.
    """
    step = max(1, _PIECE_VALUES // values.shape[1])
    least, most = [], []
    for stored, original in zip(values.split(step), weight.split(step), strict=True):
        low, high = _bounds(stored, original)
        one = (low <= high) & ((low > 0) | (high < 0)) & low.isfinite() & high.isfinite()
        any_does = (low == -torch.inf) & (high == torch.inf)
        if not bool((one | any_does).all()):
            return None
        least.append(low.numpy())
        most.append(high.numpy())
    return _shared(np.concatenate(least), np.concatenate(most))


def _bounds(values: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    # Between which numbers the factor of every row lies, float64, shape (rows,); without bounds where all are zeros.
    limits = torch.finfo(values.dtype)
    relative = limits.eps if values.dtype.itemsize == 2 else _FLOAT32_ERROR
    sign = torch.where(weight < 0, -1.0, 1.0).double()
    stored, size = values.double() * sign, weight.double().abs()
    error = relative * stored.abs() + limits.smallest_normal * limits.eps
    # A weight of zero bounds nothing if it is zero in the file too; otherwise only infinity would do.
    return ((stored - error) / size).amax(1), ((stored + error) / size).amin(1)


def _shared(least: Bounds, most: Bounds) -> Factors:
    # The middle of what the bounds of a run of rows have in common, as long as runs can be.
    factors = np.ones(len(least), dtype=np.float32)
    first, low, high = 0, -np.inf, np.inf
    for row, (next_low, next_high) in enumerate(zip([*least, np.inf], [*most, -np.inf], strict=True)):
        if max(low, next_low) > min(high, next_high):
            factors[first:row] = (low + high) / 2 if np.isfinite(low) else 1.0
            first, low, high = row, next_low, next_high
        low, high = max(low, next_low), min(high, next_high)
    return factors
