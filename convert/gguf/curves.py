"""GGUF's curves in a measurement: what is measured of every tensor, and how it is read again. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...checkpoint.files.schemas import check_schema
from ...errors import FormatError
from ...measure.curves import CurveInputs, LinearCurves, TableInputs
from ...measure.measurement import Measurement
from ...measure.measurement_file import REMEDY, MeasuredTensors
from .ggml.types import TYPES, GgmlType

if TYPE_CHECKING:
    from torch import Tensor

_NOT_MEASURED = (
    "Measure the model again with `bpwise measure`, with ggml's library installed: pip install 'bpwise[gguf]'."
)

__all__ = ["GgufCurves", "GgufMeasured", "gguf_curves"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Header:
    """What the curves depend on: names of the types, in the order of ``damage_nats``."""

    types: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Check the types.

        Raises:
            ValueError: ggml has them not, or one is there twice.
        """
        if len(set(self.types)) < len(self.types) or not TYPES.keys() >= set(self.types):
            raise ValueError("types must be different types of ggml")


class GgufCurves:
    """Measures the damage of every tensor in each of ggml's types; see ``CurveMaker`` and ``ggml.curves``.

    Attributes:
        name: The format.
        version: Of the curves.
        kinds: The types.
    """

    name = "gguf"
    version = 1

    def __init__(self, kinds: Sequence[GgmlType]) -> None:
        """Choose the types, at least one."""
        self.kinds = tuple(kinds)

    @classmethod
    def installed(cls) -> GgufCurves | None:
        """Return what measures all types that are worth it; None where ggml's library is not installed."""
        from .ggml.curves import measured_types  # noqa: PLC0415 - keeps reading free of torch

        kinds = measured_types()
        return cls(kinds) if kinds else None

    @property
    def header(self) -> dict[str, list[str]]:
        """See ``CurveMaker``."""
        return {"types": [kind.name for kind in self.kinds]}

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        """See ``CurveMaker``: ``damage_nats``, shape (types,); infinite where a type does not fit the row length."""
        from .ggml.curves import measure_plain_types, measure_types  # noqa: PLC0415 - keeps reading free of torch

        if inputs.with_feedback:
            return measure_types(inputs, self.kinds)
        damages = [
            measure_plain_types(
                weight, inputs.gram, fisher, self.kinds, generalization_ratio=inputs.generalization_ratio
            )
            for weight, fisher in zip(inputs.weights, inputs.fishers, strict=True)
        ]
        # Nothing was factored, and nothing given up: other formats' dampings hold.
        return [LinearCurves(tensors={"damage_nats": damage}, damping=inputs.damping) for damage in damages]

    def table(self, inputs: TableInputs) -> dict[str, Tensor]:
        """See ``CurveMaker``: ``damage_nats`` of the embeddings, as the input of the first block, shape (types,)."""
        from .ggml.curves import measure_table  # noqa: PLC0415 - keeps reading free of torch

        return {"damage_nats": measure_table(inputs, self.kinds)}


@dataclass(frozen=True, slots=True, eq=False)
class GgufMeasured:
    """GGUF's curves of a model.

    Attributes:
        types: Names of the types that were measured, the largest first.
        table_damage_nats: Damage of the token embeddings in each type, as the input of the first block, nats per token,
            shape (types,).
        tensors: By linear and name.
    """

    types: tuple[str, ...]
    table_damage_nats: NDArray[np.float32]
    tensors: MeasuredTensors

    def damage_nats(self, name: str) -> NDArray[np.float32]:
        """Return the damage of a linear in each type, nats per token, shape (types,); infinite where none fits."""
        return self.tensors.tensors[f"{name}.damage_nats"]


def gguf_curves(measurement: Measurement) -> GgufMeasured:
    """Return GGUF's curves, checked.

    Raises:
        ConfigError: GGUF's types were not measured.
        FormatError: They are damaged, or of another version.
    """
    curves, tensors = measurement.curves_of(GgufCurves.name, GgufCurves.version, remedy=_NOT_MEASURED)
    known = check_schema(curves.header, _Header, FormatError, where=f"{tensors.where}: header", remedy=REMEDY)

    def damage(name: str) -> NDArray[np.float32]:
        # Rounding errors may leave a damage of nearly nothing a little below it.
        return tensors.take(f"{name}.damage_nats", np.float32, (len(known.types),), least=None, infinite=True)

    for linear in (*measurement.linears, measurement.head):
        damage(linear.name)
    return GgufMeasured(known.types, damage(measurement.embedding.name), tensors)
