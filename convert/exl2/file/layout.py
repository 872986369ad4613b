"""How EXL2 lays out a linear: widths, groups, padding, size in bits. Plain integers, no tensors.

Notation of the format: a linear maps K input features to ``out`` output features; N is ``out`` rounded up to
a multiple of 32. Weights are stored as a matrix [K, N] (the transpose of a Hugging Face weight) whose rows,
the input features, are reordered by a permutation and cut into groups of one bit width each.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "COLUMN_MULTIPLE",
    "MAX_ROWS",
    "ROW_MULTIPLE",
    "WIDTHS",
    "RowGroup",
    "group_rows",
    "linear_bits",
    "padded_columns",
]

WIDTHS = (8, 6, 5, 4, 3, 2)
"""Bit widths of the format, in the only order in which groups may follow each other."""

ROW_MULTIPLE = 32
"""Rows of a group come in multiples of this many; only a last group of width 2 may have 16 more."""

COLUMN_MULTIPLE = 32
"""Stored columns are padded to a multiple of this many."""

MAX_ROWS = 65536
"""Input features that a 16-bit permutation can index."""


@dataclass(frozen=True, slots=True)
class RowGroup:
    """Consecutive stored rows that share a bit width and a scale largest scale.

    Attributes:
        bits: Bits per weight code, one of ``WIDTHS``.
        rows: Number of stored rows, a positive multiple of 32 (a last group of width 2 may be 16 mod 32).
    """

    bits: int
    rows: int


def padded_columns(out_features: int) -> int:
    """Return N, the number of stored columns: ``out_features`` rounded up to a multiple of 32."""
    return -(-out_features // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


def linear_bits(out_features: int, groups: Iterable[RowGroup]) -> int:
    """Return the stored size of one linear in bits, all five ``q_*`` tensors counted, bias left out.

    Source: format document, section 5: codes, a 16-bit largest scale and two 16-bit entries per group, 4-bit scale
    codes, 32 bits of permutation per row.
    """
    columns = padded_columns(out_features)
    return sum(g.rows * columns * g.bits + 48 + 4 * columns + 32 * g.rows for g in groups)


def group_rows(in_features: int, group_size: int) -> list[int]:
    """Return the rows of each group: ``group_size`` each, the last one shorter if need be."""
    full, rest = divmod(in_features, group_size)
    return [group_size] * full + ([rest] if rest else [])
