"""Values of a GGUF file's tensors, read and decoded a few rows at a time."""

from __future__ import annotations

import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from ....checkpoint.files.disk_errors import explained_reading
from ....errors import FormatError, install_command
from .header import GgufTensor

__all__ = ["FLOATS", "read_rows", "read_values"]

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""Types of weights that are not quantized."""

_DENSE = {
    **FLOATS,
    "F64": torch.float64,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
}

_PIECE_WEIGHTS = 1 << 20
"""Weights decoded at once: decoding in NumPy takes some ten times the result's memory."""


def read_values(tensor: GgufTensor) -> Tensor:
    """Read and decode a tensor as it stands in a GGUF file.

    Args:
        tensor: Where it lies.

    Returns:
        float32, float16 or bfloat16 if it is stored so, float64 and integers too, and float32 if it is quantized; on
        the CPU, in memory of its own.

    Raises:
        FormatError: The file cannot be read, is shorter than it was, the type cannot be decoded, or a value is NaN or
            infinite.
    """
    return read_rows(tensor, 0, math.prod(tensor.shape[:-1])).view(tensor.shape)


def read_rows(tensor: GgufTensor, first: int, last: int) -> Tensor:
    """Read and decode some rows of a tensor, matrices of experts one after another.

    Args:
        tensor: Where it lies.
        first: The first row.
        last: The one after the last.

    Returns:
        As ``read_values``, shape (rows, K).

    Raises:
        FormatError: As ``read_values``.
    """
    path, width = tensor.path, tensor.shape[-1]
    row_bytes = width // tensor.type.block_weights * tensor.type.block_bytes
    step = max(1, _PIECE_WEIGHTS // width)
    values = torch.empty((last - first, width), dtype=_DENSE.get(tensor.type.name, torch.float32))
    with explained_reading(path, FormatError, advice="Check the disk."), path.open("rb") as file:
        # Read and not memory-mapped: should the file shrink meanwhile, a read comes up short, a map kills us.
        file.seek(tensor.offset_bytes + first * row_bytes)
        for start in range(0, last - first, step):
            piece = values[start : start + step]
            piece.copy_(_decode(_read(path, file, len(piece) * row_bytes), tensor, len(piece)))
    if values.numel() and not all(map(torch.isfinite, values.aminmax())):
        bad = int((~torch.isfinite(values)).sum())
        raise FormatError(
            f"{path}: tensor {tensor.name!r} holds NaN or infinite values. Got {bad} of {values.numel()}. Expected "
            "none. The file is damaged: get or make it again."
        )
    return values


def _read(path: Path, file: BinaryIO, size: int) -> bytearray:
    data = bytearray(size)
    if file.readinto(data) != size:  # type: ignore[attr-defined]  # typeshed's BinaryIO lacks it
        raise FormatError(f"{path}: has become shorter while it was read. Get or make it again.")
    return data


def _decode(data: bytearray, tensor: GgufTensor, rows: int) -> Tensor:
    dtype = _DENSE.get(tensor.type.name)
    if dtype is not None:
        return torch.frombuffer(data, dtype=dtype).view(rows, -1)
    try:
        from gguf import GGMLQuantizationType, quants  # noqa: PLC0415 - an extra, and only quantized tensors need it
    except ImportError as cause:
        raise FormatError(
            f"tensor {tensor.name!r}: of type {tensor.type.name}, which the Python package gguf decodes, and it is not "
            f"installed. Run: {install_command('gguf')}."
        ) from cause
    blocks = np.frombuffer(data, dtype=np.uint8).reshape(rows, -1)
    try:
        # A crafted scale may overflow; what comes of it is found by the caller.
        with np.errstate(all="ignore"):
            decoded = quants.dequantize(blocks, GGMLQuantizationType[tensor.type.name])
    except (NotImplementedError, KeyError) as cause:
        raise FormatError(
            f"tensor {tensor.name!r}: type {tensor.type.name} cannot be decoded by the installed gguf package. "
            "Upgrade it, or quantize to another type."
        ) from cause
    return torch.from_numpy(np.ascontiguousarray(decoded, dtype=np.float32))
