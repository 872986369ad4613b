"""GGUF's curves in a measurement, read and checked. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ....checkpoint.files.schemas import check_schema
from ....errors import FormatError, install_command
from ....measure.measurement import Measurement
from ....measure.measurement_file import REMEDY, MeasuredTensors
from ..ggml.types import TYPES
from .layout import Layout

__all__ = ["CURVES_VERSION", "NAME", "GgufMeasured", "gguf_curves"]

NAME = "gguf"
"""Of the format, which its curves lie under."""

CURVES_VERSION = 5
"""Raised when tensors or header change meaning."""

_NOT_MEASURED = (
    "`bpwise quantize` measures for its own format only. Run `bpwise measure`, which measures for all whose extras are "
    f"installed; for GGUF: {install_command('gguf')}."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What the curves depend on: names of the types, in the order of ``damage_nats``, and the file they are for."""

    types: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    file: dict[str, Any]

    def __post_init__(self) -> None:
        """Check the types.

        Raises:
            ValueError: ggml has them not, or one is there twice.
        """
        if len(set(self.types)) < len(self.types) or not TYPES.keys() >= set(self.types):
            raise ValueError("types must be different types of ggml")


@dataclass(frozen=True, slots=True, eq=False)
class GgufMeasured:
    """GGUF's curves of a model.

    Attributes:
        types: Names of the types that were measured, the largest first.
        layout: The unquantized file that they are for.
        table_damage_nats: Damage of the token embeddings in each type, nats per token, shape (types,): as the input of
            the first block, and as the output head if they are that too.
        table_gram: Of a table that is both, what an error in a row costs on average, float32, shape (K, K).
        tensors: By linear and name.
    """

    types: tuple[str, ...]
    layout: Layout
    table_damage_nats: NDArray[np.float32]
    table_gram: NDArray[np.float32] | None
    tensors: MeasuredTensors

    def damages(self, linear: str) -> Iterator[tuple[str, NDArray[np.float32]]]:
        """Yield the tensors of the file that hold a linear, and its damage there in each type.

        Damages are nats per token, shape (types,); infinite where a type does not fit the rows.

        Args:
            linear: Its name.
        """
        yield from zip(self.layout.rows.tensors_of(linear), self.tensors.tensors[f"{linear}.damage_nats"], strict=True)


def gguf_curves(measurement: Measurement) -> GgufMeasured:
    """Return GGUF's curves, checked.

    Raises:
        ConfigError: GGUF's types were not measured.
        FormatError: They are damaged, or of another version.
    """
    curves, tensors = measurement.curves_of(NAME, CURVES_VERSION, remedy=_NOT_MEASURED)
    where = f"{tensors.where}: header"
    known = check_schema(curves.header, _Header, FormatError, where=where, remedy=REMEDY)
    layout = Layout.from_json(known.file, where=f"{where}: file", remedy=REMEDY)

    def damage(name: str, *shape: int) -> NDArray[np.float32]:
        # Rounding errors may leave a damage of nearly nothing a little below it.
        return tensors.take(f"{name}.damage_nats", np.float32, (*shape, len(known.types)), least=None, infinite=True)

    own = measurement.layer_embedding
    if own is not None:
        damage(own.name)
    for linear in (*measurement.linears, measurement.head):
        damage(linear.name, len(layout.rows.tensors_of(linear.name)))
    table = measurement.embedding
    of_table, square = damage(table.name), (table.hidden_size, table.hidden_size)
    gram = tensors.take(f"{table.name}.gram", np.float32, square, least=None) if table.tied else None
    return GgufMeasured(known.types, layout, of_table, gram, tensors)
