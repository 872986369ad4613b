"""Safetensors files written tensor by tensor, so that memory never holds a whole shard.

A safetensors file begins with a header that names every tensor and its place. Sizes of quantized linears are
known only once they have been made, so room for the header is set aside, the data appended, and the header
then filled in and padded with spaces, which the format allows for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from torch import Tensor

from .operations import create, replace
from .safetensors_file import DTYPE_NAMES, tensor_bytes

__all__ = ["DEFAULT_SHARD_BYTES", "ShardWriter", "header_bytes", "tensor_sha256"]

DEFAULT_SHARD_BYTES = 8192 << 20
"""Largest file, in bytes, unless a single linear is larger: 8192 MiB, as the official converter."""

_ALIGNMENT_BYTES = 8

_HEADER_ENTRY_BYTES = 200
"""Upper bound of one header entry without its name: dtype, up to four dimensions and two offsets."""


def header_bytes(names: Iterable[str]) -> int:
    """Return the room that is set aside for the header of a file which may hold these tensors, its length excluded."""
    room = 64 + sum(len(json.dumps(name)) + _HEADER_ENTRY_BYTES for name in names)
    return -(-room // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES


class ShardWriter:
    """Writes tensors into ``<stem>.safetensors``, or several ``<stem>-00001-of-0000N.safetensors``.

    Use as a context manager; files get their final names only in :meth:`finish`.
    """

    def __init__(self, directory: Path, stem: str, *, names: Iterable[str], shard_bytes: int) -> None:
        """Prepare to write; nothing is created yet.

        Args:
            directory: Existing directory for the files.
            stem: First part of the file names.
            names: Every tensor that may be written; sets the room kept for headers.
            shard_bytes: A file is closed before it would grow beyond this many bytes.
        """
        self._directory = directory
        self._stem = stem
        self._shard_bytes = shard_bytes
        self._waiting = set(names)
        self._closed: list[tuple[Path, list[str]]] = []
        self._file: BinaryIO | None = None
        self._entries: dict[str, dict[str, object]] = {}
        self._deferred: dict[str, Tensor] = {}
        self._header_bytes = 0
        self._data_bytes = 0
        self._total_bytes = 0

    def __enter__(self) -> ShardWriter:
        """Return the writer itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the file that an exception may have left open."""
        if self._file is not None:
            self._file.close()
            self._file = None

    @property
    def total_bytes(self) -> int:
        """Bytes of tensor data accepted so far, headers excluded."""
        return self._total_bytes

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Append tensors that must stand in one file: a linear with all its parts, or a single tensor.

        Args:
            tensors: CPU tensors by name, each name among those announced and not written before.
        """
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        waiting = sum(tensor.numel() * tensor.element_size() for tensor in self._deferred.values())
        if self._file is not None:
            reached = 8 + self._header_bytes + self._data_bytes + waiting + size
            if reached > self._shard_bytes:
                self._close_shard()
        if self._file is None:
            self._open_shard()
        for name, tensor in tensors.items():
            self._waiting.remove(name)
            # Data has no gaps, so an odd-sized tensor would misalign all that follow it: such ones go last.
            if tensor.numel() * tensor.element_size() % _ALIGNMENT_BYTES:
                self._deferred[name] = tensor.clone()
            else:
                self._append(name, tensor)
        self._total_bytes += size

    def finish(self) -> dict[str, str]:
        """Close the last file and give all files their final names.

        Returns:
            For each tensor name, the name of the file that holds it.
        """
        if self._file is not None:
            self._close_shard()
        count = len(self._closed)
        location: dict[str, str] = {}
        for index, (path, names) in enumerate(self._closed, start=1):
            part = "" if count == 1 else f"-{index:05d}-of-{count:05d}"
            final = self._directory / f"{self._stem}{part}.safetensors"
            replace(path, final)
            location.update(dict.fromkeys(names, final.name))
        return location

    def _open_shard(self) -> None:
        path = self._directory / f"{self._stem}-{len(self._closed) + 1:05d}.partial"
        self._header_bytes = header_bytes(self._waiting)
        self._data_bytes = 0
        self._entries = {}
        self._file = create(path)
        self._file.seek(8 + self._header_bytes)
        self._closed.append((path, []))

    def _append(self, name: str, tensor: Tensor) -> None:
        assert self._file is not None
        data = tensor_bytes(tensor)
        self._file.write(data)
        self._entries[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [self._data_bytes, self._data_bytes + data.nbytes],
        }
        self._data_bytes += data.nbytes
        self._closed[-1][1].append(name)

    def _close_shard(self) -> None:
        assert self._file is not None
        for name, tensor in sorted(self._deferred.items(), key=lambda item: -item[1].element_size()):
            self._append(name, tensor)
        self._deferred = {}
        header = json.dumps({"__metadata__": {"format": "pt"}, **self._entries}, separators=(",", ":")).encode()
        assert len(header) <= self._header_bytes, "the room kept for a safetensors header was too small"
        self._file.seek(0)
        self._file.write(self._header_bytes.to_bytes(8, "little") + header.ljust(self._header_bytes))
        self._file.close()
        self._file = None


def tensor_sha256(tensor: Tensor) -> str:
    """Return the SHA-256, in hexadecimal, of a CPU tensor's bytes as safetensors would store them."""
    return hashlib.sha256(tensor_bytes(tensor)).hexdigest()
