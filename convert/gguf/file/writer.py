"""Writes a quantized GGUF file as llama-quantize does, tensor after tensor, and proves that it reads back."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from ....checkpoint.files.atomic import atomic_file
from ....checkpoint.files.operations import create, sync
from ....errors import ConfigError, FormatError, NumericalError, ShapeError, VerificationError
from ....progress import Progress, silent
from ...model import Verification
from ..ggml.kernels import Bytes, decode, encode
from ..ggml.types import GgmlType
from .describe import verification_of
from .digest import tensor_digest, with_digest
from .emit import Planned, entry, header_bytes, padding
from .header import GgufHeader, read_gguf_header, require_whole
from .metadata import DIGEST_KEY
from .roles import writing_order

__all__ = ["planned_bytes", "write_gguf"]

_QUANTIZATION_VERSION = 2
"""ggml's ``GGML_QNT_VERSION``."""

_SPLIT_KEYS = ("split.no", "split.count", "split.tensors.count")

_SLAB_WEIGHTS = 1 << 24
"""Weights encoded at once: 64 MiB as float32, so that a large embedding needs no copies of all of it."""

_COPIED_BYTES = 1 << 24

_LARGEST_ERROR = 1.5
"""Relative squared error above which a tensor is not what was meant: zeros have 1, another tensor has about 2."""

_DISTANCE_TOLERANCE = 0.05
"""How far the distance of finished bytes from the weights may be from what it was meant to be, relative to it; and
relative to the weights' own squares a fiftieth of that, for the base's rounding to F16 or BF16."""


def planned_bytes(
    header: GgufHeader, types: Mapping[str, GgmlType], *, file_type: int, metadata: Mapping[str, Any] | None = None
) -> int:
    """Return the exact size in bytes of the file that ``write_gguf`` would write.

    Args:
        header: The unquantized model.
        types: As for ``write_gguf``.
        file_type: As for ``write_gguf``.
        metadata: As for ``write_gguf``.

    Raises:
        ConfigError: A tensor is not in the model.
        ShapeError: A row is not a whole number of its type's blocks.
    """
    planned = _plan(header, types)
    start = len(header_bytes(_entries(header, file_type, metadata or {}), planned, header.alignment_bytes))
    sizes = [tensor.size_bytes for tensor in planned]
    return start + sum(size + padding(size, header.alignment_bytes) for size in sizes)


def write_gguf(
    base: Path,
    output: Path,
    types: Mapping[str, GgmlType],
    *,
    file_type: int,
    encoded: Mapping[str, Callable[[], Iterator[Bytes]]] | None = None,
    distances: Mapping[str, float] | None = None,
    importance: Callable[[str], Tensor | None] | None = None,
    metadata: Mapping[str, Any] | None = None,
    threads: int = 1,
    progress: Progress = silent,
) -> Verification:
    """Quantize a GGUF file; ``output`` appears only once all of it has been read back and found right.

    With the types of a mixture and the same importances the file is byte for byte llama-quantize's own.

    Args:
        base: The unquantized model, in one file; its tensors are F32, F16 or BF16.
        output: File to make; it must not exist.
        types: By name of tensor, the type to store it in; what is missing stays as it is.
        file_type: Number for ``general.file_type``: that of a mixture, or ``dominant_file_type``.
        encoded: By name of tensor, a function that yields its finished matrices, those of experts one after the other,
            each uint8, shape (rows, row_bytes); called once each. The other tensors are encoded here.
        distances: By name of such a tensor, ``||W_hat - W||^2`` as it was meant to be, where it was not rounded to stay
            near its weights. The others, and what is encoded here, must not be further from them than zeros are.
        importance: From the name of a tensor to the mean squares of its inputs, float32, shape (experts *
            row_weights,), or None where they are not known: ``ImportanceMatrix.mean_squares``.
        metadata: Further entries by key, added or replaced: bool, str, float, list of str, or unsigned int. Where
            ``DIGEST_KEY`` stands for ``DIGEST_ROOM``, the file gets a digest of itself.
        threads: Number of threads to encode with; the bytes do not depend on it.
        progress: Shows how far the writing is.

    Returns:
        What was read back.

    Raises:
        BpwiseError: ggml's library is not installed.
        ConfigError: A tensor is not in the model, or a type needs importances and there are none.
        FormatError: The base is damaged, one of several parts, or already quantized.
        NumericalError: Weights or importances are not finite, or out of a type's range.
        ShapeError: A row is not a whole number of blocks, or importances or finished bytes have a wrong shape.
        VerificationError: What is on the disk is not what was meant.
        WorkDirectoryError: ``output`` exists or cannot be written, or the disk is full.
    """
    header = read_gguf_header(Path(base))
    _check_base(header, types, encoded or {})
    planned = _plan(header, types)
    start = header_bytes(_entries(header, file_type, metadata or {}), planned, header.alignment_bytes)
    written: dict[str, str] = {}
    with atomic_file(Path(output), new=True) as temporary:
        with header.path.open("rb") as source, create(temporary) as target:
            target.write(start)
            for tensor in progress(planned, "writing"):
                job = _Job(header, tensor, importance, (distances or {}).get(tensor.name), threads)
                slabs = job.slabs(source, (encoded or {}).get(tensor.name))
                written[tensor.name] = job.write(slabs, target)
                target.write(bytes(padding(tensor.size_bytes, header.alignment_bytes)))
            start = with_digest(start, written.values())
            target.seek(0)
            target.write(start)
        sync(temporary)
        return _verify(temporary, Path(output), start, planned, written)


