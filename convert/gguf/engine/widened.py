"""Copies an unquantized file in float32, whole or cut to its first blocks: what llama.cpp computes exactly.

Of matrices in BF16 or F16 llama.cpp rounds the activations that meet them, too, so that no such file shows whether it
computes what Transformers does.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ....checkpoint.files.operations import create
from ..file.emit import Planned, entry, header_bytes, padding
from ..file.header import GgufHeader, GgufTensor
from ..file.values import read_values
from ..ggml.types import ggml_type

__all__ = ["block_of", "float32_bytes", "is_float32", "write_float32"]

_F32 = ggml_type("F32")
_INTEGERS = ("I8", "I16", "I32", "I64")
_BLOCK = re.compile(r"blk\.(\d+)\.")

_TABLE_OF_BLOCKS, _PROJECTION_TO_BLOCKS = "per_layer_token_embd.weight", "per_layer_model_proj.weight"
"""What Gemma 3n and 4 hold for all blocks together: as columns, and as rows."""

_LAST = ("nextn_predict_layers", "attention.shared_kv_layers")
"""Numbers of blocks at the end that are special."""

_ARRAY = 9
_SLAB_WEIGHTS = 1 << 24


def block_of(name: str) -> int | None:
    """Return the number of the block that a tensor is in; None if it is in none."""
    found = _BLOCK.match(name)
    return None if found is None else int(found[1])


def is_float32(header: GgufHeader) -> bool:
    """Return whether a file has no value that its copy would widen."""
    return {tensor.type.name for tensor in header.tensors.values()} <= {"F32", *_INTEGERS}


def float32_bytes(header: GgufHeader, blocks: int | None) -> int:
    """Return the size in bytes of all tensors of a copy; arguments as for ``write_float32``."""
    return sum(planned.size_bytes for _, planned in _planned(header, blocks))


def write_float32(header: GgufHeader, output: Path, blocks: int | None) -> None:
    """Write the copy.

    Args:
        header: The file to copy.
        output: File to make or replace.
        blocks: Number of first blocks that are kept; None for all that the file has, those of multi-token prediction
            behind the others included.

    Raises:
        FormatError: The file is damaged, or holds a type that cannot be decoded.
        OSError: The copy cannot be written.
    """
    pairs = _planned(header, blocks)
    entries = dict(header.entries) if blocks is None else _cut_entries(header, blocks)
    start = header_bytes(entries, [planned for _, planned in pairs], header.alignment_bytes)
    with create(output) as target:
        target.write(start)
        for stored, planned in pairs:
            for piece in _pieces(stored, planned):
                target.write(piece)
            target.write(bytes(padding(planned.size_bytes, header.alignment_bytes)))


def _planned(header: GgufHeader, blocks: int | None) -> list[tuple[GgufTensor, Planned]]:
    # Tensors that are kept, as they are and as they will be.
    pairs = []
    for name, tensor in header.tensors.items():
        if blocks is not None and (block_of(name) or 0) >= blocks:
            continue
        kind = tensor.type if tensor.type.name in _INTEGERS else _F32
        pairs.append(
            (tensor, Planned(name, kind, tensor.shape if blocks is None else _cut_shape(header, name, blocks)))
        )
    return pairs


def _cut_shape(header: GgufHeader, name: str, blocks: int) -> tuple[int, ...]:
    rows, *columns = header.tensors[name].shape
    if name == _TABLE_OF_BLOCKS:
        return (rows, columns[-1] // _block_count(header) * blocks)
    if name == _PROJECTION_TO_BLOCKS:
        return (rows // _block_count(header) * blocks, *columns)
    return (rows, *columns)


def _block_count(header: GgufHeader) -> int:
    return int(header.metadata[f"{header.metadata['general.architecture']}.block_count"])


def _cut_entries(header: GgufHeader, blocks: int) -> dict[str, bytes]:
    prefix, count = f"{header.metadata['general.architecture']}.", _block_count(header)
    entries = dict(header.entries)
    for key, value in header.metadata.items():
        if key.startswith(prefix) and isinstance(value, np.ndarray) and len(value) == count:
            (kind,) = struct.unpack_from("<I", header.entries[key], 4)
            entries[key] = struct.pack("<IIQ", _ARRAY, kind, blocks) + value[:blocks].tobytes()
    for key in _LAST:
        if f"{prefix}{key}" in entries:
            entries[f"{prefix}{key}"] = entry(max(0, header.metadata[f"{prefix}{key}"] - (count - blocks)))
    return entries | {f"{prefix}block_count": entry(blocks)}


def _pieces(stored: GgufTensor, planned: Planned) -> Iterator[Any]:
    # A tensor's bytes, a few rows at a time: stacks of experts may be larger than memory.
    width = stored.shape[-1]
    row_bytes = stored.type.row_bytes(width)
    kept_rows, kept_columns = math.prod(planned.shape[:-1]), planned.shape[-1]
    step = max(1, _SLAB_WEIGHTS // width)
    for first in range(0, kept_rows, step):
        rows = min(step, kept_rows - first)
        offset = stored.offset_bytes + first * row_bytes
        if planned.type != _F32:
            with stored.path.open("rb") as source:
                source.seek(offset)
                yield source.read(rows * row_bytes)
            continue
        part = replace(stored, shape=(rows, width), offset_bytes=offset, size_bytes=rows * row_bytes)
        yield _float32(read_values(part)[:, :kept_columns])


def _float32(values: Tensor) -> memoryview:
    return values.float().contiguous().numpy().data.cast("B")
