"""Measuring GGUF's curves: the damage of every part of a linear that one tensor of the file holds, in every type."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.carry.carried import require_float16_weights
from ...measure.curves import CurveInputs, CurveMaker, LinearCurves, TableInputs
from ..numerics.tables import measure_embeddings, measure_tied_table, tied_gram
from .ggml.curves import measure_types
from .ggml.kernels import build_tables, decode, encode
from .ggml.rounding import expected_rounding
from .ggml.types import GgmlType
from .plan.layout import Layout
from .plan.measured import CURVES_VERSION, NAME
from .rows.rowmap import Part
from .rows.slices import hessian_of, outputs_of, part_of

__all__ = ["GgufCurves"]


class GgufCurves(CurveMaker):
    """Measures the damage of every tensor in each of ggml's types; see ``CurveMaker`` and ``ggml.curves``.

    Attributes:
        name: The format.
        version: Of the curves.
        kinds: The types.
        layout: The unquantized file that is quantized.
    """

    name = NAME
    version = CURVES_VERSION

    def __init__(self, kinds: Sequence[GgmlType], layout: Layout) -> None:
        """Choose what is measured.

        Args:
            kinds: The types, at least one.
            layout: The unquantized file that is quantized.
        """
        self.kinds = tuple(kinds)
        self.layout = layout

    @cached_property
    def header(self) -> dict[str, Any]:
        """See ``CurveMaker``."""
        return {"types": [kind.name for kind in self.kinds], "file": self.layout.to_json()}

    def warm_up(self) -> None:
        """See ``CurveMaker``: the tables that ggml searches for codes, of types that a tensor's rows fit."""
        lengths = {self.layout.tensors[name].shape[-1] for name in self.layout.rows.tensors}
        build_tables([kind for kind in self.kinds if any(map(kind.fits, lengths))])

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        """See ``CurveMaker``: ``damage_nats``, shape (parts, types); infinite where a type does not fit the rows.

        Parts are the tensors that hold outputs of the linear, in the order of ``RowMap.parts``; none where no tensor
        does, as of a head that is the table of embeddings: see ``table``.

        Raises:
            NumericalError: A weight is beyond float16's range.
        """
        require_float16_weights(dict(zip(inputs.names, inputs.weights, strict=True)))
        parts = [self.layout.rows.parts(name) for name in inputs.names]
        measured = [[torch.empty(0, len(self.kinds)) for _ in own] for own in parts]
        dampings = [inputs.damping] * len(parts)
        for places, pieces in _pieces(inputs, parts):
            for (linear, part), curves in zip(places, measure_types(pieces, self.kinds), strict=True):
                measured[linear][part] = curves.tensors["damage_nats"]
                dampings[linear] = max(dampings[linear], curves.damping)
        none = torch.empty(0, len(self.kinds))
        return [
            LinearCurves(tensors={"damage_nats": torch.stack(own) if own else none}, damping=damping)
            for own, damping in zip(measured, dampings, strict=True)
        ]

    def table(self, inputs: TableInputs) -> dict[str, Tensor]:
        """See ``CurveMaker``: ``damage_nats`` of the table, shape (types,), in both uses if it is the head, too.

        Of a table that is both, ``gram`` is what an error in a row costs on average, float32, shape (K, K).
        """
        fitting = [kind if kind.fits(len(inputs.fisher)) else None for kind in self.kinds]
        if inputs.head is None:
            rounded = [None if kind is None else partial(_plainly, kind, inputs.fisher) for kind in fitting]
            return {"damage_nats": measure_embeddings(inputs, rounded)}
        gram = tied_gram(inputs.fisher, inputs.head)
        expected = [None if kind is None else partial(expected_rounding, kind=kind) for kind in fitting]
        return {"damage_nats": measure_tied_table(inputs, inputs.head, gram, expected), "gram": gram}


def _plainly(kind: GgmlType, importance: Tensor, rows: Tensor) -> Tensor:
    # As ggml alone rounds them.
    return decode(encode(rows, kind, importance), kind)


def _pieces(
    inputs: CurveInputs, parts: Sequence[Sequence[Part]]
) -> Iterator[tuple[list[tuple[int, int]], CurveInputs]]:
    # The parts as linears of their own, those with the same order of columns together; and where each belongs.
    together: dict[bytes, list[tuple[int, int]]] = {}
    for linear, own in enumerate(parts):
        for number, part in enumerate(own):
            together.setdefault(part.column_key, []).append((linear, number))
    for places in together.values():
        taken = [(linear, parts[linear][number]) for linear, number in places]
        like = replace(
            inputs,
            names=tuple(inputs.names[linear] for linear, _ in taken),
            weights=[part_of(inputs.weights[linear], part) for linear, part in taken],
            hessian=hessian_of(inputs.hessian, taken[0][1]),
            fishers=[outputs_of(inputs.fishers[linear], part) for linear, part in taken],
        )
        yield places, like