def _check_base(header: GgufHeader, types: Mapping[str, GgmlType], ready: Mapping[str, object]) -> None:
    for names, what in ((types.keys(), "a type"), (ready.keys(), "finished bytes")):
        unknown = names - header.tensors.keys()
        if unknown:
            raise ConfigError(
                f"{header.path}: no tensor {min(unknown)!r}. Got {what} for it. Use the names of the file."
            )
    require_whole(header)
    for name, kind in types.items():
        stored = header.tensors[name].type
        if stored != kind and stored.name not in ("F32", "F16", "BF16"):
            raise FormatError(
                f"{header.path}: tensor {name!r} is already quantized. Got {stored.name}. Expected F32, F16 or BF16. "
                "Use the unquantized model."
            )


def _plan(header: GgufHeader, types: Mapping[str, GgmlType]) -> list[Planned]:
    planned = []
    for name in writing_order(header):
        tensor = header.tensors[name]
        kind = types.get(name, tensor.type)
        if not kind.fits(tensor.shape[-1]):
            expected = (tensor.shape[-1] // kind.block_weights * kind.block_weights,)
            raise ShapeError(name, f"a row, to be blocks of {kind.name},", got=tensor.shape[-1:], expected=expected)
        planned.append(Planned(name, kind, tensor.shape))
    return planned


def _entries(header: GgufHeader, file_type: int, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the base's entries, and ours after them: llama.cpp, too, moves to the end what it sets anew."""
    ours = {
        "general.quantization_version": entry(_QUANTIZATION_VERSION),
        "general.file_type": entry(file_type),
        **{key: entry(value) for key, value in metadata.items()},
    }
    gone = {*ours, *_SPLIT_KEYS, DIGEST_KEY}  # a digest is of one file
    return {key: stored for key, stored in header.entries.items() if key not in gone} | ours


class _Job:
    """Writes one tensor."""

    def __init__(
        self,
        header: GgufHeader,
        planned: Planned,
        importance: Callable[[str], Tensor | None] | None,
        distance: float | None,
        threads: int,
    ) -> None:
        self._path = header.path
        self._distance = distance
        self._source = header.tensors[planned.name]
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
            raise FormatError(f"{self._path}: has become shorter while it was read. Make it again.")
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


def _verify(path: Path, output: Path, start: bytes, planned: list[Planned], written: Mapping[str, str]) -> Verification:
    """Read the file from the disk and compare it with what was meant."""
    with path.open("rb") as file:
        if file.read(len(start)) != start:
            raise VerificationError(f"{output}: the header reads back otherwise than it was written. Check the disk.")
    try:
        header = read_gguf_header(path)
    except FormatError as cause:
        raise VerificationError(f"{output}: cannot be read back. {cause}") from cause
    if list(header.tensors) != [tensor.name for tensor in planned]:
        raise VerificationError(f"{output}: the tensors read back are not those that were written. Check the disk.")
    with path.open("rb") as file:
        for tensor in header.tensors.values():
            if tensor_digest(file, tensor) != written[tensor.name]:
                raise VerificationError(f"{output}: tensor {tensor.name!r} reads back otherwise. Check the disk.")
    return verification_of(header, compared=True)
