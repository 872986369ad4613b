"""Which outputs of a linear act together on the loss: a low-rank picture of their Fisher matrix, from one pass.

The Fisher matrix G = mean g g^T, g = dL/dy, has out^2 entries: too many to keep, and nearly all of it that rounding can
use lies in its leading directions (32 of them bring the whole of what the full matrix does). So G is only ever
multiplied by a few random directions while tokens stream by.
Source: Nystrom approximation from a sketch, Tropp et al., Fixed-rank approximation of a positive-semidefinite matrix
from streaming data (2017), algorithm 3.

Notes:
    With random orthonormal directions O, shape (out, 64), and ``Y = G O``, summed over tokens as ``g (g^T O)``:
    ``G ~ Y (O^T Y)^-1 Y^T``, cut to its 32 leading eigenvectors V V^T. What is kept is ``C = diag(G)^-1/2 V``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...linalg.precision import in_float64
from ...linalg.sampling import subsample_tokens

__all__ = ["COUPLING_RANK", "SKETCHED", "FisherSketch"]

COUPLING_RANK = 32
"""Directions of the Fisher matrix that are kept."""

_TINY = 1e-30
"""Keeps gradients that are zero from being divided by."""

SKETCHED = 64
"""Random directions that they are found with."""


class FisherSketch:
    """Sums of g g^T times random directions, over tokens that arrive in micro-batches."""

    def __init__(self, outputs: int, device: torch.device) -> None:
        """Start from nothing; ``outputs`` is the length of g."""
        rng = torch.Generator().manual_seed(outputs)
        directions = torch.randn(outputs, min(SKETCHED, outputs), generator=rng)
        self._directions = torch.linalg.qr(directions).Q.to(device)
        self._sums = torch.zeros(self._directions.shape, device=device)
        self._rng = rng

    def add(self, gradients: Tensor, squares: Tensor) -> None:
        """Add some tokens; of those that hardly matter only a part, which stands for all of them.

        Args:
            gradients: g of each, float32, shape (tokens, outputs).
            squares: |g|^2 of each, shape (tokens,).
        """
        kept, given = subsample_tokens(squares, self._rng)
        gradients = gradients[kept] * (given / squares[kept].clamp(min=_TINY)).sqrt()[:, None]
        self._sums.addmm_(gradients.T, gradients @ self._directions)

    def coupling(self, fisher: Tensor) -> Tensor:
        """Return the leading directions of G, divided by the root of its diagonal.

        Args:
            fisher: The diagonal of G, summed over the same tokens, float32, shape (outputs,).

        Returns:
            C, float16, shape (outputs, at most ``COUPLING_RANK``): off the diagonal, G_mn is close to
            ``sqrt(G_mm G_nn) (C C^T)_mn``. All zero if no gradient arrived.
        """
        rank = min(COUPLING_RANK, len(fisher))
        directions, sums = in_float64(self._directions), in_float64(self._sums)
        shift = sums.norm() * 1e-7  # float32 sums: the matrix is positive semidefinite only up to their rounding
        sums = sums + shift * directions
        inner = directions.T @ sums
        lower, failed = torch.linalg.cholesky_ex((inner + inner.T) / 2)
        if int(failed):
            return torch.zeros(len(fisher), rank, dtype=torch.float16, device=fisher.device)
        root = torch.linalg.solve_triangular(lower, sums.T, upper=False).T
        vectors, sizes, _ = torch.linalg.svd(root, full_matrices=False)
        factor = vectors[:, :rank] * sizes[:rank]
        # Rounding may leave more than the diagonal has; a coupling has no entry above 1.
        scaled = (factor / in_float64(fisher).sqrt().clamp(min=1e-30)[:, None]).clamp(-1, 1).half()
        return torch.where(fisher[:, None] > 0, scaled.to(fisher.device), 0.0)
