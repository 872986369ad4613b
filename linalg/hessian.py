"""The factor of a Gram matrix's inverse that error feedback needs, safely damped.

Notes:
    With d = damping * mean(diag H): ``(H + d I)^-1 = U^T U``, U upper triangular. Rounding row k, with all rows before
    it done and those after it free to answer, costs ``e_k^2`` with ``e_k = (w_k - q_k) / U_kk``; the rows after it take
    over ``U_kj e_k``. Source: GPTQ (Frantar et al., arXiv 2210.17323), section 3.3, steps 2 and 3: the Cholesky factor
    of the inverse, and damping.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .precision import in_float64, precise_device

__all__ = ["InverseFactor", "damped_solve", "inverse_factor"]

_DAMPING_STEPS = (1.0, 10.0, 50.0)
"""Damping is raised by these factors, in turn, while the factorisation fails."""

_SMALLEST_BLOCK = 256
"""Triangular matrices up to this size are inverted directly, and so many rows copied at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class InverseFactor:
    """Upper triangular U with ``(H + damping * mean(diag H) * I)^-1 = U^T U``.

    Attributes:
        upper: U, float32, shape (K, K).
        damping: Damping that was used, relative to the mean of H's diagonal. Infinite if no damping helped: U is
            then diagonal, so that rounding goes without feedback.
    """

    upper: Tensor
    damping: float


def inverse_factor(
    gram: Tensor, damping: float, *, order: Tensor | None = None, dtype: torch.dtype = torch.float64
) -> InverseFactor:
    """Factor the inverse of a damped Gram matrix; raise the damping as far as needed.

    With P the reversal of rows and columns, ``P H P = L L^T`` gives ``H = R R^T`` with ``R = P L P`` upper
    triangular, hence ``U = R^-1``: one Cholesky and one triangular inverse, the explicit inverse is never formed.
    By default the Cholesky runs in float64, because massive activations make condition numbers of 1e6 and more; R has
    only their root, and float32 is enough for its inverse.

    Args:
        gram: Mean of x x^T over tokens, float32 or float64, shape (K, K), symmetric, finite.
        damping: First damping to try, relative to the mean of the diagonal, dimensionless.
        order: Row and column of ``gram`` that comes at each place, int64, shape (K,); None leaves them where they are.
        dtype: Of the Cholesky. In float32 it takes a third of the time, and errs by up to 1e-7 K / damping.

    Returns:
        The factor and the damping that it took. Inputs that are always zero have a damped diagonal like any other.
    """
    if order is None:
        order = torch.arange(gram.shape[0], device=gram.device)
    diagonal = in_float64(gram.diagonal()[order])
    mean = float(diagonal.mean())
    if mean <= 0:  # The input is zero on every token: nothing can be fed back.
        return InverseFactor(torch.eye(gram.shape[0], device=gram.device), float("inf"))
    for step in _DAMPING_STEPS:
        flipped = _in_order(gram, order.flip(0), dtype)
        flipped.diagonal().add_(damping * step * mean)
        lower, failed = _cholesky_(flipped)
        upper = lower.float().to(gram.device)
        del flipped, lower
        if not failed:
            upper = upper.flip(0, 1)
            _invert_upper_(upper)
            if bool(torch.isfinite(upper).all()):
                return InverseFactor(upper, damping * step)
    return InverseFactor((diagonal + damping * mean).rsqrt().float().diag().to(gram.device), float("inf"))


def _in_order(gram: Tensor, order: Tensor, dtype: torch.dtype) -> Tensor:
    # A few rows at a time: no second copy of a large matrix.
    device = precise_device(gram.device) if dtype == torch.float64 else gram.device
    ordered = torch.empty(gram.shape, dtype=dtype, device=device)
    for rows, into in zip(order.split(_SMALLEST_BLOCK), ordered.split(_SMALLEST_BLOCK), strict=True):
        into.copy_(gram[rows[:, None], order])
    return ordered


def _cholesky_(matrix: Tensor) -> tuple[Tensor, bool]:
    # The lower factor of a symmetric matrix, in its memory, and whether there is none.
    lower = matrix.mT  # LAPACK's order: what lies so is not copied
    failed = torch.zeros((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    return lower, bool(failed)


def _invert_upper_(matrix: Tensor) -> None:
    # Inverts an upper triangular matrix in place: [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]]. Nearly all
    # of the work is in matrix products, and a third of what solving for the identity takes is never done.
    size = matrix.shape[0]
    if size <= _SMALLEST_BLOCK:
        identity = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
        matrix.copy_(torch.linalg.solve_triangular(matrix, identity, upper=True))
        return
    half = size // 2
    first, corner, second = matrix[:half, :half], matrix[:half, half:], matrix[half:, half:]
    _invert_upper_(first)
    _invert_upper_(second)
    corner.copy_((first @ corner @ second).neg_())


def damped_solve(gram: Tensor, target: Tensor, damping: float) -> Tensor:
    """Solve ``(H + damping * mean(diag H) * I) V = T``.

    Args:
        gram: H, mean of x x^T over tokens, float32, shape (K, K), positive semidefinite.
        target: T, float32, shape (K, columns).
        damping: Relative to the mean of H's diagonal, dimensionless. At least 0.1 or so, for float32 to be enough: the
            condition number is at most K / damping.

    Returns:
        V, float32, shape (K, columns); zero where H is zero altogether or cannot be factored even so.
    """
    damped = gram.clone()
    damped.diagonal().add_(damping * gram.diagonal().mean())
    lower, failed = _cholesky_(damped)
    if failed:
        return torch.zeros_like(target)
    return torch.cholesky_solve(target, lower)
