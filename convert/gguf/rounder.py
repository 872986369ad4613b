"""Rounding to ggml's types: the parts of every linear as the plan says, and the token embeddings before all else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import numpy as np
import torch
from torch import Tensor

from ...checkpoint.carry.carried import require_float16_range
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import language_model
from ...errors import NumericalError
from ...linalg.hessian import Hessian
from ...linalg.outputs import OutputFeedback, output_sets
from ...linalg.parallel import cores, run_all
from ...measure.measurement import MeasuredLinear, Measurement
from ..rounding import RoundedModel, Rounder, rounding_damping
from .ggml.kernels import Bytes, GgmlType, decode, encode
from .ggml.rounding import ENCODING, round_to_type
from .llama_cpp.importance import table_importance
from .plan.measured import gguf_curves
from .plan.plan import GgufPlan
from .rows.rowmap import Part, RowMap
from .rows.slices import hessian_of, joined_weight, stored_part

__all__ = ["GgufRounder", "rounded_matrices", "squared_distance", "tensor_distances"]

_SLICE_OUTPUTS = 16384
"""Outputs that are rounded together, each for itself: few enough for the temporaries of an output head to be small."""


class GgufRounder(Rounder):
    """Rounds single linears to ggml's types, and the token embeddings.

    A linear lies in one tensor of the file or in several, in each of them with the tensor's type. Artifacts hold of the
    part in ``RowMap.parts`` with number N as ``data.N`` the encoded rows, in the order of the linear's outputs, their
    columns in the file's order, times its factors: uint8, shape (outputs, row_bytes). Of linears also ``distance.N``,
    ``||W_hat - W||^2`` of these rows, since drift may have moved weights far, zeros above all: not by their size can a
    reader tell that they are in place.
    """

    on_cpu = True

    def __init__(self, plan: GgufPlan, measurement: Measurement, checkpoint: Checkpoint, rows: RowMap) -> None:
        """Take what rounding needs beside the linears themselves.

        Args:
            plan: Gives each tensor's type.
            measurement: Says what errors in the token embeddings cost.
            checkpoint: The original.
            rows: Says what the tensors are made of.
        """
        self._kinds = {tensor.name: tensor.kind for tensor in plan.tensors if tensor.damage_nats is not None}
        self._exact = {tensor.name for tensor in plan.tensors if tensor.kind.quantized and tensor.damage_nats == 0.0}
        self._measurement = measurement
        self._source = language_model(checkpoint)
        self._rows = rows
        self.identity: Mapping[str, str] = {}
        linears = [linear.name for linear in (*measurement.linears, measurement.head)]
        rounded = {
            name: not self._kinds.keys().isdisjoint(rows.tensors_of(name))
            for name in (*linears, measurement.embedding.name)
        }
        self.names = tuple(name for name, found in rounded.items() if found)
        self.unquantized = frozenset(name for name in linears if not rounded[name])
        self.table = measurement.embedding.name if rounded[measurement.embedding.name] else None

    def round_table(self) -> dict[str, Tensor]:
        """See ``Rounder``. A table that is the output head too is rounded with feedback, others by ggml alone."""
        assert self.table is not None
        weight = self._source.tensor(f"{self.table}.weight").float()
        require_float16_range(f"{self.table}.weight", weight, NumericalError)
        gram = gguf_curves(self._measurement).table_gram
        made = {}
        for number, part, kind in self.planned(self.table):
            rows = stored_part(weight.T, part)
            if gram is not None and kind.quantized:
                hessian = hessian_of(Hessian(torch.from_numpy(gram)), part)
                data = _encoded(rows, hessian.factor(rounding_damping(self._measurement.head)).upper, kind, None)
            else:
                importance = table_importance(self._measurement) if kind.quantized else None
                data = encode(rows.T.contiguous(), kind, importance, threads=cores())
            made[f"data.{number}"] = torch.from_numpy(data)
        return made

    def round_linear(self, measured: MeasuredLinear, target: Tensor, hessian: Hessian) -> dict[str, Tensor]:
        """See ``Rounder``.

        Where a type can hold the original without error, the original itself is rounded, not the shifted target:
        experts published in MXFP4, for example, would be taken off their grid by the slightest shift.
        """
        original = self._source.tensor(f"{measured.name}.weight").T
        planned = list(self.planned(measured.name))
        hessians: dict[bytes, Hessian] = {}
        dampings = []
        made: dict[str, Tensor] = {}
        for number, part, kind in planned:
            wanted = stored_part(original.to(target) if part.tensor in self._exact else target, part)
            if kind.quantized:
                if part.column_key not in hessians:
                    hessians[part.column_key] = hessian_of(hessian, part)
                factor = hessians[part.column_key].factor(rounding_damping(measured))
                dampings.append(factor.damping)
                data = _encoded(wanted, factor.upper, kind, _outputs(measured, part))
            else:
                data = encode(wanted.T.contiguous().cpu(), kind)
            made[f"data.{number}"] = torch.from_numpy(data)
        if dampings:
            made["damping"] = torch.tensor(max(dampings))
        for number, part, kind in planned:
            made[f"distance.{number}"] = squared_distance(
                made[f"data.{number}"].numpy(), stored_part(original, part).T, kind
            )
        return made

    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        """See ``Rounder``. Outputs that no planned tensor holds are the original's."""
        threads = cores() if name == self.table else 1
        planned = list(self.planned(name))
        values = [decode(artifact[f"data.{number}"].numpy(), kind, threads=threads) for number, _, kind in planned]
        weight = f"{name}.weight"
        parts = [part for _, part, _ in planned]
        return joined_weight(parts, values, self._source.shape(weight), partial(self._source.tensor, weight))

    def planned(self, name: str) -> Iterator[tuple[int, Part, GgmlType]]:
        """Yield number, part and type of everything of a linear that lies in a tensor that is planned."""
        for number, tensor in enumerate(self._rows.tensors_of(name)):
            if tensor in self._kinds:
                yield number, self._rows.tensors[tensor].part(tensor, name), self._kinds[tensor]


