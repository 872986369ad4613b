"""Work of GGUF's curves and of its rounding, from shapes: what forecasts of time are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....linalg.outputs import output_sets
from ....linalg.parallel import threads_beside
from ....linalg.work import Elements, Factors, Kind, Products, Sample, Work
from ...numerics.tables import SAMPLED_ROWS
from ...rounding import FormatWork
from .curves import measured_types, needs_tables
from .rounding import SWEEPS, expected_rounding, round_to_type
from .types import GgmlType, ggml_type

__all__ = ["EncodedWeights", "GgufWork", "TriedTypes"]

_WITH_TABLES = 1.1
"""What the types that need search tables take beside all others, on the fewer outputs that they are measured on."""

_TABLE_ROWS = 75_000
"""Input channels of a linear that are measured in all other types while the tables are built."""

_CHANNELS, _MOST_CHANNELS = 256, 1024
"""Input channels that all types fit, which are rounded one after another; and most of a sample of curves, for which
blocks are rounded side by side."""

_MOST_COLUMNS = 512
"""Outputs of a sample."""

_DECODING, _WRITING, _ENCODING, _CONVERTING = 30, 80, 600, 60
"""Operations on every weight that is decoded, that is written and read back, that ggml alone encodes, and that is
converted."""

_CONVERTING_TOKEN = 500_000
"""The same for every token of the vocabulary that is converted, in Python."""

_NEAR_TYPES = 3
"""Types of nearly the wanted bits per weight that stand for those of a plan."""


@dataclass(frozen=True)
class TriedTypes(Kind):
    """Sampled outputs rounded to every type that needs no tables; unit: an input channel of a linear.

    Attributes:
        channels: Input channels.
        columns: Outputs.
        types: Names of the types.
    """

    channels: int
    columns: int
    types: tuple[str, ...]

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        weight, upper = _weight(self.channels, self.columns, device), _factor(self.channels, device)
        kinds = [ggml_type(name) for name in self.types]
        return Sample(lambda: [expected_rounding(weight, upper, kind) for kind in kinds], self.channels)


@dataclass(frozen=True)
class EncodedWeights(Kind):
    """Blocks of a linear rounded with feedback; unit: a weight.

    Attributes:
        columns: Outputs.
        types: Names of the types, equal parts of the weights in each.
    """

    columns: int
    types: tuple[str, ...]

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        weight, upper = _weight(_CHANNELS, self.columns, device), _factor(_CHANNELS, device)
        kinds = [ggml_type(name) for name in self.types]
        units = _CHANNELS * self.columns * len(kinds)
        return Sample(lambda: [round_to_type(weight, upper, kind) for kind in kinds], units)


class GgufWork(FormatWork):
    """See ``FormatWork``."""

    on_cpu = True
    starting_seconds = 5.0  # a process of the converter's, and one of llama.cpp's, on a machine of 2024

    def __init__(self, bpw: float, *, feedback: bool) -> None:
        """Take what is asked of the output.

        Args:
            bpw: Bits per weight.
            feedback: Whether linears are rounded with feedback.
        """
        self._bpw = bpw
        self.rounds = feedback

    def once(self, device: torch.device) -> Work:
        """See ``FormatWork``."""
        return Work({TriedTypes(_MOST_CHANNELS, SAMPLED_ROWS, _names(_plain_types(_CHANNELS))): float(_TABLE_ROWS)})

    def curves(self, inputs: int, outputs: Sequence[int], device: torch.device) -> Work:
        """See ``FormatWork``."""
        kinds = _plain_types(inputs)
        if not kinds:
            return Work()
        rows = inputs * (1 + (0 if inputs % _CHANNELS else _WITH_TABLES))
        channels = inputs if inputs <= _MOST_CHANNELS or inputs % _CHANNELS else _MOST_CHANNELS
        tried = Work()
        for columns in (min(each, SAMPLED_ROWS) for each in outputs):
            tried += Work({TriedTypes(channels, columns, _names(kinds)): rows})
        return Factors.work(inputs) + tried.beside_others(len(outputs) * len(kinds), threads_beside(device))

    def linear(self, inputs: int, outputs: int) -> Work:
        """See ``FormatWork``."""
        near = sorted(_plain_types(inputs), key=lambda kind: abs(kind.bits_per_weight - self._bpw))[:_NEAR_TYPES]
        if not near:
            return Elements.work(inputs * outputs)
        together = max(1, min(outputs // output_sets(outputs), _MOST_COLUMNS))
        encoded = Work({EncodedWeights(together, _names(near)): float(inputs * outputs)})
        others = Products.work(_CHANNELS, inputs, outputs) * (inputs / 2 / _CHANNELS)
        return Factors.work(inputs) + others * (1 + 2 * SWEEPS) + encoded

    def decoded(self, weights: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work(_DECODING * weights)

    def written(self, weights: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work((_WRITING if self.rounds else _ENCODING) * weights)

    def preparing(self, weights: int, vocabulary: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work(_CONVERTING * weights + _CONVERTING_TOKEN * vocabulary)


def _plain_types(inputs: int) -> list[GgmlType]:
    return [kind for kind in measured_types() if kind.fits(inputs) and not needs_tables(kind)]


def _names(kinds: Sequence[GgmlType]) -> tuple[str, ...]:
    return tuple(sorted(kind.name for kind in kinds))


def _weight(channels: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(channels, columns, generator=torch.Generator().manual_seed(0)).to(device) / 32


def _factor(channels: int, device: torch.device) -> torch.Tensor:
    return torch.eye(channels, device=device) + torch.ones(channels, channels, device=device).triu(1) / channels
