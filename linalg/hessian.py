"""The Cholesky factor of a Gram matrix that error feedback needs, safely damped.

Notes:
    With d = damping * mean(diag H): ``H + d I = R R^T``, R upper triangular. An error ``D = W - Q`` costs
    ``tr(D^T (H + d I) D) = |R^T D|^2``, and row k of ``E = R^T D`` is
    ``e_k = R_kk (w_k - q_k) + sum_{j<k} R_jk (w_j - q_j)``: with the rows before it done, the best that row k can be is
    ``w_k + sum_{j<k} (R_jk / R_kk) (w_j - q_j)``, and what it misses of that costs R_kk^2 times its square. R is the
    inverse of the factor U that GPTQ works with, ``(H + d I)^-1 = U^T U`` (Frantar et al., arXiv 2210.17323, section
    3.3), so feedback needs no inverse of H.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .precision import in_float64, precise_device

__all__ = [
    "FEW_CHANNELS",
    "SIGNS",
    "Hessian",
    "HessianFactor",
    "damped_solve",
    "factor_hessian",
    "inverse_diagonal",
    "random_signs",
    "solve_transposed",
]

_DAMPING_STEPS = (1.0, 10.0, 50.0)
"""Damping is raised by these factors, in turn, while the factorisation fails."""

_BLOCK = 256
"""Columns that are factored together, and rows that are copied at a time."""

_LARGEST_ERROR = 0.03
"""Relative error of R_kk that float32 may make at worst; above it the factor is computed in float64."""

FEW_CHANNELS = 2048
"""Up to this many input channels, K^3 operations cost little beside the passes: diagonals of inverses are exact, and
damping and ridge are chosen on all channels. Above it, random vectors and every second channel stand in. Held-out
traces have a limit of their own (``heldout``)."""

SIGNS = 256
"""Random vectors that a diagonal is estimated with."""


@dataclass(frozen=True, slots=True, eq=False)
class HessianFactor:
    """Upper triangular R with ``H + damping * mean(diag H) * I = R R^T``, rows in the order that was asked for.

    Attributes:
        upper: R, float32, shape (K, K).
        damping: Damping that was used, relative to the mean of H's diagonal. Infinite if no damping helped: R is
            then diagonal, so that rounding goes without feedback.
    """

    upper: Tensor
    damping: float


@dataclass(frozen=True, slots=True, eq=False)
class Hessian:
    """A Gram matrix and its factor: linears that share it, and formats that measure it, need not factor it again.

    Attributes:
        gram: H, float32, shape (K, K).
    """

    gram: Tensor
    _factors: dict[float, HessianFactor] = field(default_factory=dict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def factor(self, damping: float) -> HessianFactor:
        """Return ``factor_hessian`` in H's own order; that of the last damping is kept."""
        with self._lock:
            if damping not in self._factors:
                self._factors.clear()
                self._factors[damping] = factor_hessian(self.gram, damping)
            return self._factors[damping]


def factor_hessian(gram: Tensor, damping: float, *, order: Tensor | None = None) -> HessianFactor:
    """Factor a damped Gram matrix; raise the damping as far as needed.

    Float32 is used where it is accurate enough: its error is relative to ``sqrt(H_ii H_jj)`` and changes no loss.
    Float64 is used where the largest diagonal entry is so far above the damping that pivots could be off by more than
    3 %, and where float32 finds no factor.

    Args:
        gram: H, mean of x x^T over tokens, float32 or float64, shape (K, K), symmetric, finite.
        damping: First damping to try, relative to the mean of the diagonal, dimensionless.
        order: Row and column of ``gram`` that comes at each place, int64, shape (K,); None leaves them where they are.

    Returns:
        The factor and the damping that it took. Inputs that are always zero have a damped diagonal like any other.
    """
    diagonal = in_float64(gram.diagonal())
    mean = float(diagonal.mean())
    if mean <= 0:  # The input is zero on every token: nothing can be fed back.
        return HessianFactor(torch.eye(gram.shape[0], device=gram.device), float("inf"))
    for step in _DAMPING_STEPS:
        # In all trials pivots were off by at most six times this.
        error = 6 * torch.finfo(torch.float32).eps / 2 * float(diagonal.max()) / (damping * step * mean)
        dtypes = (torch.float64,) if error > _LARGEST_ERROR else (torch.float32, torch.float64)
        for dtype in dtypes:
            upper = _in_order(gram, order, dtype)
            upper.diagonal().add_(damping * step * mean)
            if _factor_(upper):
                return HessianFactor(upper.float().to(gram.device), damping * step)
    diagonal = diagonal if order is None else diagonal[order.to(diagonal.device)]
    return HessianFactor((diagonal + damping * mean).sqrt().float().diag().to(gram.device), float("inf"))


