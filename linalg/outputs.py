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

from .precision import in_float64

__all__ = ["OutputFeedback", "in_sets", "in_turn", "output_sets"]

_DAMPING = 0.1
"""Added to D, relative to the mean of G's diagonal."""

_SETS, _SET_OUTPUTS = 4, 256
"""Most sets of outputs that a linear is rounded in, and fewest outputs of one: with fewer, calls take longer than what
they compute."""


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
    def of(cls, fisher: Tensor, coupling: Tensor, sets: int) -> OutputFeedback | None:
        """Prepare the sets of one linear.

        Args:
            fisher: Diagonal of G, float32, shape (out,).
            coupling: V over the root of the diagonal, shape (out, rank), any floating dtype.
            sets: How many there are.

        Returns:
            The sets, or None where outputs do not correlate.
        """
        rank = coupling.shape[1]
        if rank == 0 or not bool(fisher.any()):
            return None
        exact = in_float64(fisher)
        factor = coupling.to(exact) * exact.sqrt()[:, None]
        diagonal = (exact - factor.square().sum(dim=1)).clamp(min=0) + _DAMPING * exact.mean()
        factors, scaled = (in_sets(x.T, sets).mT for x in (factor, factor / diagonal[:, None]))  # (sets, columns, rank)
        # From the last set to the first: every set sees itself and those after it.
        inner = (factors.mT @ scaled).flip(0).cumsum(dim=0).flip(0)
        inner = inner + torch.eye(rank, dtype=inner.dtype, device=inner.device)
        gains = torch.linalg.solve(inner, scaled.mT)
        return cls(factors.float().to(fisher.device), gains.float().to(fisher.device))


def in_sets(values: Tensor, sets: int) -> Tensor:
    """Deal the last dimension out to the sets: (..., out) becomes (sets, ..., columns), padded with zeros."""
    padding = -values.shape[-1] % sets
    padded: Tensor = nn.functional.pad(values, (0, padding))
    dealt: Tensor = padded.unflatten(-1, (-1, sets))
    return dealt.movedim(-1, 0)


def in_turn(weight: Tensor, outputs: OutputFeedback, rounded: Callable[[slice, Tensor], Tensor]) -> None:
    """Round a linear set after set, each making up for the errors of those before it.

    Args:
        weight: The weight to represent, float32, shape (K, out).
        outputs: The sets.
        rounded: Rounds a set: is given its columns in ``weight`` and what they are wanted to be, shape (K, columns),
            keeps what it makes of them, and returns its values, of the same shape.
    """
    seen = weight.new_zeros(len(weight), outputs.factor.shape[2])
    sets = len(outputs.factor)
    for first, (factor, gains) in enumerate(zip(outputs.factor, outputs.gains, strict=True)):
        columns = slice(first, None, sets)
        own = weight[:, columns]
        count = own.shape[1]
        values = rounded(columns, own + seen @ gains[:, :count])
        seen += (own - values) @ factor[:count]


def output_sets(outputs: int) -> int:
    """Return in how many sets so many outputs are best rounded, where a linear's input channels go one by one."""
    return max(1, min(_SETS, outputs // _SET_OUTPUTS))
