"""The calibration rows that a measurement was made with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..checkpoint.files.schemas import check_schema
from ..errors import FormatError
from .measurement import Measurement
from .text.calibration import CalibrationSet

__all__ = ["measured_rows"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _RowsProvenance:
    """What ``measurement_provenance`` says of the calibration rows."""

    calibration_text: str
    calibration_origins: tuple[str, ...]
    calibration_adds_bos: bool


def measured_rows(measurement: Measurement) -> CalibrationSet:
    """Return the calibration rows that a measurement was made with.

    Raises:
        FormatError: The measurement's provenance does not describe them.
        ShapeError: It describes others.
    """
    known = check_schema(
        measurement.provenance,
        _RowsProvenance,
        FormatError,
        where="measurement: provenance",
        remedy="The measurement is damaged: measure the model again.",
    )
    return CalibrationSet(
        tokens=torch.from_numpy(measurement.tokens).long(),
        origins=known.calibration_origins,
        description=known.calibration_text,
        adds_bos=known.calibration_adds_bos,
    )
