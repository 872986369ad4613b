"""Rounding to ggml's types: every linear as its plan says, and the token embeddings before all else."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import language_model
from ...linalg.hessian import inverse_factor
from ...linalg.parallel import cores
from ...measure.measurement import MeasuredLinear, Measurement
from ..rounding import Rounder, rounding_damping
from .ggml.kernels import decode, encode
from .ggml.rounding import round_to_type
from .llama_cpp.importance import table_importance
from .plan import GgufPlan

__all__ = ["GgufRounder"]

_SLICE_OUTPUTS = 16384
"""Outputs that are rounded together, each for itself: few enough for the temporaries of an output head to be small."""


class GgufRounder(Rounder):
    """Rounds single linears to ggml's types, and the token embeddings.

    Artifacts hold the encoded rows, in the order of the original's, as ``data``: uint8, shape (rows, row_bytes). Of
    linears also ``distance``, ``||W_hat - W||^2``, since drift may have moved weights far, zeros above all: not by
    their size can a reader tell that they are in place.
    """

    def __init__(self, plan: GgufPlan, measurement: Measurement, checkpoint: Checkpoint) -> None:
        """Take what rounding needs beside the linears themselves.

        Args:
            plan: Gives each tensor's type.
            measurement: Says what errors in the token embeddings cost.
            checkpoint: The original.
        """
        self._kinds = plan.kinds
        self._measurement = measurement
        self._source = language_model(checkpoint)
        self.names = tuple(self._kinds)
        self.identity: Mapping[str, str] = {}
        self.table = measurement.embedding.name

    def round_table(self) -> dict[str, Tensor]:
        """See ``Rounder``. Rows are rounded each for itself: see ``bpwise.convert.gguf.ggml.curves``."""
        assert self.table is not None
        kind = self._kinds[self.table]
        weight = self._source.tensor(f"{self.table}.weight").float()
        importance = table_importance(self._measurement) if kind.quantized else None
        return {"data": torch.from_numpy(encode(weight, kind, importance, threads=cores()))}

    def round_linear(self, measured: MeasuredLinear, target: Tensor, gram: Tensor) -> dict[str, Tensor]:
        """See ``Rounder``."""
        encoded = self._encoded(measured, target, gram)
        original = self._source.tensor(f"{measured.name}.weight")
        parts = zip(encoded["data"].split(_SLICE_OUTPUTS), original.split(_SLICE_OUTPUTS), strict=True)
        squares = [
            (decode(data.numpy(), self._kinds[measured.name]) - weight.float())
            .square()
            .sum(dim=1)
            .sum(dtype=torch.float64)
            for data, weight in parts
        ]
        return {**encoded, "distance": torch.stack(squares).sum()}

    def _encoded(self, measured: MeasuredLinear, target: Tensor, gram: Tensor) -> dict[str, Tensor]:
        kind = self._kinds[measured.name]
        if not kind.quantized:
            return {"data": torch.from_numpy(encode(target.T.contiguous().cpu(), kind))}
        factor = inverse_factor(gram, rounding_damping(measured))
        parts = [round_to_type(part, factor.upper, kind).data for part in target.split(_SLICE_OUTPUTS, dim=1)]
        return {"data": torch.from_numpy(np.concatenate(parts)), "damping": torch.tensor(factor.damping)}

    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        """See ``Rounder``."""
        threads = cores() if name == self.table else 1
        return decode(artifact["data"].numpy(), self._kinds[name], threads=threads)
