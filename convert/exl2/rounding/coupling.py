"""Feedback between outputs: what an error in some outputs of a linear does to the loss, others can take back.

Legend: dW (K, out) is a linear's error; H the Gram matrix of its inputs; G = mean g g^T over tokens, g = dL/dy, the
Fisher matrix of its outputs. The damage is ``0.5 tr(G dW^T H dW)``. Outputs are rounded set by set; with dW_D the error
of the sets that are done, the rest does best to err by ``-dW_D G_DR G_RR^-1``, whatever H is. G is kept as
``diag(D) + V V^T`` with few columns V, so that ``G_DR G_RR^-1 = V_D (1 + V_R^T D_R^-1 V_R)^-1 V_R^T D_R^-1``.
Source: two-sided feedback of YAQA (Tseng et al., arXiv 2505.22988); the low rank and the sets are ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....linalg.precision import in_float64

__all__ = ["OutputFeedback", "RowRounder", "round_in_sets", "round_set_by_set"]

RowRounder = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""Rounds one row group of columns that do not depend on each other, as ``kernels.round_rows`` does."""

_SETS = 16
"""Sets of outputs that a linear is rounded in. Inside a set nothing is taken back: more gain a
little and take longer."""

_DAMPING = 0.1
"""Added to D, relative to the mean of G's diagonal."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputFeedback:
    """The sets of a linear's outputs, and how each makes up for the errors of those before it.

    Set s of n takes the outputs s, s + n, s + 2 n ...: the neighbours of an output, which correlate with it most, are
    in other sets. Sets that come out one short are filled up with zeros.

    Attributes:
        factor: V of each set, float32, shape (sets, columns, rank).
        gains: For each set, ``(1 + V_R^T D_R^-1 V_R)^-1 V_C^T D_C^-1`` with R the columns from this set on and C
            those of the set itself, float32, shape (sets, rank, columns). A set moves by -(dW_D V_D) times this.
    """

    factor: Tensor
    gains: Tensor

    @classmethod
    def of(cls, fisher: Tensor, coupling: Tensor) -> OutputFeedback | None:
        """Prepare the sets of one linear.

        Args:
            fisher: Diagonal of G, float32, shape (out,).
            coupling: V over the root of the diagonal, shape (out, rank), any floating dtype.

        Returns:
            The sets, or None where outputs do not correlate.
        """
        rank = coupling.shape[1]
        if rank == 0 or not bool(fisher.any()):
            return None
        exact = in_float64(fisher)
        factor = coupling.to(exact) * exact.sqrt()[:, None]
        diagonal = (exact - factor.square().sum(dim=1)).clamp(min=0) + _DAMPING * exact.mean()
        factors, scaled = (in_sets(x.T).mT for x in (factor, factor / diagonal[:, None]))  # (sets, columns, rank)
        # From the last set to the first: every set sees itself and those after it.
        inner = (factors.mT @ scaled).flip(0).cumsum(dim=0).flip(0)
        inner = inner + torch.eye(rank, dtype=inner.dtype, device=inner.device)
        gains = torch.linalg.solve(inner, scaled.mT)
        return cls(factors.float().to(fisher.device), gains.float().to(fisher.device))


def in_sets(values: Tensor) -> Tensor:
    """Deal the last dimension out to the sets: (..., out) becomes (sets, ..., columns), padded with zeros."""
    padding = -values.shape[-1] % _SETS
    padded: Tensor = nn.functional.pad(values, (0, padding))
    dealt: Tensor = padded.unflatten(-1, (-1, _SETS))
    return dealt.movedim(-1, 0)


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
    scale = in_sets(scales)  # (sets, columns), 0 in the padding
    factor = outputs.factor * scale[:, :, None]
    last = rows + sets - 1
    # Row i of set s is worked on at step i + s: in a buffer (steps, sets, n), (sets + 1) n after that of set s - 1.
    wanted = targets.new_zeros(last, sets, columns)
    skewed = ((rows, sets, columns), (sets * columns, (sets + 1) * columns, 1))
    wanted.as_strided(*skewed).copy_(in_sets(targets).transpose(0, 1))
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
    (rows, out), (_, rank, columns) = targets.shape, outputs.gains.shape
    scale = in_sets(scales)  # (sets, columns), 0 in the padding
    factor = outputs.factor * scale[:, :, None]
    gains = (outputs.gains / torch.where(scale > 0, scale, 1)[:, None]).contiguous()
    wanted = in_sets(targets).contiguous()  # (sets, rows, columns)
    halves = targets.new_full((columns,), half)
    seen = targets.new_zeros(rows, rank)
    codes = []
    for plain, own_gains, own_factor in zip(wanted, gains, factor, strict=True):
        codes.append(round_rows(plain, feedback, halves, seen, own_gains))
        seen.addmm_(plain - codes[-1], own_factor)
    return torch.stack(codes, dim=2).flatten(1)[:, :out]
