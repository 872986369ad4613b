"""What one quantized linear is in EXL2: its numbers, its groups, its size in bits.

Notation of the format: a linear maps K input features to ``out`` output features; N is ``out`` rounded up to a
multiple of 32. Weights are stored as a matrix [K, N] (the transpose of a Hugging Face weight) whose rows, the input
features, are reordered by a permutation and cut into groups of one bit width each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...errors import FormatError, ShapeError

__all__ = [
    "COLUMN_MULTIPLE",
    "MAX_ROWS",
    "ROW_MULTIPLE",
    "WIDTHS",
    "QuantizedLinear",
    "RowGroup",
    "effective_scale",
    "linear_bits",
    "padded_columns",
]

WIDTHS = (8, 6, 5, 4, 3, 2)
"""Bit widths of the format, in the only order in which groups may follow each other."""

ROW_MULTIPLE = 32
"""Rows of a group come in multiples of this many."""

COLUMN_MULTIPLE = 32
"""Stored columns are padded to a multiple of this many."""

MAX_ROWS = 65536
"""Input features that a 16-bit permutation can index."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Consecutive stored rows that share a bit width and a scale ceiling.

    Attributes:
        bits: Bits per weight code, one of ``WIDTHS``.
        rows: Number of stored rows, a positive multiple of 32.
    """

    bits: int
    rows: int


def padded_columns(out_features: int) -> int:
    """Return N, the number of stored columns: ``out_features`` rounded up to a multiple of 32."""
    return -(-out_features // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def linear_bits(out_features: int, groups: Iterable[RowGroup]) -> int:
    """Return the stored size of one linear in bits, all five ``q_*`` tensors counted, bias left out.

    Source: format document, section 5: codes, a 16-bit ceiling and two 16-bit entries per group, 4-bit scale codes,
    32 bits of permutation per row.
    """
    columns = padded_columns(out_features)
    return sum(g.rows * columns * g.bits + 48 + 4 * columns + 32 * g.rows for g in groups)


def effective_scale(ceilings: Tensor, scale_codes: Tensor) -> Tensor:
    """Return the scale that EXL2 readers use, with both of their fp16 roundings.

    Args:
        ceilings: ``q_scale_max``, float16, shape (...); one per group.
        scale_codes: Integers 0 to 15, shape (..., N).

    Returns:
        ``fp16((code + 1)^2 * fp16(ceiling / 256))``, float16, shape (..., N).
    """
    unit = (ceilings.float() / 256).half().float()
    return (unit.unsqueeze(-1) * (scale_codes.float() + 1).square()).half()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class QuantizedLinear:
    """One linear as integers, before bit packing. Columns are unpadded; rows stand in stored order.

    Attributes:
        groups: Row groups in stored order, widths never increasing, rows summing to K.
        codes: Weight codes, uint8, shape (K, out); a code c of width b means the integer c - 2^(b-1).
        scale_codes: Scale codes 0 to 15, uint8, shape (groups, out).
        ceilings: Scale ceilings, float16, shape (groups,), finite and not negative.
        order: Input feature of each stored row, int64, shape (K,), a permutation.
        bias: float16, shape (out,), or None.
    """

    groups: tuple[RowGroup, ...]
    codes: Tensor
    scale_codes: Tensor
    ceilings: Tensor
    order: Tensor
    bias: Tensor | None = None

    @property
    def in_features(self) -> int:
        """K, the number of input features."""
        return int(self.codes.shape[0])

    @property
    def out_features(self) -> int:
        """Number of output features, padding excluded."""
        return int(self.codes.shape[1])

    @property
    def stored_bits(self) -> int:
        """Stored size in bits, padding and overhead included, bias excluded."""
        return linear_bits(self.out_features, self.groups)

    def validate(self, name: str) -> None:
        """Check every rule of the format that a reader would trip over.

        Args:
            name: Full name of the linear, for error messages.

        Raises:
            ShapeError: Two of the tensors disagree in shape.
            FormatError: A width, group, ceiling, code or the permutation is not what the format allows.
        """
        rows, columns = self.in_features, self.out_features
        count = len(self.groups)
        expected = {
            "scale codes": (self.scale_codes, (count, columns)),
            "scale ceilings": (self.ceilings, (count,)),
            "row order": (self.order, (rows,)),
        }
        if self.bias is not None:
            expected["bias"] = (self.bias, (columns,))
        for what, (tensor, shape) in expected.items():
            if tuple(tensor.shape) != shape:
                raise ShapeError(name, what, got=tuple(tensor.shape), expected=shape)
        self._validate_groups(name)
        if self.ceilings.dtype != torch.float16 or not bool(
            torch.isfinite(self.ceilings).all() and (self.ceilings >= 0).all()
        ):
            raise FormatError(f"{name}: scale ceilings must be finite, non-negative float16.")
        if not torch.equal(self.order.sort().values, torch.arange(rows, device=self.order.device)):
            raise FormatError(f"{name}: the row order is not a permutation of 0 to {rows - 1}.")
        if int(self.scale_codes.max()) > 15:
            raise FormatError(f"{name}: scale codes must be from 0 to 15, got {int(self.scale_codes.max())}.")
        first = 0
        for group in self.groups:
            largest = int(self.codes[first : first + group.rows].max())
            if largest >= 1 << group.bits:
                raise FormatError(f"{name}: code {largest} does not fit in a {group.bits}-bit group.")
            first += group.rows

    def _validate_groups(self, name: str) -> None:
        widths = [g.bits for g in self.groups]
        if not widths or any(b not in WIDTHS for b in widths):
            raise FormatError(f"{name}: bit widths must be among {WIDTHS}, got {sorted(set(widths))}.")
        if widths != sorted(widths, reverse=True):
            raise FormatError(f"{name}: bit widths must never increase from group to group, got {widths}.")
        if any(g.rows <= 0 or g.rows % ROW_MULTIPLE for g in self.groups):
            raise FormatError(f"{name}: every group must have a positive multiple of {ROW_MULTIPLE} rows.")
        total = sum(g.rows for g in self.groups)
        if total != self.in_features or total > MAX_ROWS:
            raise FormatError(
                f"{name}: groups hold {total} rows, expected {self.in_features} and at most {MAX_ROWS}."
            )

    def dequantize(self) -> Tensor:
        """Return the dense weight as a Hugging Face linear holds it: float16, shape (out, K).

        Computed from the integers alone, with one fp16 rounding per weight, as EXL2 readers reconstruct it.
        """
        scale = effective_scale(self.ceilings, self.scale_codes).float()
        stored = torch.empty(self.codes.shape, dtype=torch.float16, device=self.codes.device)
        first = 0
        for index, group in enumerate(self.groups):
            rows = slice(first, first + group.rows)
            stored[rows] = ((self.codes[rows].float() - (1 << (group.bits - 1))) * scale[index]).half()
            first += group.rows
        dense = torch.empty_like(stored)
        dense[self.order] = stored
        return dense.T.contiguous()
