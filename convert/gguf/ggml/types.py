"""The table of ggml's tensor types: plain data, source ggml's ``ggml.h`` and ``ggml-common.h``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ....errors import ConfigError, ShapeError

__all__ = ["GGML_TYPES", "TYPES", "GgmlType", "ggml_type"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GgmlType:
    """How ggml stores the weights of a row.

    Attributes:
        name: ggml's name, in capitals but for the K, as llama-quantize prints it: ``Q4_K``.
        id: Number of the type in GGUF files.
        block_weights: Weights in a block; a row is a whole number of blocks.
        block_bytes: Bytes of a block, scales included.
        needs_importance: Whether ggml's encoder cannot work without importances.
    """

    name: str
    id: int
    block_weights: int
    block_bytes: int
    needs_importance: bool = False

    @property
    def bits_per_weight(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.block_bytes / self.block_weights

    @property
    def quantized(self) -> bool:
        """Whether weights are stored in blocks with scales, and not as floating-point numbers."""
        return self.block_weights > 1

    def fits(self, row_weights: int) -> bool:
        """Return whether a row of that many weights is a whole number of blocks."""
        return row_weights % self.block_weights == 0

    def row_bytes(self, row_weights: int) -> int:
        """Return the bytes of a row of that many weights.

        Raises:
            ShapeError: The row is not a whole number of blocks.
        """
        if not self.fits(row_weights):
            expected = (row_weights // self.block_weights * self.block_weights,)
            raise ShapeError(self.name, "a row, to be whole blocks,", got=(row_weights,), expected=expected)
        return row_weights // self.block_weights * self.block_bytes


def _kind(number: int, name: str, block_weights: int, block_bytes: int) -> GgmlType:
    needs_importance = name in ("IQ2_XXS", "IQ2_XS", "IQ1_S")
    return GgmlType(
        name=name,
        id=number,
        block_weights=block_weights,
        block_bytes=block_bytes,
        needs_importance=needs_importance,
    )


GGML_TYPES: Mapping[int, GgmlType] = {
    kind.id: kind
    for kind in (
        _kind(0, "F32", 1, 4),
        _kind(1, "F16", 1, 2),
        _kind(2, "Q4_0", 32, 18),
        _kind(3, "Q4_1", 32, 20),
        _kind(6, "Q5_0", 32, 22),
        _kind(7, "Q5_1", 32, 24),
        _kind(8, "Q8_0", 32, 34),
        _kind(9, "Q8_1", 32, 40),
        _kind(10, "Q2_K", 256, 84),
        _kind(11, "Q3_K", 256, 110),
        _kind(12, "Q4_K", 256, 144),
        _kind(13, "Q5_K", 256, 176),
        _kind(14, "Q6_K", 256, 210),
        _kind(15, "Q8_K", 256, 292),
        _kind(16, "IQ2_XXS", 256, 66),
        _kind(17, "IQ2_XS", 256, 74),
        _kind(18, "IQ3_XXS", 256, 98),
        _kind(19, "IQ1_S", 256, 50),
        _kind(20, "IQ4_NL", 32, 18),
        _kind(21, "IQ3_S", 256, 110),
        _kind(22, "IQ2_S", 256, 82),
        _kind(23, "IQ4_XS", 256, 136),
        _kind(24, "I8", 1, 1),
        _kind(25, "I16", 1, 2),
        _kind(26, "I32", 1, 4),
        _kind(27, "I64", 1, 8),
        _kind(28, "F64", 1, 8),
        _kind(29, "IQ1_M", 256, 56),
        _kind(30, "BF16", 1, 2),
        _kind(34, "TQ1_0", 256, 54),
        _kind(35, "TQ2_0", 256, 66),
        _kind(39, "MXFP4", 32, 17),
        _kind(40, "NVFP4", 64, 36),
        _kind(41, "Q1_0", 128, 18),
    )
}
"""All types that a file may hold, by their number in it; missing numbers were given up by llama.cpp."""

_NOT_ENCODED = ("I8", "I16", "I32", "I64", "F64", "Q8_1", "Q8_K", "NVFP4", "Q1_0")

TYPES: Mapping[str, GgmlType] = {
    kind.name: kind
    for kind in sorted(GGML_TYPES.values(), key=lambda kind: (-kind.bits_per_weight, kind.name))
    if kind.name not in _NOT_ENCODED
}
"""Every type that weights can be encoded to, by name, the largest first.

Three young types are left out, though ggml's library encodes them:

- NVFP4 never pays. IQ4_NL has its size, fits every row that it fits, is known to all readers and has about half its
  squared error. NVFP4's scales hold three bits of mantissa and are made for weights divided by one factor a tensor,
  which a tensor of its own would have to hold.
- Q1_0 and Q2_0 (42) are made for models trained on them. ggml scales their rows by the mean or the largest absolute
  weight, without a search. The Python package gguf 0.19, by which outputs are read back, decodes neither, and does
  not know Q2_0 at all.
"""


def ggml_type(name: str) -> GgmlType:
    """Return the type of that name, one of ``TYPES``; upper and lower case are the same.

    Raises:
        ConfigError: There is no such type.
    """
    try:
        return TYPES[name.upper()]
    except KeyError:
        raise ConfigError(
            f"ggml type: unknown name. Got {name!r}. Expected one of {', '.join(TYPES)}. Choose another."
        ) from None
