"""Where the matrices of a GGUF file come from: whose outputs their rows are, in which order. Needs no torch.

llama.cpp's converter reorders rows (queries and keys of Llama), joins linears (queries, keys and values of Phi-3),
splits them, stacks experts, and for some models reorders columns or multiplies rows by constants. A map says what
became of every linear of one model; it is found by comparing values (``matching``), so no table of names or orders is
needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

__all__ = ["LEAST_COLUMNS", "Part", "RowMap", "TensorRows"]

LEAST_COLUMNS = 16
"""Tensors with narrower rows are left out: rows may be alike by chance, and no type of ggml takes them."""

Indices = NDArray[np.int64]
Factors = NDArray[np.float32]


@dataclass(frozen=True, slots=True, eq=False)
class Part:
    """Outputs of one linear that lie in one tensor of the file.

    Attributes:
        tensor: Name of the tensor in the file.
        outputs: The linear's outputs, rising, int64, shape (outputs,).
        rows: Row of the tensor that holds each of them, matrices of experts one after another, int64, same shape.
        columns: Input channel of the linear in every column of the tensor, int64, shape (K,); None if all are in place.
        factors: What each of the outputs is multiplied with in the file, not 0, float32, shape (outputs,); None if all
            are as they were.
    """

    tensor: str
    outputs: Indices
    rows: Indices
    columns: Indices | None
    factors: Factors | None

    @property
    def column_key(self) -> bytes:
        """Equal for parts whose columns are in the same order."""
        return b"" if self.columns is None else self.columns.tobytes()

    def holds_all(self, out_features: int) -> bool:
        """Whether it has every output of a linear of so many, each once."""
        return np.array_equal(self.outputs, np.arange(out_features))

    def is_weight(self, out_features: int) -> bool:
        """Whether its rows in the order of outputs are the weight of a linear of so many, as it is."""
        return self.columns is None and self.factors is None and self.holds_all(out_features)


@dataclass(frozen=True, slots=True, eq=False)
class TensorRows:
    """What the rows of one tensor of the file are.

    Attributes:
        linears: Full names of the linears that it is made of, in the order of their first rows.
        source: Index into ``linears`` for every row, matrices of experts one after another, int64, shape (rows,).
        output: Output of that linear, int64, shape (rows,).
        columns: As of ``Part``; the same for all rows.
        factors: What every row is of that output times, not 0, float32, shape (rows,); None if all are the outputs.
    """

    linears: tuple[str, ...]
    source: Indices
    output: Indices
    columns: Indices | None = None
    factors: Factors | None = None

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        source: Indices,
        output: Indices,
        columns: Indices | None = None,
        factors: Factors | None = None,
    ) -> TensorRows:
        """Return the same with only those linears that rows are of.

        Args:
            names: Full names of all linears that there are.
            source: Index into them for every row, int64, shape (rows,).
            output: See the class, as the others.
            columns: See the class.
            factors: See the class.
        """
        used, first = np.unique(source, return_index=True)
        used = used[np.argsort(first)]
        place = np.zeros(len(names), dtype=np.int64)
        place[used] = np.arange(len(used))
        return cls(tuple(names[index] for index in used), place[source], output, columns, factors)

    def part(self, tensor: str, linear: str) -> Part:
        """Return what it holds of one of its linears; ``tensor`` is its own name."""
        rows = np.flatnonzero(self.source == self.linears.index(linear))
        rows = rows[np.argsort(self.output[rows], kind="stable")]
        factors = None if self.factors is None else self.factors[rows]
        return Part(tensor, self.output[rows], rows, self.columns, factors)


class RowMap:
    """Where all matrices of one file come from.

    Attributes:
        tensors: What rows are, by name of the tensor in the file.
        unexplained: Why others, which could hold linears by type and shape, are none that is known: by name.
    """

    def __init__(self, tensors: Mapping[str, TensorRows], unexplained: Mapping[str, str]) -> None:
        """Hold both."""
        self.tensors = tensors
        self.unexplained = unexplained

    @cached_property
    def _tensors_of(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, rows in self.tensors.items():
            for linear in rows.linears:
                found.setdefault(linear, []).append(name)
        return found

    def tensors_of(self, linear: str) -> tuple[str, ...]:
        """Return the names of the tensors that hold outputs of a linear; empty where none does."""
        return tuple(self._tensors_of.get(linear, ()))

    def parts(self, linear: str) -> tuple[Part, ...]:
        """Return what became of a linear, one part a tensor; empty where no tensor holds anything of it."""
        return tuple(self.tensors[name].part(name, linear) for name in self.tensors_of(linear))

    def fits(self, shapes: Mapping[str, tuple[int, ...]]) -> bool:
        """Whether the tensors of the map are in a file, with as many rows and columns.

        Args:
            shapes: Sizes of the dimensions of the file's tensors, outermost first, by name.
        """

        def fit(name: str, own: TensorRows) -> bool:
            *outer, columns = shapes.get(name, (0,))
            return len(own.source) == math.prod(outer) and (own.columns is None or len(own.columns) == columns)

        return all(name in shapes and fit(name, own) for name, own in self.tensors.items())

    def missing(self, features: Mapping[str, int]) -> dict[str, int]:
        """Return the linears of which the file does not hold every output, and how many it lacks.

        Args:
            features: Number of outputs of every linear that should be there, by full name.
        """
        lacking = {}
        for linear, count in features.items():
            held = np.zeros(count, dtype=bool)
            for part in self.parts(linear):
                held[part.outputs] = True
            if not held.all():
                lacking[linear] = int(count - held.sum())
        return lacking
