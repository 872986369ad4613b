"""Feedback between outputs: what an error in some outputs of a linear does to the loss, others can take back.

Legend: dW (K, out) is a linear's error; H the Gram matrix of its inputs; G = mean g g^T over tokens, g = dL/dy, the
Fisher matrix of its outputs. The damage is ``0.5 tr(G dW^T H dW)``. Outputs are rounded set by set; with dW_D the error
of the sets that are done, the rest does best to err by ``-dW_D G_DR G_RR^-1``, whatever H is. G is kept as
``diag(D) + V V^T`` with few columns V, so that ``G_DR G_RR^-1 = V_D (1 + V_R^T D_R^-1 V_R)^-1 V_R^T D_R^-1``.
Source: two-sided feedback of YAQA (Tseng et al., arXiv 2505.22988); the low rank and the sets are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["OutputFeedback"]

_SETS = 8
"""Sets of outputs that a linear is rounded in. Inside a set nothing is taken back, so more sets gain a little
more, and take longer."""

_SMALLEST_SET = 32
"""Fewer columns than this at once cost more time than they gain."""

_DAMPING = 0.1
"""Added to D, relative to the mean of G's diagonal."""


@dataclass(frozen=True, slots=True, eq=False)
class OutputFeedback:
    """The sets of a linear's outputs, and how each answers to the errors of those before it.

    Attributes:
        order: Output of each column, the sets one after another, int64, shape (out,). A set takes every n-th output, so
            that the neighbours of an output, which correlate with it most, are in other sets.
        sets: Columns of each set.
        factor: V, in this order, float32, shape (out, rank).
        answers: For each set, ``(1 + V_R^T D_R^-1 V_R)^-1 V_C^T D_C^-1`` with R the columns from this set on and C those
            of the set itself, float32, shape (rank, columns). A set moves by -(dW_D V_D) times this.
    """

    order: Tensor
    sets: tuple[slice, ...]
    factor: Tensor
    answers: tuple[Tensor, ...]

    @classmethod
    def of(cls, fisher: Tensor, coupling: Tensor) -> OutputFeedback | None:
        """Prepare the sets of one linear.

        Args:
            fisher: Diagonal of G, float32, shape (out,).
            coupling: V over the root of the diagonal, shape (out, rank), any floating dtype.

        Returns:
            The sets, or None where outputs do not correlate or are too few for two sets.
        """
        columns, rank = coupling.shape
        count = min(_SETS, columns // _SMALLEST_SET)
        if rank == 0 or count < 2 or not bool(fisher.any()):
            return None
        order = torch.cat([torch.arange(first, columns, count, device=fisher.device) for first in range(count)])
        exact = fisher[order].double()
        factor = coupling.to(fisher.device)[order].double() * exact.sqrt()[:, None]
        diagonal = (exact - factor.square().sum(dim=1)).clamp(min=0) + _DAMPING * exact.mean()
        scaled = factor / diagonal[:, None]
        sizes = [len(range(first, columns, count)) for first in range(count)]
        ends = torch.tensor(sizes).cumsum(dim=0).tolist()
        sets = tuple(slice(end - size, end) for end, size in zip(ends, sizes, strict=True))
        inner = torch.eye(rank, dtype=torch.float64, device=fisher.device)
        answers = []
        for part in reversed(sets):
            inner = inner + factor[part].T @ scaled[part]
            answers.append(torch.linalg.solve(inner, scaled[part].T).float())
        return cls(order, sets, factor.float(), tuple(reversed(answers)))
