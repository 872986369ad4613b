"""MLX's curves in a measurement, read and checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ....checkpoint.files.schemas import check_schema
from ....errors import FormatError, install_command
from ....measure.measurement import Measurement
from ....measure.measurement_file import REMEDY
from ..file.layout import Layout, layout_from_json
from ..grid.schemes import SCHEMES, Scheme, scheme_named

__all__ = ["CURVES_VERSION", "NAME", "MlxMeasured", "mlx_curves"]

NAME = "mlx"
"""Of the format, which its curves lie under."""

CURVES_VERSION = 1
"""Raised when tensors or header change meaning."""

_NOT_MEASURED = (
    "`bpwise quantize` measures for its own format only. Run `bpwise measure`, which measures for all whose extras are "
    f"installed; for MLX: {install_command('mlx')}."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What the curves depend on: names of the schemes, in the order of ``damage_nats``, and the model they are for."""

    schemes: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    model: dict[str, Any]

    def __post_init__(self) -> None:
        """Check the schemes.

        Raises:
            ValueError: MLX has them not, or one is there twice.
        """
        if len(set(self.schemes)) < len(self.schemes) or not {each.name for each in SCHEMES} >= set(self.schemes):
            raise ValueError("schemes must be different schemes of MLX")


@dataclass(frozen=True, slots=True, eq=False)
class MlxMeasured:
    """MLX's curves of a model.

    Attributes:
        schemes: What was measured, the largest first.
        layout: The model that they are for, as mlx-lm has it.
        damages: Damage of every linear in each scheme, and of the token embeddings by their name: as the input of the
            first block, and as the output head if they are that too. Nats per token, float32, shape (schemes,);
            infinite where a scheme does not fit.
        table_gram: Of a table that is both, what an error in a row costs on average, float32, shape (K, K).
    """

    schemes: tuple[Scheme, ...]
    layout: Layout
    damages: Mapping[str, NDArray[np.float32]]
    table_gram: NDArray[np.float32] | None


def mlx_curves(measurement: Measurement) -> MlxMeasured:
    """Return MLX's curves, checked.

    Raises:
        ConfigError: MLX was not measured.
        FormatError: Its curves are damaged, or of another version.
    """
    curves, tensors = measurement.curves_of(NAME, CURVES_VERSION, remedy=_NOT_MEASURED)
    where = f"{tensors.where}: header"
    known = check_schema(curves.header, _Header, FormatError, where=where, remedy=REMEDY)
    layout = layout_from_json(known.model, where=f"{where}: model", remedy=REMEDY)
    table = measurement.embedding
    # Rounding errors may leave a damage of nearly nothing a little below it.
    damages = {
        name: tensors.take(f"{name}.damage_nats", np.float32, (len(known.schemes),), least=None, infinite=True)
        for name in (*(linear.name for linear in (*measurement.linears, measurement.head)), table.name)
    }
    square = (table.hidden_size, table.hidden_size)
    gram = tensors.take(f"{table.name}.gram", np.float32, square, least=None) if table.tied else None
    schemes = tuple(scheme for scheme in map(scheme_named, known.schemes) if scheme is not None)
    return MlxMeasured(schemes, layout, damages, gram)
