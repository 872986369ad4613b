"""Finding the rows of tensors among the outputs of linears, by value.

Rows are compared in the type that the file stores them in, so that a file that was rounded to 16 bits is found as well.
Every row is hashed once on both sides; what the hashes say is checked bit for bit. A tensor whose rows are not found is
tried again with the values of each row sorted: if its columns were reordered, all rows have theirs in the same order.
At last it is tried as one linear whose rows were multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .factors import row_factors
from .rowmap import TensorRows

__all__ = ["LinearOutputs"]

_PIECE_BYTES = 16 << 20

Raw = NDArray[np.generic]
"""Bit patterns of rows, int16 or int32, shape (rows, K)."""


class LinearOutputs:
    """The outputs of some linears, of one block say, which tensors are then looked up in, one after another.

    Where rows are equal (padding, experts that were copied), those of linears go first that hold the most of the
    tensor's other rows, and each output to one row only as long as there are enough.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Hold the linears; nothing is hashed before it is needed.

        Args:
            weights: Weight of every linear by full name, floating point, shape (out, K), on the CPU. Of equal rows
                those of the first linear are taken first.
        """
        by_columns: dict[int, dict[str, Tensor]] = {}
        for name, weight in weights.items():
            by_columns.setdefault(weight.shape[1], {})[name] = weight
        self._by_columns = {columns: _Outputs(own) for columns, own in by_columns.items()}

    def find(self, values: Tensor) -> TensorRows | None:
        """Return which outputs the rows of a tensor are, its columns being in place; None if any row is none.

        Args:
            values: The tensor as it is stored, shape (..., rows, K).
        """
        outputs = self._by_columns.get(values.shape[-1])
        return None if outputs is None else outputs.find(values.flatten(0, -2))

    def find_reordered(self, values: Tensor) -> TensorRows | None:
        """Return the same for a tensor whose columns were reordered; only linears that hold no row yet are looked at.

        Args:
            values: As for ``find``, which returned None.
        """
        outputs = self._by_columns.get(values.shape[-1])
        return None if outputs is None else outputs.find_reordered(values.flatten(0, -2))

    def find_scaled(self, values: Tensor) -> TensorRows | None:
        """Return the same for a linear's outputs, all in place, times a factor each; no linear that holds a row yet.

        Args:
            values: As for ``find``, which returned None, as ``find_reordered`` did.
        """
        outputs = self._by_columns.get(values.shape[-1])
        return None if outputs is None else outputs.find_scaled(values.flatten(0, -2))


class _Outputs:
    """Outputs with the same number of input channels, numbered through."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self._names = list(weights)
        self._weights = list(weights.values())
        self._starts = np.cumsum([0, *(len(weight) for weight in self._weights)])
        self._used = np.zeros(self._starts[-1], dtype=bool)
        self._hashes: dict[torch.dtype, NDArray[np.int64]] = {}

    def find(self, values: Tensor) -> TensorRows | None:
        if values.dtype not in self._hashes:
            self._hashes[values.dtype] = np.concatenate([_hashes(_raw(x, values.dtype)) for x in self._weights])
        raw = _raw(values, values.dtype)
        numbers = self._numbers(_hashes(raw), self._hashes[values.dtype])
        if numbers is None or not np.array_equal(self._built(numbers, values.dtype), raw):
            return None
        return self._taken(numbers, None)

    def find_reordered(self, values: Tensor) -> TensorRows | None:
        # Rows of linears that are there already cannot be meant: the hashes of theirs match nothing.
        hashes = np.zeros(len(self._used), dtype=np.int64)
        for index, weight in enumerate(self._weights):
            own = slice(self._starts[index], self._starts[index + 1])
            if not self._used[own].any():
                hashes[own] = _hashes(np.sort(_raw(weight, values.dtype), axis=1))
        raw = _raw(values, values.dtype)
        numbers = self._numbers(_hashes(np.sort(raw, axis=1)), hashes)
        if numbers is None or self._used[numbers].any():
            return None
        built = self._built(numbers, values.dtype)
        theirs, ours = (_hashes(np.ascontiguousarray(each.T)) for each in (raw, built))
        columns = np.empty(len(theirs), dtype=np.int64)
        columns[np.argsort(theirs, kind="stable")] = np.argsort(ours, kind="stable")
        if not np.array_equal(built[:, columns], raw):
            return None
        return self._taken(numbers, columns)

    def find_scaled(self, values: Tensor) -> TensorRows | None:
        for index, weight in enumerate(self._weights):
            numbers = np.arange(self._starts[index], self._starts[index + 1])
            if weight.shape != values.shape or self._used[numbers].any():
                continue
            factors = row_factors(values, weight)
            if factors is not None:
                return replace(self._taken(numbers, None), factors=factors)
        return None

    def _numbers(self, wanted: NDArray[np.int64], hashes: NDArray[np.int64]) -> NDArray[np.int64] | None:
        # The output with the hash of every row; None if there is none for one of them.
        order = np.argsort(hashes, kind="stable")
        rising = hashes[order]
        first, last = (np.searchsorted(rising, wanted, side=side) for side in ("left", "right"))
        if (first == last).any():
            return None
        numbers = order[first]
        several = last - first > 1
        taken = self._used.copy()
        taken[numbers[~several]] = True
        rows_of = np.bincount(self._linear_of(numbers[~several]), minlength=len(self._names))
        for row in np.flatnonzero(several):
            after = numbers[row - 1] + 1 if row else 0  # most often it goes on where the row before it was found
            if not (after < len(hashes) and hashes[after] == wanted[row] and not taken[after]):
                alike = order[first[row] : last[row]]
                after = alike[np.lexsort((alike, -rows_of[self._linear_of(alike)], taken[alike]))[0]]
            numbers[row] = after
            taken[after] = True
        return numbers

    def _built(self, numbers: NDArray[np.int64], dtype: torch.dtype) -> Raw:
        source = self._linear_of(numbers)
        built = np.empty((len(numbers), self._weights[0].shape[1]), dtype=np.int16 if dtype.itemsize == 2 else np.int32)
        for index in np.unique(source):
            rows = np.flatnonzero(source == index)
            built[rows] = _raw(self._weights[index], dtype)[numbers[rows] - self._starts[index]]
        return built

    def _taken(self, numbers: NDArray[np.int64], columns: NDArray[np.int64] | None) -> TensorRows:
        self._used[numbers] = True
        source = self._linear_of(numbers)
        return TensorRows.of(self._names, source, numbers - self._starts[source], columns)

    def _linear_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.searchsorted(self._starts, numbers, side="right") - 1


def _raw(values: Tensor, dtype: torch.dtype) -> Raw:
    stored = values.to(dtype).contiguous()
    raw: Raw = stored.view(torch.int16 if dtype.itemsize == 2 else torch.int32).numpy()
    return raw


def _hashes(rows: Raw) -> NDArray[np.int64]:
    size = rows.shape[1] * rows.itemsize
    step = max(1, _PIECE_BYTES // size)
    found: list[int] = []
    for first in range(0, len(rows), step):
        data = rows[first : first + step].tobytes()
        found += [hash(data[start : start + size]) for start in range(0, len(data), size)]
    return np.array(found, dtype=np.int64)
