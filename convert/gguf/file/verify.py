"""Reads a GGUF file back from the disk, every tensor of it, and checks the format's rules."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ....errors import FormatError, UnsupportedModelError
from .header import GgufHeader, read_gguf_header
from .reader import GgufModel, read_values

__all__ = ["GgufVerification", "verify_gguf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufVerification:
    """What was read back, and what it takes.

    Attributes:
        architecture: As the file names it.
        known_architecture: Whether names and shapes of all tensors were checked against the metadata, too.
        tensors_by_type: Number of tensors of each type.
        weights: Number of values in all tensors.
        tensor_bits: Stored bits of all tensors, scales included, padding not.
        file_bytes: Size of the file, in bytes.
    """

    architecture: str
    known_architecture: bool
    tensors_by_type: Mapping[str, int]
    weights: int
    tensor_bits: int
    file_bytes: int

    @property
    def bpw(self) -> float:
        """Average bits per weight over all tensors; 0 if there are none."""
        return self.tensor_bits / self.weights if self.weights else 0.0


def verify_gguf(path: Path) -> GgufVerification:
    """Decode every tensor of a GGUF file, by whatever program, and check that it is finite and by the rules.

    Args:
        path: The file.

    Raises:
        FormatError: A rule of the format is broken, a value is NaN or infinite, or the file is one of several parts.
    """
    header = read_gguf_header(Path(path))
    known = _is_known(header)
    _check_end(header)
    counts: dict[str, int] = {}
    for tensor in header.tensors.values():
        if len(tensor.shape) == 1 and tensor.type.quantized:
            raise FormatError(
                f"{path}: {tensor.name!r} is a vector of type {tensor.type.name}, expected F32: llama.cpp computes "
                "with such vectors directly. Quantize again."
            )
        read_values(header.path, tensor)
        counts[tensor.type.name] = counts.get(tensor.type.name, 0) + 1
    return GgufVerification(
        architecture=str(header.metadata.get("general.architecture")),
        known_architecture=known,
        tensors_by_type=counts,
        weights=sum(math.prod(tensor.shape) for tensor in header.tensors.values()),
        tensor_bits=8 * sum(tensor.size_bytes for tensor in header.tensors.values()),
        file_bytes=header.file_bytes,
    )


def _is_known(header: GgufHeader) -> bool:
    try:
        GgufModel.open(header.path)
    except UnsupportedModelError:
        return False
    return True


def _check_end(header: GgufHeader) -> None:
    end = max((t.offset_bytes + t.size_bytes for t in header.tensors.values()), default=header.data_offset_bytes)
    if header.file_bytes - end >= header.alignment_bytes:
        raise FormatError(
            f"{header.path}: {header.file_bytes - end} bytes follow the last tensor, expected less than the "
            f"{header.alignment_bytes} that padding may take. Something was appended: get or make the file again."
        )