def random_signs(size: int, count: int, device: torch.device, *, seed: int | torch.Generator = 0) -> Tensor:
    """Return vectors z of random signs, for which ``mean z z^T = I`` on average.

    Args:
        size: K, length of a vector.
        count: Number of vectors.
        device: Where they are wanted.
        seed: Another one gives others; a generator gives others at each call.

    Returns:
        Float32, shape (K, count).
    """
    generator = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size, count), generator=generator, dtype=torch.int8)
    vectors: Tensor = (2 * signs - 1).to(device).float()
    return vectors


def solve_transposed(upper: Tensor, values: Tensor) -> Tensor:
    """Return ``R^-T Y``.

    Args:
        upper: R, upper triangular, float32, shape (K, K).
        values: Y, float32, shape (K, columns).
    """
    solved: Tensor = torch.linalg.solve_triangular(upper.T, values, upper=False)
    return solved


def inverse_diagonal(factor: HessianFactor) -> Tensor:
    """Return the diagonal of ``(R R^T)^-1``.

    Of many channels an estimate, good to a percent: the mean of ``(R^-T z)^2`` over random signs z, of which
    ``z_k / R_kk`` is known.

    Args:
        factor: R.

    Returns:
        Float32, shape (K,), in the factor's order.
    """
    upper = factor.upper
    size = len(upper)
    if size <= FEW_CHANNELS:
        exact: Tensor = solve_transposed(upper, torch.eye(size, device=upper.device)).square().sum(dim=1)
        return exact
    vectors = random_signs(size, SIGNS, upper.device)
    known = upper.diagonal().reciprocal()
    others = solve_transposed(upper, vectors) - known[:, None] * vectors
    estimate: Tensor = known.square() + others.square().mean(dim=1)
    return estimate


def _in_order(gram: Tensor, order: Tensor | None, dtype: torch.dtype) -> Tensor:
    # A few rows at a time: no second copy of a large matrix.
    device = precise_device(gram.device) if dtype == torch.float64 else gram.device
    if order is None:
        return gram.to(device=device, dtype=dtype, copy=True)
    ordered = torch.empty(gram.shape, dtype=dtype, device=device)
    for rows, into in zip(order.split(_BLOCK), ordered.split(_BLOCK), strict=True):
        into.copy_(gram.index_select(0, rows).index_select(1, order))
    return ordered


def _factor_(matrix: Tensor) -> bool:
    # Puts R in the place of R R^T, from the last columns to the first: what columns on the right have explained is
    # subtracted by a product, the block on the diagonal is factored in float64, and those above it follow. Only the
    # upper triangle is read. Returns whether there is such an R.
    size = len(matrix)
    failed = torch.zeros((), dtype=torch.int32, device=precise_device(matrix.device))
    for last in range(size, 0, -_BLOCK):
        first = max(last - _BLOCK, 0)
        columns = matrix[:last, first:last]
        if last < size:
            columns.addmm_(matrix[:last, last:], matrix[first:last, last:].T, alpha=-1)
        # Reversed, an upper factor is the lower one that LAPACK finds.
        lower, info = torch.linalg.cholesky_ex(in_float64(columns[first:]).flip(0, 1))
        failed += info
        corner = lower.flip(0, 1)
        columns[first:] = corner.to(matrix)
        if first:
            identity = torch.eye(last - first, dtype=corner.dtype, device=corner.device)
            inverse = torch.linalg.solve_triangular(corner, identity, upper=True).to(matrix)
            columns[:first] = columns[:first] @ inverse.T
    matrix.triu_()
    return not bool(failed) and bool(torch.isfinite(matrix.diagonal()).all())


def damped_solve(gram: Tensor, target: Tensor, damping: float) -> Tensor:
    """Solve ``(H + damping * mean(diag H) * I) V = T``.

    Args:
        gram: H, mean of x x^T over tokens, float32, shape (K, K), positive semidefinite.
        target: T, float32, shape (K, columns).
        damping: Relative to the mean of H's diagonal, dimensionless; raised as ``factor_hessian`` does.

    Returns:
        V, float32, shape (K, columns); zero where H is zero altogether or cannot be factored even so.
    """
    factor = factor_hessian(gram, damping)
    if math.isinf(factor.damping):
        return torch.zeros_like(target)
    solved = target.clone(memory_format=torch.contiguous_format)
    _solve_(factor.upper, solved)
    return solved


def _solve_(upper: Tensor, values: Tensor) -> None:
    # Puts (R R^T)^-1 Y in the place of Y: R from the last rows to the first, then its transpose back. Nearly all of it
    # is products, which take half the time of a solver for many columns.
    size = len(upper)
    for last in range(size, 0, -_BLOCK):
        first = max(last - _BLOCK, 0)
        rows = values[first:last]
        if last < size:
            rows.addmm_(upper[first:last, last:], values[last:], alpha=-1)
        rows.copy_(torch.linalg.solve_triangular(upper[first:last, first:last], rows, upper=True))
    for first in range(0, size, _BLOCK):
        last = min(first + _BLOCK, size)
        rows = values[first:last]
        if first:
            rows.addmm_(upper[:first, first:last].T, values[:first], alpha=-1)
        rows.copy_(solve_transposed(upper[first:last, first:last], rows))
