"""Work of MLX's curves and of its rounding, from shapes: what forecasts of time are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....linalg.work import Elements, Factors, Kind, Products, Sample, Work
from ...numerics.tables import SAMPLED_ROWS
from ...rounding import FormatWork
from .rounding import SWEEPS, expected_rounding, round_affine
from .schemes import SCHEMES, Scheme

__all__ = ["MlxWork", "RoundedWeights", "TriedSchemes"]

_CHANNELS = 256
"""Input channels of a sample, a whole number of every scheme's groups."""

_MOST_COLUMNS = 512
"""Outputs of a sample."""

_DECODING, _WRITING, _LOADING = 30, 80, 40
"""Operations on every weight that is decoded, that is written and read back, and that mlx-lm loads and is compared."""


@dataclass(frozen=True)
class TriedSchemes(Kind):
    """Sampled outputs rounded to every scheme; unit: an input channel of a linear.

    Attributes:
        columns: Outputs.
    """

    columns: int

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        weight, upper = _weight(self.columns, device), _factor(device)
        return Sample(lambda: [expected_rounding(weight, upper, x, torch.bfloat16) for x in SCHEMES], _CHANNELS)


@dataclass(frozen=True)
class RoundedWeights(Kind):
    """Groups of a linear rounded with feedback; unit: a weight.

    Attributes:
        columns: Outputs.
        bits: Width of a code.
    """

    columns: int
    bits: int

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        weight, upper = _weight(self.columns, device), _factor(device)
        scheme = Scheme(self.bits, 64)
        return Sample(lambda: round_affine(weight, upper, scheme, torch.bfloat16), _CHANNELS * self.columns)


class MlxWork(FormatWork):
    """See ``FormatWork``."""

    starting_seconds = 5.0  # a process of mlx-lm's, on a machine of 2024

    def __init__(self, bpw: float) -> None:
        """Take what is asked of the output.

        Args:
            bpw: Bits per weight.
        """
        self._bits = min((scheme.bits for scheme in SCHEMES), key=lambda bits: abs(bits + 0.5 - bpw))

    def curves(self, inputs: int, outputs: Sequence[int], device: torch.device) -> Work:
        """See ``FormatWork``."""
        tried = Work()
        for columns in (min(each, SAMPLED_ROWS) for each in outputs):
            tried += Work({TriedSchemes(columns): float(inputs)})
        return Factors.work(inputs) + tried

    def linear(self, inputs: int, outputs: int) -> Work:
        """See ``FormatWork``."""
        rounded = Work({RoundedWeights(min(outputs, _MOST_COLUMNS), self._bits): float(inputs * outputs)})
        others = Products.work(_CHANNELS, inputs, outputs) * (inputs / 2 / _CHANNELS)
        return Factors.work(inputs) + others * (1 + 2 * SWEEPS) + rounded

    def decoded(self, weights: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work(_DECODING * weights)

    def written(self, weights: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work(_WRITING * weights)

    def preparing(self, weights: int, vocabulary: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work(_LOADING * weights)


def _weight(columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(_CHANNELS, columns, generator=torch.Generator().manual_seed(0)).to(device) / 32


def _factor(device: torch.device) -> torch.Tensor:
    return torch.eye(_CHANNELS, device=device) + torch.ones(_CHANNELS, _CHANNELS, device=device).triu(1) / _CHANNELS
