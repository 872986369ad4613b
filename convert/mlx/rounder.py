"""Rounding to MLX's schemes: every linear as the plan says of its module, and the token embeddings before all else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.source.language import LanguageModel
from ...linalg.hessian import Hessian
from ...linalg.outputs import OutputFeedback, output_sets
from ...measure.measurement import MeasuredLinear, Measurement
from ..rounding import Rounder, rounding_damping
from .file.layout import Layout
from .grid.packing import PARTS, decode_packed, pack_codes
from .grid.rounding import Affine, round_affine, round_plainly
from .grid.schemes import Scheme
from .plan.measured import mlx_curves
from .plan.plan import MlxPlan

__all__ = ["MlxRounder"]

_SLICE_OUTPUTS = 16384
"""Outputs that are rounded together, each for itself: few enough for the temporaries of a table to be small."""


class MlxRounder(Rounder):
    """Rounds single linears, and the token embeddings.

    Artifacts hold the parts of a module in ``PARTS``, words as int32 in place of uint32. Those of linears also hold the
    ``damping`` that their Hessian took.
    """

    def __init__(self, plan: MlxPlan, measurement: Measurement, source: LanguageModel, layout: Layout) -> None:
        """Take what rounding needs beside the linears themselves.

        Args:
            plan: Gives each module's scheme.
            measurement: Says what errors in the token embeddings cost.
            source: The original.
            layout: The model as mlx-lm has it.
        """
        self._source = source
        self._measurement = measurement
        self._schemes: dict[str, tuple[Scheme, torch.dtype]] = {
            linear: (scheme, getattr(torch, layout.tensors[name].dtype))
            for name, scheme in plan.kinds.items()
            for linear in layout.tensors[name].linears
        }
        linears = [linear.name for linear in (*measurement.linears, measurement.head)]
        table = measurement.embedding.name
        self.identity: Mapping[str, Any] = {}
        self.names = tuple(name for name in (*linears, table) if name in self._schemes)
        self.unquantized = frozenset(name for name in linears if name not in self._schemes)
        self.table = table if table in self._schemes else None

    def round_linear(self, measured: MeasuredLinear, target: Tensor, hessian: Hessian) -> dict[str, Tensor]:
        """See ``Rounder``."""
        scheme, dtype = self._schemes[measured.name]
        factor = hessian.factor(rounding_damping(measured))
        outputs, sets = None, output_sets(measured.out_features)
        if sets > 1:
            fisher, coupling = torch.from_numpy(measured.fisher), torch.from_numpy(measured.coupling)
            outputs = OutputFeedback.of(fisher.to(target.device), coupling.to(target.device), sets)
        parts = _slices(target) if outputs is None else [target]
        found = [round_affine(part, factor.upper, scheme, dtype, outputs) for part in parts]
        return {**_stored(found, scheme, dtype), "damping": torch.tensor(factor.damping)}

    def round_table(self) -> dict[str, Tensor]:
        """See ``Rounder``. A table that is the output head too is rounded with feedback."""
        assert self.table is not None
        scheme, dtype = self._schemes[self.table]
        weight = self._source.tensor(f"{self.table}.weight").float().T.contiguous()
        gram = mlx_curves(self._measurement).table_gram
        if gram is None:
            costs = torch.from_numpy(self._measurement.embedding.importance)
            found = [round_plainly(part, costs, scheme, dtype) for part in _slices(weight)]
        else:
            upper = Hessian(torch.from_numpy(gram)).factor(rounding_damping(self._measurement.head)).upper
            found = [round_affine(part, upper, scheme, dtype) for part in _slices(weight)]
        return _stored(found, scheme, dtype)

    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        """See ``Rounder``."""
        scheme, _ = self._schemes[name]
        words, scales, biases = (artifact[part] for part in PARTS)
        return decode_packed(words, scales, biases, scheme.bits)


def _slices(weight: Tensor) -> list[Tensor]:
    return [part.contiguous() for part in weight.split(_SLICE_OUTPUTS, dim=1)]


def _stored(found: list[Affine], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    codes = [pack_codes(each.codes.T.to(torch.uint8).contiguous(), scheme.bits) for each in found]
    scales, biases = ([x.T.to(dtype) for x in own] for own in zip(*((x.scales, x.biases) for x in found), strict=True))
    return dict(zip(PARTS, map(torch.cat, (codes, scales, biases)), strict=True))
