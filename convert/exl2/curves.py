"""Measuring EXL2's curves: the damage of every row group at every width."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ...errors import ConfigError
from ...measure.curves import CurveInputs, CurveMaker, LinearCurves, TableInputs
from .file.layout import ROW_MULTIPLE, WIDTHS
from .plan.measured import CURVES_VERSION

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Exl2Curves"]


class Exl2Curves(CurveMaker):
    """Measures the damage of every row group at every width; see ``CurveMaker`` and ``rounding.curves``.

    Attributes:
        name: The format.
        version: Of the curves.
        group_size: Rows that share a bit width and a scale.
    """

    name = "exl2"
    version = CURVES_VERSION

    def __init__(self, group_size: int = 32) -> None:
        """Choose the groups.

        Args:
            group_size: Rows that share a bit width and a scale; a multiple of 32.

        Raises:
            ConfigError: It is none.
        """
        if group_size < ROW_MULTIPLE or group_size % ROW_MULTIPLE:
            raise ConfigError(
                f"group_size: not usable. Got {group_size}. Expected a positive multiple of {ROW_MULTIPLE}."
                " Choose another."
            )
        self.group_size = group_size

    @property
    def header(self) -> dict[str, Any]:
        """See ``CurveMaker``."""
        return {"widths": list(WIDTHS), "group_size": self.group_size}

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        """See ``CurveMaker``: ``damage_nats``, shape (groups, widths), and ``order``, int32, shape (K,)."""
        from .rounding.curves import measure_curves  # noqa: PLC0415 - keeps reading free of torch

        return measure_curves(inputs, WIDTHS, self.group_size)

    def table(self, inputs: TableInputs) -> dict[str, Tensor]:
        """See ``CurveMaker``: EXL2 leaves the embeddings as they are."""
        return {}
