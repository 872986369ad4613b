"""A Triton kernel that rounds a whole row group in one launch, for GPUs.

Legend: t_in is row i of column n of a row group, f_ij what row i takes from the error of row j, and a_in what the row
takes from other columns (``coupling``), all in steps of the column's scale. One after another
``moved_in = t_in + a_in - sum_{j<i} f_ij e_jn``, ``q_in = clamp(round(moved_in))`` and ``e_in = moved_in - q_in``.

Columns do not depend on each other, so each thread has one. It holds what all rows of its column have still to take
in registers, and adds to it one error at a time. The loops in ``feedback`` and ``coupling`` sum in the order of a
library of matrix products: a weight that is within some 1e-6 steps of the middle between two codes may get the other
one. The order here is fixed, and products are rounded before they are added (no fused operations): the same numbers on
every GPU, and in Triton's interpreter.

Imported only where there is a GPU, see ``feedback``: Triton comes with PyTorch's builds for them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["MOST_ROWS", "round_rows", "try_out"]

MOST_ROWS = 128
"""Rows of a group that registers hold."""

_COLUMNS = 32
"""Columns of a program: one a thread of a single warp."""

_OPTIONS: dict[str, Any] = {"num_warps": 1, "enable_fp_fusion": False}
"""Of Triton's compiler."""


@triton.jit  # type: ignore[untyped-decorator]
def _round_rows(
    steps: tl.tensor,
    feedback: tl.tensor,
    halves: tl.tensor,
    seen: tl.tensor,
    gains: tl.tensor,
    codes: tl.tensor,
    rows: int,
    columns: int,
    rank: int,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    # As `round_rows`, whose result goes to `codes`. ROWS: a power of two, not less than `rows`.
    row = tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside, used = row < rows, column < columns
    half = tl.load(halves + column, mask=used, other=1.0)
    shifts = tl.zeros((ROWS, COLUMNS), tl.float32)
    for k in range(rank):
        of_row = tl.load(seen + row * rank + k, mask=inside, other=0.0)
        of_column = tl.load(gains + k * columns + column, mask=used, other=0.0)
        shifts += of_row[:, None] * of_column[None, :]
    for i in range(rows):
        target = tl.load(steps + i * columns + column, mask=used, other=0.0)
        shares = tl.load(feedback + row * rows + i, mask=inside, other=0.0)
        moved = target + tl.sum(tl.where(row[:, None] == i, shifts, 0.0), axis=0)
        nearest = tl.minimum(tl.maximum(moved, -half), half - 1)
        # Rounds as torch.round does, half to even: from 2^23 on float32 has no fractions.
        nearest = (nearest + 12582912.0) - 12582912.0  # 1.5 * 2^23
        tl.store(codes + i * columns + column, nearest, mask=used)
        shifts -= shares[:, None] * (moved - nearest)[None, :]


def round_rows(steps: Tensor, feedback: Tensor, halves: Tensor, seen: Tensor, gains: Tensor) -> Tensor:
    """Round one row group with feedback between its rows: a single launch.

    Args:
        steps: What to represent, in steps of each column's scale, float32, shape (rows, columns), contiguous.
        feedback: What row i takes from the error of row j, float32, shape (rows, rows), zero for j >= i, contiguous.
        halves: Codes run from -half to half - 1; float32, shape (columns,), contiguous.
        seen: Each row's errors in other columns, float32, shape (rows, rank), contiguous; rank 0 for no others.
        gains: What ``seen`` moves each column by, in steps, float32, shape (rank, columns), contiguous.

    Returns:
        Codes, float32, shape (rows, columns).
    """
    (rows, columns), rank = steps.shape, seen.shape[1]
    codes = torch.empty_like(steps)
    with torch.cuda.device_of(steps):
        _round_rows[(triton.cdiv(columns, _COLUMNS),)](
            steps,
            feedback,
            halves,
            seen,
            gains,
            codes,
            rows,
            columns,
            rank,
            ROWS=triton.next_power_of_2(rows),
            COLUMNS=_COLUMNS,
            **_OPTIONS,
        )
    return codes


def try_out(device: torch.device) -> None:
    """Launch the kernel once: Triton needs a C compiler, and raises all kinds of things where it lacks something."""
    for rows, rank in ((32, 0), (MOST_ROWS, 1)):
        zeros = torch.zeros(rows, rows, device=device)
        round_rows(zeros, zeros, zeros[0], zeros[:, :rank].contiguous(), zeros[:rank])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
