"""The safetensors container: reading and writing it with plain file calls.

Layout (little-endian): 8 bytes holding the header's length N, N bytes of JSON, then the data of the tensors
back to back. Reading is strict, because a header comes from strangers: everything it claims is checked
against the size of the file before a byte is allocated. Writing goes through ordinary ``write`` calls: a full
disk then is an ``OSError`` at the call that met it, and the file gets the permissions that the user's umask
asks for. Neither can be had from ``safetensors.torch.save_file`` (0.8.0), which sets the file's length first
and replaces the target itself.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

import torch
from torch import Tensor

from ...errors import BpwiseError, FormatError
from .atomic import atomic_file
from .disk_errors import explained_reading
from .operations import create

__all__ = [
    "DTYPE_NAMES",
    "HeaderEntry",
    "NewTensor",
    "SafetensorsHeader",
    "load_metadata",
    "load_tensors",
    "read_entry",
    "read_header",
    "save_tensors",
    "tensor_bytes",
    "write_tensors",
]

_MAX_HEADER_BYTES = 100_000_000
"""The limit of the reference implementation: 100 MB of JSON describe about a million tensors."""

_MAX_DIMENSIONS = 64
"""More than any tensor has, and what NumPy can address."""

_LENGTH_BYTES = 8
_ALIGNMENT_BYTES = 8

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
"""Names that headers have for dtypes."""


class NewTensor(Protocol):
    """Makes a tensor on the CPU, to be filled."""

    def __call__(self, shape: tuple[int, ...], /, *, dtype: torch.dtype) -> Tensor:
        """Return it."""


@dataclass(frozen=True, slots=True)
class HeaderEntry:
    """Where one tensor lies in its file.

    Attributes:
        shape: Sizes of the dimensions, outermost first; () for a scalar.
        dtype: Stored dtype.
        offset_bytes: Position of the first data byte, counted from the start of the file.
        size_bytes: Number of data bytes, without padding.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    offset_bytes: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class SafetensorsHeader:
    """What a safetensors file says of itself, checked against its size.

    Attributes:
        entries: Every tensor by name, in the order of the header.
        metadata: The free-form strings under ``__metadata__``.
        data_offset_bytes: Position at which the tensors' data begins.
        file_bytes: Size of the whole file.
        sha256: Hex digest of the raw header, its length field included.
    """

    entries: dict[str, HeaderEntry]
    metadata: dict[str, str]
    data_offset_bytes: int
    file_bytes: int
    sha256: str


def read_header(path: Path, error: type[BpwiseError]) -> SafetensorsHeader:
    """Read and check the header of a safetensors file; no tensor data is loaded.

    Args:
        path: The file.
        error: What to raise.

    Returns:
        The header. Its entries lie inside the file, fill it without gaps and do not overlap.

    Raises:
        BpwiseError: As the type given by ``error``: the file is missing, truncated, corrupt or malicious.
    """
    with explained_reading(path, error):
        file_bytes = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(_LENGTH_BYTES)
            if len(prefix) < _LENGTH_BYTES:
                raise error(
                    f"{path}: truncated. Got {file_bytes} bytes. Expected at least {_LENGTH_BYTES}. Get the file again."
                )
            (header_bytes,) = struct.unpack("<Q", prefix)
            if header_bytes > _MAX_HEADER_BYTES:
                raise error(
                    f"{path}: header too large. Got {header_bytes} bytes. Expected at most "
                    f"{_MAX_HEADER_BYTES}. This is not a safetensors file, or a damaged one."
                )
            if _LENGTH_BYTES + header_bytes > file_bytes:
                raise error(
                    f"{path}: truncated. Got {file_bytes} bytes. Expected a header of {header_bytes} bytes "
                    f"after the first {_LENGTH_BYTES}. Get the file again."
                )
            raw = file.read(header_bytes)
    fields = _parse(raw, path, error)
    metadata = _checked_metadata(fields.pop("__metadata__", None), path, error)
    data_offset = _LENGTH_BYTES + header_bytes
    entries = {
        name: _checked_entry(value, data_offset, f"{path}: tensor {name!r}", error) for name, value in fields.items()
    }
    _check_coverage(entries, data_offset, file_bytes, path, error)
    return SafetensorsHeader(entries, metadata, data_offset, file_bytes, hashlib.sha256(prefix + raw).hexdigest())


