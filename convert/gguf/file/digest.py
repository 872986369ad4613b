"""A GGUF file's digest of itself: the SHA-256 of its header and of all tensors, stored in its own metadata.

The digest is that of the header with zeros in the digest's place, followed by the digests of the tensors' data in their
order, as hexadecimal digits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import BinaryIO

from .emit import entry
from .header import GgufHeader, GgufTensor
from .metadata import DIGEST_KEY, DIGEST_ROOM

__all__ = ["file_digest", "tensor_digest", "with_digest"]

_READ_BYTES = 1 << 24


def with_digest(start: bytes, tensors: Iterable[str]) -> bytes:
    """Return a header with its digest, which takes the place of ``DIGEST_ROOM``; without one, the header as it is.

    Args:
        start: Everything before the data.
        tensors: Of each tensor in the file's order, what ``tensor_digest`` returns.
    """
    return start.replace(_entry(DIGEST_ROOM), _entry(_digest(start, tensors)), 1)


def file_digest(header: GgufHeader) -> tuple[str, str] | None:
    """Return the digest that a file carries, and the one that it should; None where it carries none."""
    stored = header.metadata.get(DIGEST_KEY)
    if not isinstance(stored, str):
        return None
    with header.path.open("rb") as file:
        start = file.read(header.data_offset_bytes).replace(_entry(stored), _entry(DIGEST_ROOM), 1)
        return stored, _digest(start, [tensor_digest(file, tensor) for tensor in header.tensors.values()])


def tensor_digest(file: BinaryIO, tensor: GgufTensor) -> str:
    """Return the SHA-256 of a tensor's data, hexadecimal; of a file that is too short, of what is there."""
    digest = hashlib.sha256()
    file.seek(tensor.offset_bytes)
    left = tensor.size_bytes
    while left > 0:
        piece = file.read(min(_READ_BYTES, left))
        if not piece:
            break
        digest.update(piece)
        left -= len(piece)
    return digest.hexdigest()


def _digest(start: bytes, tensors: Iterable[str]) -> str:
    return hashlib.sha256(start + "".join(tensors).encode()).hexdigest()


def _entry(digest: str) -> bytes:
    # With its key: anything may stand in another entry.
    return DIGEST_KEY.encode() + entry(digest)
