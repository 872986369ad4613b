"""Description of a GGUF file for people."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from ....tables import Table, bytes_text
from ...model import Description, Verification
from .header import GgufHeader, GgufTensor

__all__ = ["all_tensors_bpw", "describe_gguf", "types_text", "verification_of"]

_SHOWN_VALUES = 8
_SHOWN_CHARACTERS = 100


def describe_gguf(header: GgufHeader) -> Description:
    """Return what a GGUF file says of itself, of whatever architecture."""
    tensors = header.tensors.values()
    weights = sum(math.prod(tensor.shape) for tensor in tensors)
    return Description(
        kind=f"GGUF file, version {header.version}",
        facts=(
            f"{len(tensors)} tensors, {weights / 1e6:.1f} million weights, {bytes_text(header.file_bytes)}",
            f"bits per weight: {all_tensors_bpw(tensors):.4f}, with metadata "
            f"{8 * header.file_bytes / max(weights, 1):.4f}",
            f"types: {types_text(tensors)}",
            *(f"{key}: {_metadata_value(value)}" for key, value in header.metadata.items()),
        ),
        table=Table(
            ("tensor", "shape", "type", "bpw"),
            tuple(
                (
                    tensor.name,
                    " x ".join(map(str, tensor.shape)),
                    tensor.type.name,
                    f"{tensor.type.bits_per_weight:.4g}",
                )
                for tensor in tensors
            ),
        ),
        content={
            "version": header.version,
            "weights": weights,
            "file_bytes": header.file_bytes,
            "bpw": all_tensors_bpw(tensors),
            "types": dict(_types(tensors)),
            "metadata": {key: _short(value) for key, value in header.metadata.items()},
            "tensors": [
                {
                    "name": tensor.name,
                    "shape": list(tensor.shape),
                    "type": tensor.type.name,
                    "bpw": tensor.type.bits_per_weight,
                }
                for tensor in tensors
            ],
        },
    )


def verification_of(header: GgufHeader, *, compared: bool, warnings: tuple[str, ...] = ()) -> Verification:
    """Return what a file with these tensors takes.

    Args:
        header: The file's, all of whose tensors were read back.
        compared: Whether they were compared with what was intended.
        warnings: What could not be checked, as lines.
    """
    tensors = header.tensors.values()
    quantized = sum(tensor.type.quantized for tensor in tensors)
    return Verification(
        quantized=quantized,
        others=len(tensors) - quantized,
        rates={"all tensors": all_tensors_bpw(tensors)},
        file_bytes=header.file_bytes,
        compared=compared,
        facts=(f"types: {types_text(tensors)}",),
        warnings=warnings,
    )


def all_tensors_bpw(tensors: Iterable[GgufTensor]) -> float:
    """Return the bits per weight over all tensors, scales included, padding and metadata excluded; 0 without any."""
    sizes = [(8 * tensor.size_bytes, math.prod(tensor.shape)) for tensor in tensors]
    return sum(bits for bits, _ in sizes) / max(1, sum(weights for _, weights in sizes))


def types_text(tensors: Iterable[GgufTensor]) -> str:
    """Return the number of tensors of each type, the most frequent first, as ``5 F32, 3 Q8_0``."""
    return ", ".join(f"{count} {name}" for name, count in _types(tensors))


def _types(tensors: Iterable[GgufTensor]) -> list[tuple[str, int]]:
    return Counter(tensor.type.name for tensor in tensors).most_common()


def _short(value: Any) -> Any:
    # A vocabulary would be most of the document.
    is_array = isinstance(value, (list, np.ndarray))
    return {"values": len(value)} if is_array and len(value) > _SHOWN_VALUES else value


def _metadata_value(value: Any) -> str:
    if isinstance(value, (list, np.ndarray)):
        return f"{len(value)} values" if len(value) > _SHOWN_VALUES else ", ".join(map(str, value))
    text = str(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
