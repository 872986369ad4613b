"""Attention as a kind of work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ...linalg.work import Kind, Sample, Work
from .shapes import BlockShape

__all__ = ["Attention"]

_LONGEST = 512
"""Tokens of a sample."""

_HEADS = 4
"""Heads of a sample."""


@dataclass(frozen=True)
class Attention(Kind):
    """Causal attention; unit: a pair of tokens in a head.

    Attributes:
        head_size: Width of a head.
        dtype: Of queries, keys and values.
        backward: Whether the backward pass belongs to it.
    """

    head_size: int
    dtype: torch.dtype
    backward: bool

    @classmethod
    def work(
        cls,
        block: BlockShape,
        rows: int,
        row_tokens: int,
        *,
        dtype: torch.dtype = torch.float32,
        backward: bool = False,
    ) -> Work:
        """Return what a block does for some rows; none for a block without attention."""
        reach = row_tokens if block.reach is None else min(block.reach, row_tokens)
        pairs = reach * (row_tokens - (reach - 1) / 2)
        return Work({cls(block.head_size, dtype, backward): float(rows * block.heads * pairs)} if block.heads else {})

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        shape = (1, _HEADS, _LONGEST, self.head_size)
        queries, keys, values = (
            torch.ones(shape, device=device, dtype=self.dtype, requires_grad=self.backward) for _ in range(3)
        )

        def run() -> object:
            with torch.set_grad_enabled(self.backward):
                made = nn.functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
                return torch.autograd.grad(made.sum(), [queries, keys, values]) if self.backward else made

        return Sample(run, _HEADS * _LONGEST * (_LONGEST + 1) / 2)