def read_entry(path: Path, entry: HeaderEntry, error: type[BpwiseError], new: NewTensor = torch.empty) -> Tensor:
    """Read one tensor into memory of its own; nothing stays mapped or open.

    Args:
        path: The file that ``entry`` was read from.
        entry: Place, shape and dtype of the tensor.
        error: What to raise.
        new: Makes the tensor.

    Returns:
        The tensor, of ``entry.shape`` and ``entry.dtype``, on the CPU.

    Raises:
        BpwiseError: As the type given by ``error``: the file cannot be read, or was cut since its header was read.
    """
    data = new((entry.size_bytes,), dtype=torch.uint8)
    with explained_reading(path, error), path.open("rb") as file:
        file.seek(entry.offset_bytes)
        got = file.readinto(data.numpy().data)
    if got != entry.size_bytes:
        raise error(
            f"{path}: changed while in use. Got {got} bytes at {entry.offset_bytes}. Expected "
            f"{entry.size_bytes}. Leave the file alone and run again."
        )
    return data.view(entry.dtype).reshape(entry.shape)


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a whole safetensors file to an open binary file.

    Tensors are laid out by falling element size, then by name, so that each is aligned and equal content
    gives equal bytes.

    Args:
        file: Where to write; its position must be 0.
        tensors: Tensors by name, of any shape, device and stride.
        metadata: Free-form strings, stored under ``__metadata__``.
    """
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in order:
        tensor = tensors[name]
        begin, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % _ALIGNMENT_BYTES)
    file.write(struct.pack("<Q", len(raw)) + raw)
    for name in order:
        file.write(tensor_bytes(tensors[name].cpu()))


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a CPU tensor as safetensors stores them."""
    # Little-endian machines only, like PyTorch's own builds.
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors as one safetensors file, atomically.

    Equal tensors and metadata give equal bytes, whatever the order of the mapping.

    Args:
        path: The file to make or replace.
        tensors: Tensors by name, of any shape, device and stride. Views and shared memory are written out in
            full.
        metadata: Free-form strings to store with them.

    Raises:
        WorkDirectoryError: The file cannot be written.
    """
    with atomic_file(path) as temporary, create(temporary) as file:
        write_tensors(file, tensors, metadata or {})


def load_tensors(
    path: Path, error: type[BpwiseError] = FormatError, *, new: NewTensor = torch.empty
) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file into memory of their own, on the CPU, in their stored dtypes.

    Args:
        path: The file.
        error: What to raise.
        new: Makes the tensors.

    Raises:
        BpwiseError: As the type given by ``error``: the file is missing or damaged.
    """
    header = read_header(Path(path), error)
    return {name: read_entry(Path(path), entry, error, new) for name, entry in header.entries.items()}


def load_metadata(path: Path, error: type[BpwiseError] = FormatError) -> dict[str, str]:
    """Read only the strings that ``save_tensors`` stored with the tensors; {} if there were none.

    Args:
        path: The file.
        error: What to raise.

    Raises:
        BpwiseError: As the type given by ``error``: the file is missing or damaged.
    """
    return read_header(Path(path), error).metadata


def _parse(raw: bytes, path: Path, error: type[BpwiseError]) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise error(f"{path}: the header names a tensor or a field twice. Get the file again from its source.")
        return result

    try:
        fields = json.loads(raw.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as cause:
        raise error(f"{path}: the header is not valid JSON ({cause}). The file is damaged: get it again.") from cause
    if not isinstance(fields, dict):
        raise error(f"{path}: wrong header. Got a JSON {type(fields).__name__}. Expected an object. Get it again.")
    try:
        "".join(fields).encode("utf-8")
    except UnicodeEncodeError as cause:  # half of a surrogate pair, which the reference implementation refuses too
        raise error(f"{path}: the header names a tensor in invalid Unicode. Get the file again.") from cause
    return cast("dict[str, Any]", fields)


def _checked_metadata(value: Any, path: Path, error: type[BpwiseError]) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(text, str) for text in value.values()):
        raise error(f"{path}: wrong __metadata__ in the header. Expected an object of strings. Get the file again.")
    return cast("dict[str, str]", value)


def _checked_entry(value: Any, data_offset: int, where: str, error: type[BpwiseError]) -> HeaderEntry:
    if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
        raise error(f"{where}: wrong header entry. Expected dtype, shape and data_offsets. Get the file again.")
    shape, offsets = value["shape"], value["data_offsets"]
    dtype = _DTYPES.get(value["dtype"]) if isinstance(value["dtype"], str) else None
    if dtype is None:
        raise error(
            f"{where}: unknown dtype. Got {value['dtype']!r}. Expected one of {', '.join(_DTYPES)}. "
            "Use the model's bfloat16 or float16 release."
        )
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS or math.prod(n for n in shape if n) >= 2**63:
        raise error(f"{where}: impossible shape in the header. Get the file again from its source.")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise error(f"{where}: impossible data_offsets in the header. Get the file again from its source.")
    size = offsets[1] - offsets[0]
    if size != math.prod(shape) * dtype.itemsize:
        raise error(
            f"{where}: wrong data size. Got {size} bytes. Expected {math.prod(shape) * dtype.itemsize} for "
            f"shape {tuple(shape)} in {value['dtype']}. Get the file again from its source."
        )
    return HeaderEntry(tuple(shape), dtype, data_offset + offsets[0], size)


def _is_sizes(value: Any) -> bool:
    # type() and not isinstance(): JSON's true is a bool, which Python counts as an int.
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _check_coverage(
    entries: dict[str, HeaderEntry], data_offset: int, file_bytes: int, path: Path, error: type[BpwiseError]
) -> None:
    # Data must run gapless to the end of the file: no tensor shares bytes with another, and nothing is hidden.
    position = data_offset
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset_bytes, item[1].size_bytes)):
        if entry.offset_bytes != position:
            what = "overlaps another tensor" if entry.offset_bytes < position else "leaves a gap before it"
            raise error(
                f"{path}: tensor {name!r} {what}. Got offset {entry.offset_bytes - data_offset}. Expected "
                f"{position - data_offset}. The file is damaged or forged: get it again from its source."
            )
        position += entry.size_bytes
        if position > file_bytes:
            raise error(
                f"{path}: truncated. Got {file_bytes} bytes. Expected tensor {name!r} to end at {position}. "
                "Get the file again."
            )
    if position != file_bytes:
        raise error(
            f"{path}: wrong size. Got {file_bytes} bytes. Expected {position} from the header. Get the file again."
        )
