"""Samples that stand for all: systematic sampling with probability proportional to size, and thinning.

Notes:
    Thinning with the limit t: a token of weight w stays with probability ``min(1, w / t)`` and then weighs
    ``max(w, t)``, so that ``E sum w' x x^T = sum w x x^T``. Source: threshold sampling, Duffield, Lund and Thorup (IEEE
    Transactions on Information Theory 51, 2005). Systematic sampling in n shares: item i gets as many shares of
    ``sum w / n`` as there are j with ``(j + 1/2) sum w / n`` in its part of the cumulative sum. Source: Madow (Annals
    of Mathematical Statistics 20, 1949).
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import in_float64

__all__ = ["subsample_tokens", "systematic_sample"]

_LIMITS = (2.0, 1.0, 0.5)
"""Weights below which tokens are thinned out, relative to the mean."""

_LARGEST_SPREAD = 1.05
"""How far the sum of squared weights may grow with that, relative to itself."""


def systematic_sample(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Choose items whose weighted sums stand for those over all items.

    The sum of the weights is cut into equal shares, and each is given to the item in whose part of the cumulative sum
    its middle lies.

    Args:
        weights: Not negative, shape (items,).
        count: Number of shares; no more items than these are chosen.

    Returns:
        Indices of the chosen items, int64, and the shares that each got, float32. All items with their own weights
        where there are no more than ``count``, or all weigh nothing.
    """
    if len(weights) <= count or not bool(weights.any()):
        return torch.arange(len(weights), device=weights.device), weights
    cumulative = in_float64(weights).cumsum(dim=0)
    share = cumulative[-1] / count
    middles = (torch.arange(count, device=share.device) + 0.5) * share
    chosen, shares = torch.searchsorted(cumulative, middles).unique_consecutive(return_counts=True)
    return chosen.to(weights.device), (shares * share).float().to(weights.device)


def subsample_tokens(weights: Tensor, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Choose the tokens that weighted sums are taken over: most of them weigh so little that few do.

    A token below a limit stays with a probability of its share of that, and then weighs as much: expectations are those
    of all tokens. The limit is twice the mean weight, or less where the effective number of tokens,
    (sum w)^2 / sum w^2, would fall by more than a twentieth. On SmolLM2 18 to 38 % of the tokens stay, and it falls by
    1 to 2 %; with twice the limit it would fall by 20 to 30 %. Where all weigh nearly the same, all stay.

    Args:
        weights: Not negative, shape (tokens,).
        rng: On the CPU, whatever the device of the weights.

    Returns:
        Indices of the chosen tokens, int64, and their weights. All of them where all weigh the same.
    """
    if not len(weights):
        return torch.arange(0, device=weights.device), weights
    exact = in_float64(weights)  # squares of small gradients are beyond float32
    most = _LARGEST_SPREAD * exact.square().sum()
    limits = (factor * exact.mean() for factor in _LIMITS)
    found = next((x for x in limits if bool((exact * exact.clamp(min=x)).sum() <= most)), exact.new_zeros(()))
    limit = found.float().to(weights.device)
    draws = torch.rand(len(weights), generator=rng).to(weights.device)
    kept = (weights > draws * limit).nonzero()[:, 0]
    return kept, weights[kept].clamp(min=limit)