def rounded_matrices(rounded: RoundedModel, rows: RowMap, tensor: str, shape: tuple[int, ...]) -> Iterator[Bytes]:
    """Yield a tensor's encoded matrices as the file has them: one, or those of all experts one after another.

    Only the linears of one matrix are in memory at a time.

    Args:
        rounded: What ``GgufRounder`` made.
        rows: Its map.
        tensor: Name of the tensor.
        shape: Sizes of its dimensions, outermost first.
    """
    own = rows.tensors[tensor]
    count = shape[-2]
    for first in range(0, len(own.source), count):
        matrix: Bytes | None = None
        for source in np.unique(own.source[first : first + count]):
            linear = own.linears[source]
            part = own.part(tensor, linear)
            data = rounded.artifact(linear)[f"data.{rows.tensors_of(linear).index(tensor)}"].numpy()
            here = (first <= part.rows) & (part.rows < first + count)
            if matrix is None:
                matrix = np.empty((count, data.shape[1]), dtype=np.uint8)
            matrix[part.rows[here] - first] = data[here]
        assert matrix is not None
        yield matrix


def tensor_distances(rounded: RoundedModel, rows: RowMap) -> dict[str, float]:
    """Return ``||W_hat - W||^2`` of every tensor of linears that ``GgufRounder`` rounded, by name."""
    found: dict[str, float] = {}
    for linear in rounded.names:
        for number, tensor in enumerate(rows.tensors_of(linear)):
            distance = rounded.number(linear, f"distance.{number}")
            if distance is not None:
                found[tensor] = found.get(tensor, 0.0) + distance
    return found


def _outputs(measured: MeasuredLinear, part: Part) -> OutputFeedback | None:
    fisher, coupling = (torch.from_numpy(values[part.outputs]) for values in (measured.fisher, measured.coupling))
    if part.factors is not None:
        factors = torch.from_numpy(part.factors)
        fisher, coupling = fisher / factors.square(), coupling * factors.sign()[:, None]
    sets = output_sets(len(part.outputs))
    return OutputFeedback.of(fisher, coupling, sets) if sets > 1 else None


def _encoded(target: Tensor, upper: Tensor, kind: GgmlType, outputs: OutputFeedback | None) -> Bytes:
    if outputs is not None:
        return round_to_type(target, upper, kind, outputs)
    slices = target.split(_SLICE_OUTPUTS, dim=1)
    return np.concatenate(run_all([partial(round_to_type, each, upper, kind) for each in slices], ENCODING))


def squared_distance(data: Bytes, original: Tensor, kind: GgmlType) -> Tensor:
    """Return ``||W_hat - W||^2``, float64, of encoded rows and the weights that they stand for, both (outputs, K)."""
    slices = [slice(first, first + _SLICE_OUTPUTS) for first in range(0, len(data), _SLICE_OUTPUTS)]
    missed = ((decode(data[own], kind) - original[own].float()).square().sum(dim=1) for own in slices)
    return torch.stack([squares.sum(dtype=torch.float64) for squares in missed]).sum()
