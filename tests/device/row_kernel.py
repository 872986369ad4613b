"""What stands in for the kernel that rounds row groups on a GPU: its sums, in its order, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from .pretend import one_launch

__all__ = ["pretend_kernel", "same_sums"]


def same_sums(steps: Tensor, feedback: Tensor, halves: Tensor, seen: Tensor, gains: Tensor) -> Tensor:
    """Return codes as ``kernels.round_rows`` does, bit for bit: each product is rounded before it is added."""
    shifts = torch.zeros_like(steps)
    for of_rows, of_columns in zip(seen.T, gains, strict=True):
        shifts += of_rows[:, None] * of_columns
    codes = torch.empty_like(steps)
    for i, target in enumerate(steps):
        moved = target + shifts[i]
        codes[i] = moved.round().clamp(-halves, halves - 1)
        shifts -= feedback[:, i, None] * (moved - codes[i])
    return codes


def pretend_kernel(*tensors: Tensor) -> Tensor:
    """``same_sums`` on the pretend device: one launch, and what it reads and writes."""
    return one_launch("round_rows", same_sums, *tensors)
