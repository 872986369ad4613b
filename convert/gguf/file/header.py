"""The GGUF container: what stands before the data of a file, read with plain file calls and believed in nothing.

Layout (little-endian): ``GGUF``, version, number of tensors, number of metadata entries; the entries (key, type,
value); the tensors (name, dimensions innermost first, type, offset); padding; the tensors' data. Files come from
strangers, so every count and size is checked against what is left of the file before anything is allocated, and
tensors must lie back to back in their order, as llama.cpp demands: then none can overlap another.
"""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ....checkpoint.files.disk_errors import explained_reading
from ....checkpoint.files.schemas import is_lfs_pointer
from ....errors import FormatError
from ..ggml.types import GGML_TYPES, GgmlType

__all__ = ["GGML_TYPES", "GgmlType", "GgufHeader", "GgufTensor", "is_gguf", "read_gguf_header"]

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)

_MAX_HEADER_BYTES = 256 << 20
"""A vocabulary of 256k tokens with its merges takes about 20 MiB."""

_MAX_NAME_BYTES = 64
"""llama.cpp's limit for the name of a tensor, its final zero included."""

_MAX_DIMENSIONS = 4
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_MIN_ENTRY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

_SCALARS = {
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """Where one tensor lies in its file, and how it is stored.

    Attributes:
        name: Name in the file, such as ``blk.0.attn_q.weight``.
        type: How its values are stored.
        shape: Sizes of the dimensions, outermost first (the file has them the other way round).
        offset_bytes: Position of the first data byte, counted from the start of the file.
        size_bytes: Number of data bytes, without padding.
        path: The file.
    """

    name: str
    type: GgmlType
    shape: tuple[int, ...]
    offset_bytes: int
    size_bytes: int
    path: Path


@dataclass(frozen=True, slots=True)
class GgufHeader:
    """All that stands before the data.

    Attributes:
        path: The file.
        version: Of the format.
        metadata: Values by key: numbers, booleans, strings, lists of strings, NumPy arrays of numbers. Bytes of a
            string that are no UTF-8 become surrogates.
        entries: The same entries as they are stored, type and value, for writers that copy them.
        tensors: In the order of the file, by name.
        alignment_bytes: Tensors begin at multiples of it.
        data_offset_bytes: Where the data begins.
        file_bytes: Size of the whole file.
        sha256: Of everything before the data, hexadecimal.
        parts: Headers of all files, where the model is in several.
    """

    path: Path
    version: int
    metadata: Mapping[str, Any]
    entries: Mapping[str, bytes]
    tensors: Mapping[str, GgufTensor]
    alignment_bytes: int
    data_offset_bytes: int
    file_bytes: int
    sha256: str
    parts: tuple[GgufHeader, ...] = ()

    @property
    def files(self) -> tuple[GgufHeader, ...]:
        """The headers of all files that the model is in."""
        return self.parts or (self,)


def is_gguf(path: Path) -> bool:
    """Return whether a file begins as GGUF files do."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def read_gguf_header(path: Path) -> GgufHeader:
    """Read what stands before the data of one GGUF file, and check it; ``read_model_header`` reads all of a model.

    Args:
        path: The file; one of several parts of a model is read too.

    Raises:
        FormatError: It is no GGUF file of version 2 or 3, or something in it contradicts the file's size or itself.
    """
    path = Path(path)
    with explained_reading(path, FormatError):
        if path.is_file() and is_lfs_pointer(path):
            raise FormatError(f"{path}: a Git LFS pointer, not the file itself. Run `git lfs pull` in {path.parent}.")
        with path.open("rb") as file:
            file_bytes = path.stat().st_size
            return _Reader(path, file, file_bytes).header()


class _Reader:
    """Goes once through the file from its start."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int) -> None:
        self._path = path
        self._file = file
        self._file_bytes = file_bytes
        self._limit = min(file_bytes, _MAX_HEADER_BYTES)
        self._position = 0
        self._digest = hashlib.sha256()
        self._copy = bytearray()

    def header(self) -> GgufHeader:
        if self._bytes(4, "magic") != _MAGIC:
            raise self._error("no GGUF file. Expected it to begin with 'GGUF'. Check the path")
        version = self._number("<I", "version")
        if version not in _VERSIONS:
            what = "big-endian files are not supported" if version & 0xFFFF == 0 else "convert the model again"
            raise self._error(f"GGUF version {version}. Expected 2 or 3: {what}")
        tensor_count = self._count("tensors", _MIN_TENSOR_BYTES)
        entry_count = self._count("metadata entries", _MIN_ENTRY_BYTES)
        metadata: dict[str, Any] = {}
        entries: dict[str, bytes] = {}
        for _ in range(entry_count):
            key = self._string("a metadata key")
            if key in metadata:
                raise self._error(f"metadata key {key!r} is there twice")
            self._taken()
            metadata[key] = self._value(self._number("<I", key), key)
            entries[key] = self._taken()
        alignment = self._alignment(metadata)
        infos = [self._tensor_info() for _ in range(tensor_count)]
        header_bytes = self._position
        self._taken()
        data_offset = -(-header_bytes // alignment) * alignment
        return GgufHeader(
            path=self._path,
            version=version,
            metadata=metadata,
            entries=entries,
            tensors=self._placed(infos, data_offset, alignment),
            alignment_bytes=alignment,
            data_offset_bytes=data_offset,
            file_bytes=self._file_bytes,
            sha256=self._digest.hexdigest(),
        )

    def _placed(
        self, infos: list[tuple[str, GgmlType, tuple[int, ...], int]], data_offset: int, alignment: int
    ) -> dict[str, GgufTensor]:
        tensors: dict[str, GgufTensor] = {}
        expected = 0
        for name, kind, shape, offset in infos:
            if name in tensors:
                raise self._error(f"tensor {name!r} is there twice")
            size = math.prod(shape) // kind.block_weights * kind.block_bytes
            if offset != expected:
                raise self._error(
                    f"tensor {name!r} lies at offset {offset}. Expected {expected}, after the one before it"
                )
            if data_offset + offset + size > self._file_bytes:
                raise self._error(
                    f"tensor {name!r} ends at byte {data_offset + offset + size}, but the file has {self._file_bytes}"
                )
            tensors[name] = GgufTensor(name, kind, shape, data_offset + offset, size, self._path)
            expected += -(-size // alignment) * alignment
        return tensors

    def _tensor_info(self) -> tuple[str, GgmlType, tuple[int, ...], int]:
        name = self._string("the name of a tensor")
        if not name or len(name.encode("utf-8", "surrogateescape")) >= _MAX_NAME_BYTES:
            raise self._error(f"a tensor's name is {name!r}. Expected 1 to {_MAX_NAME_BYTES - 1} bytes")
        dimensions = self._number("<I", name)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise self._error(f"tensor {name!r} has {dimensions} dimensions. Expected 1 to {_MAX_DIMENSIONS}")
        inner_first = struct.unpack(f"<{dimensions}Q", self._bytes(8 * dimensions, name))
        number = self._number("<I", name)
        offset = self._number("<Q", name)
        if number not in GGML_TYPES:
            raise self._error(
                f"tensor {name!r} is of type {number}, which is not known. Update bpwise, or convert again"
            )
        kind = GGML_TYPES[number]
        # No type has less than one bit a weight, so this bounds the product before anything is made of it.
        if min(inner_first) < 1 or math.prod(inner_first) > 8 * self._file_bytes:
            raise self._error(f"tensor {name!r} has impossible dimensions {inner_first}")
        if inner_first[0] % kind.block_weights:
            raise self._error(
                f"tensor {name!r} has rows of {inner_first[0]} weights. Expected a multiple of {kind.block_weights} "
                f"for {kind.name}"
            )
        return name, kind, tuple(reversed(inner_first)), offset

    def _alignment(self, metadata: dict[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= _MAX_ALIGNMENT or alignment & (alignment - 1):
            raise self._error(f"general.alignment is {alignment!r}. Expected a power of two")
        return alignment

    def _value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self._string(key)
        if kind == _ARRAY:
            return self._array(key)
        if kind not in _SCALARS:
            raise self._error(f"metadata {key!r} is of type {kind}, which is not known")
        dtype = np.dtype(_SCALARS[kind])
        return np.frombuffer(self._bytes(dtype.itemsize, key), dtype)[0].item()

    def _array(self, key: str) -> Any:
        kind = self._number("<I", key)
        if kind == _STRING:
            return [self._string(key) for _ in range(self._count(f"strings of {key!r}", 8))]
        if kind not in _SCALARS:
            raise self._error(f"metadata {key!r} is an array of type {kind}. Expected numbers or strings")
        dtype = np.dtype(_SCALARS[kind])
        count = self._count(f"numbers of {key!r}", dtype.itemsize)
        return np.frombuffer(self._bytes(count * dtype.itemsize, key), dtype)

    def _string(self, what: str) -> str:
        return self._bytes(self._count(f"bytes of {what}", 1), what).decode("utf-8", "surrogateescape")

    def _count(self, what: str, bytes_each: int) -> int:
        count = self._number("<Q", what)
        if count * bytes_each > self._limit - self._position:
            raise self._error(f"{count} {what} cannot fit into the {self._limit - self._position} bytes that are left")
        return count

    def _number(self, layout: str, what: str) -> int:
        value: int = struct.unpack(layout, self._bytes(struct.calcsize(layout), what))[0]
        return value

    def _bytes(self, count: int, what: str) -> bytes:
        data = self._file.read(count) if count <= self._limit - self._position else b""
        if len(data) < count:
            raise self._error(f"ends at byte {self._limit}, in the middle of {what!r}")
        self._position += count
        self._copy += data
        return data

    def _taken(self) -> bytes:
        """Return the bytes read since the last call; hashed here, as a vocabulary is a million small pieces."""
        data = bytes(self._copy)
        self._digest.update(data)
        self._copy.clear()
        return data

    def _error(self, what: str) -> FormatError:
        return FormatError(f"{self._path}: {what}. The file is damaged or crafted: get or make it again.")
