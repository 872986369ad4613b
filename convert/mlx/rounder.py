"""Rounding to MLX's schemes: every linear as the plan says of its module, and the token embeddings before all else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.source.language import LanguageModel
from ...linalg.hessian import Hessian
from ...linalg.outputs import OutputFeedback
from ...measure.measurement import MeasuredLinear, Measurement
from ..rounding import Rounder, rounding_damping
from .file.layout import Layout
from .grid.packing import decode, pack_codes, unpack_codes
from .grid.rounding import Affine, output_sets, round_affine, round_plainly
from .grid.schemes import Scheme
from .plan.measured import mlx_curves
from .plan.plan import MlxPlan

__all__ = ["PARTS", "MlxRounder", "dtype_of"]

PARTS = ("weight", "scales", "biases")
"""What an artifact holds, as MLX stores it: words of codes, int32 in place of uint32, shape (out, K bits / 32); scales
and biases, shape (out, groups). Linears also hold the ``damping`` that their Hessian took."""

_SLICE_OUTPUTS = 16384
"""Outputs that are rounded together, each for itself: few enough for the temporaries of a table to be small."""


class MlxRounder(Rounder):
    """Rounds single linears, and the token embeddings; see ``PARTS``."""

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
            linear: (scheme, dtype_of(layout.tensors[name].dtype))
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
        found = [round_affine(x, factor.upper, scheme, dtype, outputs) for x in _slices(target, outputs is None)]
        return {**_stored(found, scheme, dtype), "damping": torch.tensor(factor.damping)}

    def round_table(self) -> dict[str, Tensor]:
        """See ``Rounder``. A table that is the output head too is rounded with feedback."""
        assert self.table is not None
        scheme, dtype = self._schemes[self.table]
        weight = self._source.tensor(f"{self.table}.weight").float().T.contiguous()
        gram = mlx_curves(self._measurement).table_gram
        if gram is None:
            costs = torch.from_numpy(self._measurement.embedding.importance)
            found = [round_plainly(part, costs, scheme, dtype) for part in _slices(weight, True)]
        else:
            upper = Hessian(torch.from_numpy(gram)).factor(rounding_damping(self._measurement.head)).upper
            found = [round_affine(part, upper, scheme, dtype) for part in _slices(weight, True)]
        return _stored(found, scheme, dtype)

    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        """See ``Rounder``."""
        scheme, _ = self._schemes[name]
        words, scales, biases = (artifact[part] for part in PARTS)
        return decode(unpack_codes(words.cpu(), scheme.bits).to(scales.device), scales, biases)


def dtype_of(name: str) -> torch.dtype:
    """Return what scales of a tensor are stored in, by the name of its dtype."""
    found: torch.dtype = getattr(torch, name)
    return found


def _slices(weight: Tensor, cut: bool) -> Iterator[Tensor]:
    if not cut or weight.shape[1] <= _SLICE_OUTPUTS:
        yield weight
        return
    for part in weight.split(_SLICE_OUTPUTS, dim=1):
        yield part.contiguous()


def _stored(found: list[Affine], scheme: Scheme, dtype: torch.dtype) -> dict[str, Tensor]:
    codes = [pack_codes(each.codes.T.to(torch.uint8).contiguous(), scheme.bits) for each in found]
    scales, biases = ([x.T.to(dtype).contiguous() for x in own] for own in _scales_and_biases(found))
    return {"weight": torch.cat(codes), "scales": torch.cat(scales), "biases": torch.cat(biases)}


def _scales_and_biases(found: list[Affine]) -> tuple[list[Tensor], list[Tensor]]:
    return [each.scales for each in found], [each.biases for each in found]
