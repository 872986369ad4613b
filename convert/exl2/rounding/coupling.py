"""Rounding one row group with feedback between outputs too: set of outputs after set, see ``bpwise.linalg.outputs``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ....linalg.outputs import OutputFeedback, in_sets

__all__ = ["OUTPUT_SETS", "RowRounder", "round_in_sets", "round_set_by_set"]

RowRounder = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Rounds one row group of columns that do not depend on each other, as ``kernels.round_rows`` does."""

OUTPUT_SETS = 16
"""Sets of outputs that a linear is rounded in. Inside a set nothing is taken back: more gain a
little and take longer."""


def round_in_sets(targets: Tensor, feedback: Tensor, half: int, scales: Tensor, outputs: OutputFeedback) -> Tensor:
    """Round one row group, set after set of its columns and in each row after row.

    A row of a set depends on the rows before it in its own set, and on the same row of the sets before. So set s
    can be one row behind set s - 1: all sets are worked on at once, each step on a diagonal of (row, set) pairs.

    Args:
        targets: What to represent, in steps of each column's scale, float32, shape (rows, out).
        feedback: What the error of row j, in steps, takes from row i, float32, shape (rows, rows), zero for j >= i.
        half: Codes run from -half to half - 1.
        scales: Scale of each column, float32, shape (out,).
        outputs: How sets answer to each other.

    Returns:
        Codes, float32, shape (rows, out).
    """
    (rows, out), (sets, rank, columns) = targets.shape, outputs.gains.shape
    scale = in_sets(scales, sets)  # (sets, columns), 0 in the padding
    factor = outputs.factor * scale[:, :, None]
    last = rows + sets - 1
    # Row i of set s is worked on at step i + s: in a buffer (steps, sets, n), (sets + 1) n after that of set s - 1.
    wanted = targets.new_zeros(last, sets, columns)
    skewed = ((rows, sets, columns), (sets * columns, (sets + 1) * columns, 1))
    wanted.as_strided(*skewed).copy_(in_sets(targets, sets).transpose(0, 1))
    # A step's shift is one product: (what was seen of the sets before, feedback) times (gains, own errors so far).
    left = targets.new_zeros(last, sets, rank + last)
    width = rank + last
    left.as_strided((rows, sets, rows), (sets * width, (sets + 1) * width + 1, 1), rank).copy_(-feedback[:, None])
    right = targets.new_zeros(sets, width, columns)
    right[:, :rank] = outputs.gains / torch.where(scale > 0, scale, 1)[:, None]
    codes = torch.empty_like(wanted)
    seen = targets.new_zeros(sets, 1, rank)
    for step, (plain, shifts) in enumerate(zip(wanted.unsqueeze(2), left.unsqueeze(2), strict=True)):
        shifts[..., :rank] = seen
        moved = torch.baddbmm(plain, shifts, right)
        rounded = moved.round().clamp_(-half, half - 1)
        codes[step] = rounded[:, 0]
        right[:, rank + step] = (moved - rounded)[:, 0]
        seen[1:] = torch.baddbmm(seen, plain - rounded, factor)[:-1]
    return codes.as_strided(*skewed).transpose(1, 2).flatten(1)[:, :out]


def round_set_by_set(
    targets: Tensor, feedback: Tensor, half: int, scales: Tensor, outputs: OutputFeedback, round_rows: RowRounder
) -> Tensor:
    """As ``round_in_sets``, for devices that round all rows of a set in one launch.

    Args:
        targets: What to represent, in steps of each column's scale, float32, shape (rows, out).
        feedback: What the error of row j, in steps, takes from row i, float32, shape (rows, rows), zero for j >= i.
        half: Codes run from -half to half - 1.
        scales: Scale of each column, float32, shape (out,).
        outputs: How sets answer to each other.
        round_rows: Rounds a set.

    Returns:
        Codes, float32, shape (rows, out).
    """
    (rows, out), (sets, rank, columns) = targets.shape, outputs.gains.shape
    scale = in_sets(scales, sets)  # (sets, columns), 0 in the padding
    factor = outputs.factor * scale[:, :, None]
    gains = (outputs.gains / torch.where(scale > 0, scale, 1)[:, None]).contiguous()
    wanted = in_sets(targets, sets).contiguous()  # (sets, rows, columns)
    halves = targets.new_full((columns,), half)
    seen = targets.new_zeros(rows, rank)
    codes = []
    for plain, own_gains, own_factor in zip(wanted, gains, factor, strict=True):
        codes.append(round_rows(plain, feedback, halves, seen, own_gains))
        seen.addmm_(plain - codes[-1], own_factor)
    return torch.stack(codes, dim=2).flatten(1)[:, :out]
