"""A sample that stands for all: systematic sampling with probability proportional to size."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["systematic_sample"]


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
    cumulative = weights.double().cumsum(dim=0)
    share = cumulative[-1] / count
    middles = (torch.arange(count, device=weights.device) + 0.5) * share
    chosen, shares = torch.searchsorted(cumulative, middles).unique_consecutive(return_counts=True)
    return chosen, (shares * share).float()
