"""How far hidden states are from the original's after each block, while both models are streamed."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .estimate import Estimate, mean_over_rows

__all__ = ["BlockDrift", "DriftMeter", "Trace", "watched_positions"]

_WATCHED_TOKENS = 256
"""Tokens that are watched beside each row's first: their states after all blocks of an 8B model are 150 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockDrift:
    """Relative error of hidden states: norm of the difference over the norm of the original's, per token, averaged.

    Measured, not predicted, and cumulative: what the blocks before did to the states is in it.

    Attributes:
        block: Index of the block whose output it is; None for the token embeddings.
        error: Mean over all watched tokens but the first of each row, dimensionless.
        first_token: Of the first tokens of the rows. They are apart because many models keep a massive activation
            there, which every later token attends to.
    """

    block: int | None
    error: Estimate
    first_token: Estimate


class Trace:
    """Gathers a model's states at the watched positions.

    Attributes:
        states: What was seen, after the embeddings and after each block: (rows, positions, hidden size), on the CPU.
    """

    def __init__(self, row_tokens: int, rows: int) -> None:
        """Begin with nothing seen."""
        self._positions = watched_positions(row_tokens, rows)
        self.states: list[Tensor] = []

    def __call__(self, hidden: Tensor) -> None:
        """See states of all tokens, shape (rows, tokens, hidden size)."""
        self.states.append(hidden[:, self._positions].clone())


class DriftMeter:
    """Compares a quantized model's states with the original's as they come.

    Attributes:
        drift: What was seen so far.
    """

    def __init__(self, original: Tensor, row_tokens: int) -> None:
        """Begin with nothing seen.

        Args:
            original: What ``Trace`` saw of the original, stacked: (blocks + 1, rows, positions, hidden size).
            row_tokens: Length of the rows.
        """
        self._original = original
        self._positions = watched_positions(row_tokens, original.shape[1])
        self.drift: list[BlockDrift] = []

    def __call__(self, hidden: Tensor) -> None:
        """See states of all tokens, shape (rows, tokens, hidden size)."""
        number = len(self.drift)
        expected = self._original[number].double()
        difference = hidden[:, self._positions].double() - expected
        # A state of nothing but zeros is none that a model has; it would be an error of 0/0.
        errors = difference.norm(dim=-1) / expected.norm(dim=-1).clamp(min=torch.finfo(torch.float64).tiny)
        self.drift.append(
            BlockDrift(
                block=number - 1 if number else None,
                error=mean_over_rows(errors[:, 1:]),
                first_token=mean_over_rows(errors[:, :1]),
            )
        )


def watched_positions(row_tokens: int, rows: int) -> Tensor:
    """Return the positions of each row that are watched, ascending: the first, and others evenly spread.

    Args:
        row_tokens: Length of the rows, at least 2.
        rows: Number of rows.
    """
    others = min(row_tokens - 1, max(1, _WATCHED_TOKENS // rows))
    spread = torch.linspace(row_tokens - 1, 1, others, dtype=torch.float64).round().long().flip(0)
    return torch.cat([torch.zeros(1, dtype=torch.int64), spread])
