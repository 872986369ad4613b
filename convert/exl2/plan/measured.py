"""EXL2's curves in a measurement, checked. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ....checkpoint.files.schemas import Positive, check_schema
from ....errors import FormatError
from ....measure.measurement import Measurement
from ....measure.measurement_file import REMEDY, MeasuredTensors
from ..file.layout import ROW_MULTIPLE, WIDTHS, group_rows

__all__ = ["CURVES_VERSION", "Exl2Measured", "exl2_curves"]

CURVES_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What the curves depend on.

    Attributes:
        widths: Bit widths of the columns of ``damage_nats``.
        group_size: Rows of a group.
    """

    widths: Annotated[tuple[int, ...], msgspec.Meta(min_length=1)]
    group_size: Positive

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ValueError: EXL2 has no such widths, or no such groups.
        """
        if self.widths != tuple(bits for bits in WIDTHS if bits in self.widths):
            raise ValueError(f"widths must be some of {WIDTHS}, in this order")
        if self.group_size % ROW_MULTIPLE:
            raise ValueError(f"group_size must be a multiple of {ROW_MULTIPLE}")


@dataclass(frozen=True, slots=True, eq=False)
class Exl2Measured:
    """EXL2's curves of a model.

    Attributes:
        widths: Bit widths that were measured, the largest first.
        group_size: Rows of a group.
        tensors: By linear and name.
    """

    widths: tuple[int, ...]
    group_size: int
    tensors: MeasuredTensors

    def damage_nats(self, name: str) -> NDArray[np.float32]:
        """Return the damage of each group of a linear at each width, nats per token, shape (groups, widths)."""
        return self.tensors.tensors[f"{name}.damage_nats"]

    def order(self, name: str) -> NDArray[np.int32]:
        """Return the input channel of each row of a linear, shape (K,); groups are cut in this order."""
        return self.tensors.tensors[f"{name}.order"]


def exl2_curves(measurement: Measurement) -> Exl2Measured:
    """Return EXL2's curves, checked: whatever they say can be indexed with.

    Raises:
        ConfigError: EXL2 was not measured.
        FormatError: They are damaged, or of another version.
    """
    curves, tensors = measurement.curves_of("exl2", CURVES_VERSION)
    known = check_schema(curves.header, _Header, FormatError, where=f"{tensors.where}: header", remedy=REMEDY)
    for linear in (*measurement.linears, measurement.head):
        groups = len(group_rows(linear.in_features, known.group_size))
        tensors.take(f"{linear.name}.damage_nats", np.float32, (groups, len(known.widths)))
        order = tensors.take(f"{linear.name}.order", np.int32, (linear.in_features,))
        if not np.array_equal(np.sort(order), np.arange(len(order), dtype=np.int32)):
            raise tensors.error(
                f"{linear.name}.order",
                "is not an order",
                "repeated or missing numbers",
                f"0 to {len(order) - 1}, each once",
            )
    return Exl2Measured(known.widths, known.group_size, tensors)
