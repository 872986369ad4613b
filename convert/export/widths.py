"""Whole bits for every unit of linears, at least measured damage within a size.

A curve says what a linear costs at b bits in the format that was measured, at that format's scales and rounding. It is
taken for what it costs at b bits in the engine's format: that differs by a factor which is much the same for all
linears, and a choice does not change with such a factor.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ...errors import BudgetError, ConfigError
from ...linalg.knapsack import choose
from ...measure.measurement import MeasuredLinear, Measurement
from ..conversion import Target
from ..plan import round_up, shown_range
from ..registry import formats
from .units import Unit

__all__ = ["Chosen", "Grid", "choose_bits", "group_size_of"]

_SCALE_BITS = 16
_GROUP_SIZES = (128, 64, 32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """How an engine stores linears.

    Attributes:
        engine: Its name.
        widths: Bits of a code that it has.
        group_size: Inputs that share a scale of 16 bits and a zero point as wide as a code; None where next to nothing
            is stored beside codes.
        multiple: Numbers of inputs and outputs are padded to multiples of it.
        head_bits: Bits of the output head, which is not planned.
    """

    engine: str
    widths: tuple[int, ...]
    group_size: int | None = None
    multiple: int = 1
    head_bits: int = 16

    def weights(self, linear: MeasuredLinear) -> int:
        """Return the number of a linear's weights, padded."""
        sizes = (linear.in_features, linear.out_features)
        return math.prod(-(-size // self.multiple) * self.multiple for size in sizes)

    def stored_bits(self, linear: MeasuredLinear, bits: int) -> int:
        """Return the size of a linear, scales included."""
        groups = 0 if self.group_size is None else linear.out_features * -(-linear.in_features // self.group_size)
        return self.weights(linear) * bits + groups * (_SCALE_BITS + bits)


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """Bits of all units.

    Attributes:
        bits: Those of each unit.
        weights: Number of weights in each.
        bpw: Bits per weight, scales included, over all of them: the decoder's linears.
        damage_nats: Summed damage in nats per token, as it was measured.
    """

    bits: tuple[int, ...]
    weights: tuple[int, ...]
    bpw: float
    damage_nats: float

    @property
    def commonest(self) -> int:
        """The bits that most weights have."""
        return self._counts.most_common(1)[0][0]

    @property
    def facts(self) -> tuple[str, ...]:
        """What there is to say, as lines."""
        total = self._counts.total()
        shares = ", ".join(f"{bits} bits {100 * self._counts[bits] / total:.1f} %" for bits in sorted(self._counts))
        return (
            f"{self.bpw:.4f} bits per weight over the decoder's linears",
            f"predicted damage {self.damage_nats:.6f} nats/token, as measured for a format of bpwise",
            f"weights: {shares}",
        )

    @property
    def _counts(self) -> Counter[int]:
        counts: Counter[int] = Counter()
        for bits, weights in zip(self.bits, self.weights, strict=True):
            counts[bits] += weights
        return counts


def group_size_of(measurement: Measurement) -> int:
    """Return the largest usual group size that the inputs of all linears are whole groups of.

    Raises:
        ConfigError: There is none.
    """
    sizes = {linear.in_features for linear in measurement.linears}
    fitting = [group for group in _GROUP_SIZES if not any(size % group for size in sizes)]
    if not fitting:
        odd = next(size for size in sizes if size % _GROUP_SIZES[-1])
        raise ConfigError(
            f"group size: no usual one fits. Got a linear with {odd} inputs. Expected multiples of {_GROUP_SIZES[-1]}. "
            "Export for another engine."
        )
    return fitting[0]


def choose_bits(measurement: Measurement, units: Sequence[Unit], grid: Grid, target: Target) -> Chosen:
    """Choose bits for every unit.

    Args:
        measurement: The measured damages.
        units: What is chosen for; together the decoder's linears.
        grid: The bits to choose from, and what they take.
        target: Bits per weight over the decoder's linears, or bytes of the whole model with its other weights at 16
            bits.

    Returns:
        The choice of least damage.

    Raises:
        BudgetError: Nothing has this size; the message gives the range that there is.
        ConfigError: No format was measured that has whole bits.
    """
    damages = _damage_by_bits(measurement)
    linears = {linear.name: linear for linear in measurement.linears}
    weights = [sum(grid.weights(linears[name]) for name in unit.linears) for unit in units]
    widths = [bits for bits in grid.widths if all(bits in damages[name] for name in linears)]
    costs = [[sum(damages[name][bits] for name in unit.linears) for bits in widths] for unit in units]
    sizes = [
        np.array([sum(grid.stored_bits(linears[name], bits) for name in unit.linears) for bits in widths])
        for unit in units
    ]
    budget = _budget_bits(measurement, grid, target, sum(weights), sizes)
    chosen = choose([np.array(cost) for cost in costs], sizes, budget)
    return Chosen(
        bits=tuple(widths[option] for option in chosen.options),
        weights=tuple(weights),
        bpw=sum(int(size[option]) for size, option in zip(sizes, chosen.options, strict=True)) / sum(weights),
        damage_nats=chosen.damage,
    )


def _damage_by_bits(measurement: Measurement) -> Mapping[str, Mapping[int, float]]:
    for each in formats().values():
        found = each.damage_by_bits(measurement)
        if found is not None:
            return found
    raise ConfigError(
        f"measurement: no curves of whole bits. Got those of {', '.join(measurement.curves) or 'no format'}. Measure "
        "the model again with `bpwise measure`, which measures for all formats."
    )


def _budget_bits(
    measurement: Measurement, grid: Grid, target: Target, weights: int, sizes: Sequence[NDArray[np.int64]]
) -> int:
    least, most = (sum(int(edge(size)) for size in sizes) for edge in (np.min, np.max))
    if target.bpw is not None:
        # The product may fall just short of the whole number of bits that it stands for.
        budget = int(target.bpw * weights + 1e-3)
        if budget < least or target.bpw > round_up(most / weights):
            raise BudgetError(
                f"{target.bpw:g} bits per weight cannot be reached: for {grid.engine} this model can have from "
                f"{shown_range(least / weights, most / weights)} over its decoder's linears. Ask for a size in this "
                "range."
            )
        return budget
    assert target.max_bytes is not None
    others = _other_bits(measurement, grid)
    if 8 * target.max_bytes - others < least:
        raise BudgetError(
            f"{target.max_bytes} bytes cannot be reached: for {grid.engine} this model takes from "
            f"{-(-(others + least) // 8)} to {-(-(others + most) // 8)}, of it {-(-others // 8)} beside the decoder's "
            "linears. Ask for a size in this range."
        )
    return 8 * target.max_bytes - others


def _other_bits(measurement: Measurement, grid: Grid) -> int:
    # All but the decoder's linears, at 16 bits; a head that is the table is stored apart only if it is quantized.
    table, head = measurement.embedding, measurement.head
    others = 16 * (table.tokens * table.hidden_size + measurement.other_weights)
    return others + (0 if table.tied and grid.head_bits == 16 else grid.head_bits * grid.weights(head))
