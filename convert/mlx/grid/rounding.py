"""Rounding onto affine groups with error feedback.

Legend: W is the transpose of a Hugging Face weight, shape (K, out); H = mean x x^T, shape (K, K); H = R R^T with R
upper triangular; D = W - Q, what rounding changes. Group after group: with S its rows, the target of a group is
``T = W_S + R_SS^-T sum_{groups B before} R_BS^T D_B``, and the sum over groups of the squares of ``R_SS^T (T - Q)`` is
exactly tr(D^T H D). Inside a group codes are chosen row after row, each answering to the errors of those before it;
once all groups are done, every code is chosen again a few times, given all others: its best value is
``q_k + (H D)_k / H_kk``, and ``H D = R E`` with ``E = R^T D``. Source: GPTQ (arXiv 2210.17323), in blocks, with the
factor of H in the place of that of its inverse (see ``bpwise.linalg.hessian``); then coordinate descent (QuantEase,
Behdin et al., arXiv 2309.01885).

Scale and bias of a group minimise ``sum_k R_kk^2 (t_k - s c_k - b)^2``, R_kk^2 being what an error costs after
feedback: trial ranges of the group's values are narrowed step by step; for the codes of each, scale and bias follow by
weighted least squares, are rounded to the dtype that stores them, and the best are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ....linalg.outputs import OutputFeedback, in_turn
from .schemes import Scheme

__all__ = [
    "SWEEPS",
    "Affine",
    "expected_rounding",
    "round_affine",
    "round_plainly",
    "search_groups",
]

SWEEPS = 2
"""How often codes are chosen again."""

_SHRINKS = {2: 9, 3: 8, 4: 7, 5: 6, 6: 5, 8: 4}
"""Trial ranges by bits: the whole range of a group, and that less multiples of ``_SHRINK``."""

_SHRINK = {2: 0.07, 3: 0.05, 4: 0.035, 5: 0.025, 6: 0.02, 8: 0.01}

_REFITS = 2
"""How often scale and bias follow the codes of a trial, and those the new scale and bias."""

_CHUNK = 256
"""Rows that are swept between two products with all others."""


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """A linear, or some groups of it, on the grid. All tensors are transposed: an output is a column.

    Attributes:
        codes: float32 whole numbers, shape (K, out).
        scales: Values that the stored dtype holds, float32, shape (groups, out).
        biases: The same.
    """

    codes: Tensor
    scales: Tensor
    biases: Tensor

    def decoded(self) -> Tensor:
        """Return the weight, float32, shape (K, out)."""
        grouped = self.codes.unflatten(0, (len(self.scales), -1))
        values: Tensor = (grouped * self.scales[:, None] + self.biases[:, None]).flatten(0, 1)
        return values


def round_affine(
    weight: Tensor,
    upper: Tensor,
    scheme: Scheme,
    dtype: torch.dtype,
    outputs: OutputFeedback | None = None,
) -> Affine:
    """Round one linear.

    Args:
        weight: The weight to represent, float32, shape (K, out).
        upper: R, rows in the order of the input channels, float32, shape (K, K).
        scheme: Width and group size; K must be a whole number of groups.
        dtype: What scales and biases are stored in.
        outputs: How outputs make up for each other's errors; None rounds each for itself.

    Returns:
        The linear on the grid, on the device of the weight.
    """
    roots = (upper[first : first + _CHUNK, first:] for first in range(0, len(upper), _CHUNK))
    grams = [root @ root.T for root in roots]
    if outputs is None:
        return _rounded(weight, upper, grams, scheme, dtype)[0]
    groups = len(weight) // scheme.group_size
    whole = Affine(torch.empty_like(weight), *(weight.new_empty(groups, weight.shape[1]) for _ in range(2)))

    def rounded(columns: slice, moved: Tensor) -> Tensor:
        found, values = _rounded(moved, upper, grams, scheme, dtype)
        whole.codes[:, columns], whole.scales[:, columns] = found.codes, found.scales
        whole.biases[:, columns] = found.biases
        return values

    in_turn(weight, outputs, rounded)
    return whole


def expected_rounding(weight: Tensor, upper: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Estimate the errors that ``round_affine`` will leave, with all groups at once.

    Each group is rounded as if it were the first: what it takes over from those before it hardly makes it larger. What
    choosing codes again gains is left out, as other text loses most of it.

    Args:
        weight: As in ``round_affine``.
        upper: As in ``round_affine``.
        scheme: As in ``round_affine``.
        dtype: As in ``round_affine``.

    Returns:
        dW^T H dW of every output, float32, shape (out,), and dW itself, shape (K, out).
    """
    size = scheme.group_size
    roots = torch.stack([upper[first : first + size, first : first + size] for first in range(0, len(upper), size)])
    targets = weight.unflatten(0, (len(roots), size))
    scales, biases = search_groups(targets, roots.diagonal(dim1=1, dim2=2).square(), scheme.bits, dtype)
    couplings = roots.mT / roots.diagonal(dim1=1, dim2=2)[:, :, None]
    own = _by_row(scales, size), _by_row(biases, size)
    _, missed = _row_by_row(targets, targets, couplings, *own, scheme.bits)
    return (roots.mT @ missed).square().sum(dim=(0, 1)), missed.flatten(0, 1)


