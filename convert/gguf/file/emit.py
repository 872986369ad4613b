"""What stands before the data of a GGUF file, as bytes: the counterpart of ``header``.

Entries of metadata are kept as they are stored (type and value), so that those of another file can be copied without
knowing what they mean, as llama.cpp does.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ....errors import FormatError
from ..ggml.types import GgmlType
from .roles import trimmed

__all__ = ["ALIGNMENT_BYTES", "Planned", "entry", "header_bytes", "int32_entry", "padding", "uint16_entry"]

ALIGNMENT_BYTES = 32
"""Tensors begin at multiples of it where the metadata says nothing else."""

_MAGIC, _VERSION = b"GGUF", 3
_U16, _U32, _I32, _F32, _BOOL, _STRING, _ARRAY = 2, 4, 5, 6, 7, 8, 9


@dataclass(frozen=True, slots=True)
class Planned:
    """A tensor to be written.

    Attributes:
        name: Its name in the file.
        type: How its values are stored.
        shape: Sizes of the dimensions, outermost first.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Number of data bytes, without padding."""
        return math.prod(self.shape[:-1]) * self.type.row_bytes(self.shape[-1])


def entry(value: Any) -> bytes:
    """Return a value of metadata as it is stored, its type before it.

    Args:
        value: A bool, a str, a list of str, a float (stored as float32) or an int (stored as unsigned, 32 bits).

    Raises:
        FormatError: The value is none of these, or does not fit.
    """
    if isinstance(value, bool):
        return struct.pack("<I?", _BOOL, value)
    if isinstance(value, int) and 0 <= value < 1 << 32:
        return struct.pack("<II", _U32, value)
    if isinstance(value, float):
        return struct.pack("<If", _F32, value)
    if isinstance(value, str):
        return struct.pack("<I", _STRING) + _text(value)
    if isinstance(value, list | tuple) and all(isinstance(item, str) for item in value):
        return struct.pack("<IIQ", _ARRAY, _STRING, len(value)) + b"".join(map(_text, value))
    raise FormatError(
        f"GGUF metadata: cannot store {value!r}. Expected a bool, str, float, list of str or 32-bit number."
        " The file is damaged: make it again."
    )


def uint16_entry(value: int) -> bytes:
    """Return a number as the keys of parts are stored, its type before it."""
    return struct.pack("<IH", _U16, value)


def int32_entry(value: int) -> bytes:
    """Return a number as the number of all parts' tensors is stored, its type before it."""
    return struct.pack("<Ii", _I32, value)


def header_bytes(entries: Mapping[str, bytes], tensors: Sequence[Planned], alignment_bytes: int) -> bytes:
    """Return all that stands before the data, padding included.

    Args:
        entries: Metadata as stored, by key, in the order to write.
        tensors: The tensors, in the order of their data.
        alignment_bytes: What tensors are aligned to.
    """
    parts = [_MAGIC, struct.pack("<IQQ", _VERSION, len(tensors), len(entries))]
    for key, stored in entries.items():
        parts += [_text(key), stored]
    parts += _tensor_infos(tensors, alignment_bytes)
    size = sum(map(len, parts))
    return b"".join(parts) + bytes(padding(size, alignment_bytes))


def padding(size_bytes: int, alignment_bytes: int) -> int:
    """Return how many bytes follow to reach the next multiple of the alignment."""
    return -size_bytes % alignment_bytes


def _tensor_infos(tensors: Iterable[Planned], alignment_bytes: int) -> list[bytes]:
    infos, offset = [], 0
    for tensor in tensors:
        inner_first = trimmed(tensor.shape)[::-1]
        shape = struct.pack(f"<I{len(inner_first)}Q", len(inner_first), *inner_first)
        infos.append(_text(tensor.name) + shape + struct.pack("<IQ", tensor.type.id, offset))
        offset += tensor.size_bytes + padding(tensor.size_bytes, alignment_bytes)
    return infos


def _text(value: str) -> bytes:
    try:
        raw = value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:  # half of a surrogate pair that stands for no byte
        raw = value.encode("utf-8", "backslashreplace")
    return struct.pack("<Q", len(raw)) + raw
