"""Work of EXL2's curves and of its rounding, from shapes: what forecasts of time are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ....linalg.hessian import FEW_CHANNELS, SIGNS
from ....linalg.outputs import OutputFeedback
from ....linalg.work import Elements, Factors, Kind, Products, Sample, Solves, Work
from ....measure.statistics.sketch import COUPLING_RANK
from ...numerics.fit import STEP_TOKENS
from ...rounding import FormatWork
from ..file.layout import WIDTHS, RowGroup, group_rows
from .coupling import OUTPUT_SETS
from .curves import SAMPLED_COLUMNS
from .feedback import errors_by_group, round_linear_

__all__ = ["Exl2Work", "RoundedRows", "TriedRows"]

_MOST_COLUMNS = 2048
"""Columns of a sample: more take as much longer as they are more."""

_UNPACKING, _WRITING = 60, 200
"""Operations on every weight that is read back, and that is packed, hashed, read back and compared."""

_BITS = 4
"""Width of a sample: it hardly matters."""


@dataclass(frozen=True)
class TriedRows(Kind):
    """Row groups of sampled outputs rounded at every width; unit: a row."""

    columns: int
    rows: int

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        weight, upper = _weight(self.rows, self.columns, device), _factor(self.rows, device)
        shares = torch.ones(self.columns, device=device)
        return Sample(lambda: errors_by_group(weight, upper, [self.rows], WIDTHS, shares), self.rows)


@dataclass(frozen=True)
class RoundedRows(Kind):
    """Row groups of a linear rounded with feedback between rows and between outputs; unit: a weight."""

    columns: int
    rows: int

    def sample(self, device: torch.device) -> Sample:
        """See ``Kind``."""
        weight, upper = _weight(self.rows, self.columns, device), _factor(self.rows, device)
        fisher = torch.ones(self.columns, device=device)
        coupling = _weight(self.columns, min(COUPLING_RANK, self.columns), device)
        outputs = OutputFeedback.of(fisher, coupling, OUTPUT_SETS)
        groups, order = [RowGroup(_BITS, self.rows)], torch.arange(self.rows, device=device)
        run = lambda: round_linear_(weight.clone(), upper, groups, order, fisher, outputs)  # noqa: E731
        return Sample(run, self.rows * self.columns)


class Exl2Work(FormatWork):
    """See ``FormatWork``."""

    refining_tokens = STEP_TOKENS

    def __init__(self, group_size: int) -> None:
        """Take the input channels that share a width."""
        self._group_size = group_size

    def curves(self, inputs: int, outputs: Sequence[int], device: torch.device) -> Work:
        """See ``FormatWork``."""
        one = Work()
        for columns in (min(each, SAMPLED_COLUMNS) for each in outputs):
            one += self._rows(TriedRows, inputs, columns, inputs) + _earlier(inputs, columns * len(WIDTHS))
        costs = Solves.work(inputs, inputs if inputs <= FEW_CHANNELS else SIGNS)
        return costs + Factors.work(inputs) * (1 + len(outputs)) + one.beside_others(len(outputs), device)

    def linear(self, inputs: int, outputs: int) -> Work:
        """See ``FormatWork``."""
        rounded = self._rows(RoundedRows, inputs, min(outputs, _MOST_COLUMNS), inputs * outputs)
        return Factors.work(inputs) + _earlier(inputs, outputs) + rounded

    def decoded(self, weights: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work(_UNPACKING * weights)

    def written(self, weights: int) -> Work:
        """See ``FormatWork``."""
        return Elements.work(_WRITING * weights)

    def _rows(self, kind: type[TriedRows | RoundedRows], inputs: int, columns: int, units: float) -> Work:
        rows = group_rows(inputs, self._group_size)[0] if inputs >= self._group_size else inputs
        return Work({kind(columns, rows): float(units)})


def _earlier(inputs: int, columns: int) -> Work:
    # What row groups take over from those before them: half of a product.
    return Products.work(SAMPLED_COLUMNS, inputs, columns) * (inputs / 2 / SAMPLED_COLUMNS)


def _weight(rows: int, columns: int, device: torch.device) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(device) / 32


def _factor(rows: int, device: torch.device) -> torch.Tensor:
    return torch.eye(rows, device=device) + torch.ones(rows, rows, device=device).triu(1) / rows