def round_plainly(weight: Tensor, costs: Tensor, scheme: Scheme, dtype: torch.dtype) -> Affine:
    """Round a weight whose errors do not answer to each other, as those of token embeddings.

    Args:
        weight: The weight to represent, float32, shape (K, out).
        costs: What a squared error costs in each input channel, float32, shape (K,).
        scheme: As in ``round_affine``.
        dtype: As in ``round_affine``.
    """
    targets = weight.unflatten(0, (-1, scheme.group_size))
    scales, biases = search_groups(targets, costs.view(-1, scheme.group_size), scheme.bits, dtype)
    codes = _nearest(targets, scales[:, None], biases[:, None], float((1 << scheme.bits) - 1))
    return Affine(codes.flatten(0, 1), scales, biases)


def search_groups(targets: Tensor, costs: Tensor, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Choose scale and bias of groups.

    Args:
        targets: Values to represent, float32, shape (groups, G, out).
        costs: What a squared error costs in each row, float32, shape (groups, G).
        bits: Width of a code.
        dtype: What scales and biases are stored in.

    Returns:
        Both, float32 with values of that dtype, shape (groups, out). Groups of one value have scale 0 and it as bias.
    """
    most = float((1 << bits) - 1)
    weights = costs[:, :, None] / costs.sum(dim=1, keepdim=True)[:, :, None].clamp(min=torch.finfo(torch.float32).tiny)
    low, high = targets.amin(dim=1), targets.amax(dim=1)
    best = torch.full_like(low, torch.inf)
    scales, biases = torch.zeros_like(low), torch.zeros_like(low)
    for trial in range(_SHRINKS[bits]):
        margin = (high - low) * (_SHRINK[bits] * trial / 2)
        scale, bias = (high - low - 2 * margin) / most, low + margin
        for _ in range(_REFITS + 1):
            scale, bias = scale.to(dtype).float(), bias.to(dtype).float()
            codes = _nearest(targets, scale[:, None], bias[:, None], most)
            error = ((targets - codes * scale[:, None] - bias[:, None]).square() * weights).sum(dim=1)
            better = error < best
            best, scales, biases = (
                torch.where(better, new, old) for new, old in ((error, best), (scale, scales), (bias, biases))
            )
            scale, bias = _fitted(targets, codes, weights, scale, bias)
    return scales, biases


def _fitted(targets: Tensor, codes: Tensor, weights: Tensor, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    # Weighted least squares of targets on codes; as it was where all codes are one.
    mean_code, mean = ((x * weights).sum(dim=1) for x in (codes, targets))
    moved = codes - mean_code[:, None]
    power = (moved.square() * weights).sum(dim=1)
    slope = (moved * (targets - mean[:, None]) * weights).sum(dim=1) / power.clamp(min=1e-12)
    known = power > 1e-6  # codes are whole numbers: two that differ have more, wherever their weights are not tiny
    return torch.where(known, slope, scale), torch.where(known, mean - slope * mean_code, bias)


def _nearest(values: Tensor, scales: Tensor, biases: Tensor, most: float) -> Tensor:
    steps = torch.where(scales == 0, 1.0, scales)
    return ((values - biases) / steps).round_().clamp_(0.0, most)


def _rounded(
    weight: Tensor, upper: Tensor, grams: Sequence[Tensor], scheme: Scheme, dtype: torch.dtype
) -> tuple[Affine, Tensor]:
    # The linear on the grid, and its values.
    channels, outputs = weight.shape
    size = scheme.group_size
    codes, missed, errors = (torch.empty_like(weight) for _ in range(3))
    scales, biases = (weight.new_empty(channels // size, outputs) for _ in range(2))
    for number, first in enumerate(range(0, channels, size)):
        rows = slice(first, first + size)
        root = upper[rows, rows]
        target = weight[rows]
        if first:
            earlier = upper[:first, rows].T @ missed[:first]
            target = target + torch.linalg.solve_triangular(root.T, earlier, upper=False)
        pivots = root.diagonal()
        scale, bias = search_groups(target[None], pivots.square()[None], scheme.bits, dtype)
        couplings = (root.T / pivots[:, None])[None]
        spread = _by_row(scale, size), _by_row(bias, size)
        chosen, left = _row_by_row(target[None], target[None], couplings, *spread, scheme.bits)
        scales[number], biases[number] = scale[0], bias[0]
        codes[rows] = chosen[0]
        errors[rows] = root.T @ left[0]
        missed[rows] = weight[rows] - (chosen[0] * scales[number] + biases[number])
    found = Affine(codes, scales, biases)
    for _ in range(SWEEPS):
        _sweep(found, weight, missed, errors, upper, grams, scheme)
    return found, weight - missed


def _sweep(
    found: Affine,
    weight: Tensor,
    missed: Tensor,
    errors: Tensor,
    upper: Tensor,
    grams: Sequence[Tensor],
    scheme: Scheme,
) -> None:
    # Chooses all codes again, in place; D and E follow.
    size = scheme.group_size
    for first, gram in zip(range(0, len(weight), _CHUNK), grams, strict=True):
        rows, groups = slice(first, first + len(gram)), slice(first // size, (first + len(gram)) // size)
        root = upper[rows, first:]
        powers = gram.diagonal()[:, None]
        values, slopes = weight[rows] - missed[rows], root @ errors[first:]  # Q_S and (H D)_S
        free = values + slopes / powers
        scales, biases = (_by_row(each[groups], size).flatten(0, 1)[None] for each in (found.scales, found.biases))
        chosen, moves = _row_by_row(free[None], values[None], (gram / powers)[None], scales, biases, scheme.bits)
        found.codes[rows] = chosen[0]
        missed[rows] += moves[0]
        errors[first:].addmm_(root.T, moves[0])


def _row_by_row(
    targets: Tensor, held: Tensor, couplings: Tensor, scales: Tensor, biases: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    # Codes of blocks that do not see each other: row i is wanted to be targets_i + sum_{j<i} couplings_ij (held_j -
    # q_j); and held - q. Couplings have shape (blocks, S, S), all others (blocks, S, out).
    most = float((1 << bits) - 1)
    steps = torch.where(scales == 0, 1.0, 1 / scales)
    chosen, missed = torch.empty_like(targets), torch.empty_like(targets)
    parts = (targets - biases, held - biases, scales, steps, missed, chosen)
    # A call takes longer than what it computes, so a row takes few.
    for i, (free, kept, scale, step, miss, code) in enumerate(zip(*(x.split(1, dim=1) for x in parts), strict=True)):
        wanted = torch.baddbmm(free, couplings[:, i : i + 1, :i], missed[:, :i]) if i else free
        torch.mul(wanted, step, out=code)
        code.round_().clamp_(0.0, most)
        torch.addcmul(kept, scale, code, value=-1, out=miss)
    return chosen, missed


def _by_row(values: Tensor, size: int) -> Tensor:
    # Of every group, (groups, out), what its rows have: (groups, G, out).
    return values[:, None].expand(-1, size, -1)
