"""Finding the rows of quantized tensors among the outputs of linears, by likeness: for files that others made.

A row that was rounded to four bits still points nearly where it did (a cosine of 0.98 and more), and two rows of a
model are nearly orthogonal, so the best likeness is never in doubt; what it says is held against all values. Rows that
are in place may be multiplied: they are where that leaves clearly less error.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .rowmap import TensorRows

__all__ = ["LikeOutputs"]

_MOST_ERROR = 0.5
"""Squared error of values relative to the linears' own squares: less than a sixth at two bits, about 2 at random."""

_SCALED_ERROR = 0.75
"""Most of the squared error of rows as they are that is left if they are multiplied; all of it where they are not."""

_COMPARED = 256
"""Columns, or rows, that likeness is taken over."""

_COMPARED_ROWS = 8
"""Rows that tell linears of one shape apart."""

_CHUNK_ROWS = 2048

_MOST_PAIRS = 1 << 33
"""Rows times outputs that are compared each with each; no converter reorders a vocabulary."""

Factors = NDArray[np.float32]

Picked = tuple[NDArray[np.int64], NDArray[np.int64]]
"""Index of a linear and an output of it, for every row of a matrix."""


class LikeOutputs:
    """The outputs of some linears, of one block say, which tensors are looked up in, one after another."""

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        """Hold the linears.

        Args:
            weights: Weight of every linear by full name, floating point, shape (out, K), on the CPU.
        """
        self._names = list(weights)
        self._weights = list(weights.values())
        self._used: set[int] = set()

    def find(self, values: Tensor) -> TensorRows | None:
        """Return which outputs the rows of a tensor are; None if that is not clear.

        Args:
            values: The decoded tensor, floating point, shape (..., rows, K).
        """
        matrices = values.float().reshape(-1, *values.shape[-2:])
        picked: list[Picked] = []
        factors: list[Factors | None] = []
        columns = None
        for matrix in matrices:
            rows, own = self._in_place(matrix)
            rows = rows or self._by_rows(matrix)
            if rows is None and len(matrices) == 1:
                rows, columns = self._by_columns(matrix)
            if rows is None:
                return None
            self._used |= set(rows[0].tolist())
            picked.append(rows)
            factors.append(own)
        source, output = (np.concatenate(each) for each in zip(*picked, strict=True))
        return TensorRows.of(self._names, source, output, columns, _joined(factors, len(matrices[0])))

    def _of_shape(self, matrix: Tensor) -> Iterator[int]:
        # Linears of a matrix's shape; those that no other tensor holds first.
        found = [index for index, weight in enumerate(self._weights) if weight.shape == matrix.shape]
        yield from sorted(found, key=lambda index: index in self._used)

    def _in_place(self, matrix: Tensor) -> tuple[Picked | None, Factors | None]:
        rows = np.linspace(0, len(matrix) - 1, min(len(matrix), _COMPARED_ROWS)).astype(np.int64)
        found = list(self._of_shape(matrix))
        if not found:
            return None, None
        likeness = [float(_cosines(matrix[rows], self._weights[index][rows].float()).abs().mean()) for index in found]
        best = found[int(np.argmax(likeness))]
        factors = _factors(matrix, self._weights[best])
        plain, scaled = _error(matrix, self._weights[best]), _error(matrix, self._weights[best], factors)
        if min(plain, scaled) > _MOST_ERROR:
            return None, None
        picked = np.full(len(matrix), best), np.arange(len(matrix))
        return picked, factors.numpy() if scaled < _SCALED_ERROR * plain else None

    def _by_rows(self, matrix: Tensor) -> Picked | None:
        width = matrix.shape[1]
        columns = torch.linspace(0, width - 1, min(width, _COMPARED)).long()
        found = [index for index, weight in enumerate(self._weights) if weight.shape[1] == width]
        if not 0 < sum(len(self._weights[index]) for index in found) * len(matrix) < _MOST_PAIRS:
            return None
        known = torch.cat([_unit(self._weights[index][:, columns].float()) for index in found])
        wanted = _unit(matrix[:, columns]).split(_CHUNK_ROWS)
        numbers = torch.cat([(rows @ known.T).argmax(1) for rows in wanted]).numpy()
        starts = np.cumsum([0, *(len(self._weights[index]) for index in found)])
        at = np.searchsorted(starts, numbers, side="right") - 1
        source, output = np.array(found)[at], numbers - starts[at]
        built = torch.empty_like(matrix)
        for index in np.unique(source):
            own = np.flatnonzero(source == index)
            built[own] = self._weights[index][output[own]].float()
        return (source, output) if _error(matrix, built) <= _MOST_ERROR else None

    def _by_columns(self, matrix: Tensor) -> tuple[Picked | None, NDArray[np.int64] | None]:
        rows = torch.linspace(0, len(matrix) - 1, min(len(matrix), _COMPARED)).long()
        wanted = _unit(matrix[rows].T)
        for index in self._of_shape(matrix):
            weight = self._weights[index].float()
            columns = (wanted @ _unit(weight[rows].T).T).argmax(1)
            if len(columns.unique()) == len(columns) and _error(matrix, weight[:, columns]) <= _MOST_ERROR:
                return (np.full(len(matrix), index), np.arange(len(matrix))), columns.numpy()
        return None, None


def _unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows, dim=1)


def _cosines(first: Tensor, second: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(first, second, dim=1)


def _factors(values: Tensor, original: Tensor) -> Tensor:
    # What rows were multiplied with. Well rounded values have no error in their own direction, so these are projected.
    pairs = zip(values.split(_CHUNK_ROWS), original.split(_CHUNK_ROWS), strict=True)
    found = torch.cat([own.square().sum(1) / (own * meant.float()).sum(1) for own, meant in pairs])
    return torch.where(found.isfinite() & (found != 0), found, 1.0)


def _joined(factors: list[Factors | None], rows: int) -> Factors | None:
    if all(each is None for each in factors):
        return None
    return np.concatenate([np.ones(rows, dtype=np.float32) if each is None else each for each in factors])


def _error(values: Tensor, original: Tensor, factors: Tensor | None = None) -> float:
    missed = energy = 0.0
    scales = torch.ones(len(values)) if factors is None else factors
    for own, given, scale in zip(*(each.split(_CHUNK_ROWS) for each in (values, original, scales)), strict=True):
        meant = given.float() * scale[:, None]
        missed += float((own - meant).square().sum())
        energy += float(meant.square().sum())
    return missed / energy if energy else (0.0 if not missed else float("inf"))
