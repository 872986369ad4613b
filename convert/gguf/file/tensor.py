"""Writes one tensor of a quantized GGUF file, a slab of rows after another."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ....errors import ConfigError, FormatError, NumericalError, ShapeError, VerificationError
from ..ggml.kernels import Bytes, decode, encode
from .emit import Planned
from .header import GgufTensor

__all__ = ["TensorWriter"]

_SLAB_WEIGHTS = 1 << 24
"""Weights encoded at once: 64 MiB as float32, so that a large embedding needs no copies of all of it."""

_COPIED_BYTES = 1 << 24

_LARGEST_ERROR = 1.5
"""Relative squared error above which a tensor is wrong: zeros have 1, another tensor has about 2."""

_DISTANCE_TOLERANCE = 0.05
"""How far the distance of finished bytes from the weights may be from what it was meant to be, relative to it; and
relative to the weights' own squares a fiftieth of that, for the base's rounding to F16 or BF16."""


class TensorWriter:
    """Writes one tensor: copied, encoded, or made elsewhere; what it decodes to is compared with its weights."""

    def __init__(
        self,
        source: GgufTensor,
        planned: Planned,
        importance: Callable[[str], Tensor | None] | None,
        distance: float | None,
        threads: int,
    ) -> None:
        """Hold what is to be written.

        Args:
            source: The unquantized tensor.
            planned: What it becomes.
            importance: As for ``write_gguf``.
            distance: As in ``write_gguf``'s ``distances``.
            threads: Number of threads to encode with.
        """
        self._distance = distance
        self._source = source
        self._planned = planned
        self._threads = threads
        self._rows = math.prod(planned.shape[:-1])
        self._matrix_rows = planned.shape[-2] if len(planned.shape) > 1 else 1
        self._row_weights = planned.shape[-1]
        self._copied = planned.type == self._source.type
        self._importance = None
        if importance is not None and planned.type.quantized and not self._copied:
            self._importance = self._checked(importance(planned.name))

    def slabs(
        self, source: BinaryIO, make: Callable[[], Iterator[Bytes]] | None
    ) -> Iterator[tuple[Bytes, Tensor | None]]:
        """Yield the bytes of consecutive rows, with the weights that they stand for unless they are copied."""
        if self._copied and make is None:
            yield from ((piece, None) for piece in self._copies(source))
            return
        if make is not None:
            yield from self._finished(source, make())
            return
        for first, last in self._ranges():
            weights = self._weights(source, first, last)
            yield self._encoded(weights, first), weights

    def write(self, slabs: Iterator[tuple[Bytes, Tensor | None]], target: BinaryIO) -> str:
        """Write the slabs, check that they decode to what they stand for, and return their SHA-256."""
        digest, error, energy, compared = hashlib.sha256(), 0.0, 0.0, False
        for data, weights in slabs:
            raw = np.ascontiguousarray(data).data
            target.write(raw)
            digest.update(raw)
            if weights is not None:
                difference = decode(data, self._planned.type, threads=self._threads) - weights
                error += _energy(difference)
                energy += _energy(weights)
                compared = True
        if not compared:
            return digest.hexdigest()
        relative = error / energy if energy else (0.0 if error == 0 else math.inf)
        if self._distance is not None:
            slack = _DISTANCE_TOLERANCE * (self._distance + energy / 50)
            if not abs(error - self._distance) <= slack:
                raise self._wrong(f"a squared distance of {error:.3g} from its weights", f"{self._distance:.3g}")
        elif not relative < _LARGEST_ERROR:
            raise self._wrong(f"a relative squared error of {relative:.3g}", f"less than {_LARGEST_ERROR}")
        return digest.hexdigest()

    def _wrong(self, got: str, expected: str) -> VerificationError:
        return VerificationError(
            f"{self._planned.name}: at {self._planned.type.name} it decodes to something else. Got {got}. Expected "
            f"{expected}. This is a bug, or the weights cannot be held by this type: choose another one."
        )

    def _copies(self, source: BinaryIO) -> Iterator[Bytes]:
        end = self._source.offset_bytes + self._source.size_bytes
        for position in range(self._source.offset_bytes, end, _COPIED_BYTES):
            yield self._read(source, position, min(_COPIED_BYTES, end - position))

    def _ranges(self) -> Iterator[tuple[int, int]]:
        # A slab never crosses from one expert to the next: each has importances of its own.
        step = max(1, _SLAB_WEIGHTS // self._row_weights)
        for start in range(0, self._rows, self._matrix_rows):
            for first in range(start, start + self._matrix_rows, step):
                yield first, min(first + step, start + self._matrix_rows)

    def _weights(self, source: BinaryIO, first: int, last: int) -> Tensor:
        row_bytes = self._source.type.row_bytes(self._row_weights)
        data = self._read(source, self._source.offset_bytes + first * row_bytes, (last - first) * row_bytes)
        return decode(data.reshape(last - first, row_bytes), self._source.type)

    def _encoded(self, weights: Tensor, first: int) -> Bytes:
        expert = first // self._matrix_rows
        importance = None
        if self._importance is not None:
            importance = self._importance[expert * self._row_weights : (expert + 1) * self._row_weights]
        try:
            return encode(weights, self._planned.type, importance, threads=self._threads)
        except (ConfigError, NumericalError) as cause:
            raise type(cause)(f"{self._planned.name}: {cause}") from cause

    def _read(self, source: BinaryIO, position: int, size: int) -> Bytes:
        source.seek(position)
        data = np.empty(size, dtype=np.uint8)
        if source.readinto(data.data) != size:  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
            raise FormatError(f"{self._source.path}: has become shorter while it was read. Make it again.")
        return data

    def _finished(self, source: BinaryIO, matrices: Iterator[Bytes]) -> Iterator[tuple[Bytes, Tensor]]:
        expected = (self._matrix_rows, self._planned.type.row_bytes(self._row_weights))
        data = np.empty((0, 0), dtype=np.uint8)
        for first, last in self._ranges():
            start = first % self._matrix_rows
            if not start:
                data = next(matrices, data[:0])
            if data.shape != expected or data.dtype != np.uint8:
                raise ShapeError(self._planned.name, "finished data", got=data.shape, expected=expected)
            yield data[start : start + last - first], self._weights(source, first, last)

    def _checked(self, importance: Tensor | None) -> Tensor | None:
        experts = math.prod(self._planned.shape[:-2])
        expected = experts * self._row_weights
        if importance is None or importance.numel() == expected:
            return importance
        if self._planned.name == "token_embd.weight":  # As in llama.cpp: a lookup has no inputs to speak of.
            return None
        raise ShapeError(self._planned.name, "importances", got=tuple(importance.shape), expected=(expected,))


def _energy(matrix: Tensor) -> float:
    # Rows in float32, which is fast; their sum in float64, as one float32 sum over 10^7 squares loses three digits.
    return float(matrix.square().sum(dim=1).sum(dtype=torch.float64))
