"""Micro-batches, and the check that what they make is finite."""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import NumericalError

__all__ = ["MICRO_BATCH_TOKENS", "TAIL_TOKENS", "check_finite", "micro_batches"]

MICRO_BATCH_TOKENS = 2048
"""Tokens that go through a block together: enough to keep a processor busy, few enough to stay small in memory."""

TAIL_TOKENS = 256
"""Positions whose logits are held at once, of each model: 128 MiB in float32 for a vocabulary of 128k."""


def micro_batches(rows: int, row_tokens: int) -> list[slice]:
    """Cut rows into micro-batches of about 2048 tokens, at least one row each."""
    size = max(1, MICRO_BATCH_TOKENS // row_tokens)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def check_finite(tensor: Tensor, where: str, what: str = "activations") -> None:
    """Raise if a tensor holds NaN or infinity.

    Args:
        tensor: Any shape, floating point.
        where: Name of a module.
        what: What of it the tensor holds, in the plural.

    Raises:
        NumericalError: It does.
    """
    extremes = torch.stack(torch.aminmax(tensor))  # NaN goes through; one pass over memory, unlike isfinite
    if not bool(torch.isfinite(extremes).all()):
        raise NumericalError(
            f"{where}: NaN or infinity in the {what}. Check that the original model runs in this dtype."
        )
