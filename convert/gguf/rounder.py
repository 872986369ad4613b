"""Rounding to ggml's types: every linear as its plan says, through the rounding pass, and the token embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.source.checkpoint import Checkpoint
from ...checkpoint.source.language import LanguageModel, language_model
from ...linalg.hessian import inverse_factor
from ...linalg.parallel import cores
from ...measure.measurement import MeasuredLinear, Measurement
from ...measure.model.stream import StreamedModel
from ...measure.run import kept_inputs, resolve_device
from ...progress import Progress, silent
from ...quantize.rounding.rounding_pass import ROUNDED, RoundingPass
from ..rounded import Drift, RoundedModel, rounding_damping
from .ggml.kernels import Bytes, decode, encode
from .ggml.rounding import round_to_type
from .ggml.types import GgmlType
from .plan import TypePlan

__all__ = ["RoundedTypes", "round_types", "table_importance", "type_rounding_identity", "types_rounded_before"]

_SLICE_OUTPUTS = 16384
"""Outputs that are rounded together, each for itself: few enough for the temporaries of an output head to be small."""


@dataclass(frozen=True, slots=True, eq=False)
class RoundedTypes:
    """The encoded tensors of a model, on disk until they are asked for.

    Attributes:
        names: Full names of the linears, and of the token embeddings, without ``.weight``.
        blocks: Number of decoder blocks.
        artifacts: Where they are kept.
    """

    names: tuple[str, ...]
    blocks: int
    artifacts: ResumeStore

    def data(self, name: str) -> Bytes:
        """Return the encoded rows of a tensor, in the order of the original's: uint8, shape (rows, row_bytes)."""
        data: Bytes = self.artifacts.load(name)["data"].numpy()
        return data

    def dampings(self) -> dict[str, float]:
        """Return the relative damping that each linear's rounding took; without those that need no feedback."""
        return self._numbers("damping")

    def distances(self) -> dict[str, float]:
        """Return ``||W_hat - W||^2`` of each linear; without what was rounded as it is, not moved to cancel drift."""
        return self._numbers("distance")

    def _numbers(self, key: str) -> dict[str, float]:
        found = ((name, self.artifacts.number(name, key)) for name in self.names)
        return {name: number for name, number in found if number is not None}

    def drift(self) -> list[Drift]:
        """Return how far the hidden states after every block are from the original's, over the calibration rows."""
        return RoundedModel(self.names, self.blocks, self.artifacts).drift()


def type_rounding_identity(checkpoint: Checkpoint, plan: TypePlan, device: str) -> dict[str, Any]:
    """Return all that the artifacts of ``round_types`` depend on, as ``ResumeStore`` takes it."""
    return {
        "model": checkpoint.fingerprint,
        "measurement": plan.measurement,
        "types": {tensor.name: tensor.type for tensor in plan.tensors},
        "device": resolve_device(device).type,
    }


def round_types(
    checkpoint: Checkpoint,
    measurement: Measurement,
    plan: TypePlan,
    work: Path,
    *,
    device: str = "auto",
    offload_dir: Path | None = None,
    progress: Progress = silent,
) -> RoundedTypes:
    """Quantize every tensor as the plan says: the token embeddings first, then block after block, the head last.

    Args:
        checkpoint: The original model.
        measurement: Gives the calibration rows, and what is known of each linear.
        plan: Gives each tensor's type.
        work: Work directory; finished blocks in it are not done again.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand. ggml's encoder itself always
            runs on the CPU.
        offload_dir: As in ``MeasureConfig``.
        progress: Wraps the blocks.

    Returns:
        The encoded tensors.

    Raises:
        NumericalError: NaN or infinity in weights or activations.
    """
    place = resolve_device(device)
    artifacts = ResumeStore(work, ROUNDED, type_rounding_identity(checkpoint, plan, device))
    source = language_model(checkpoint)
    model = StreamedModel(source, device=place, dtype=torch.float32, offload_dir=offload_dir)
    inputs = kept_inputs(work, measurement)
    rounder: Any = _TypeRounder(plan.kinds, source)
    run = RoundingPass(model, measurement, rounder, artifacts, correct_drift=True, inputs=inputs)
    table = _rounded_table(checkpoint, measurement, plan, artifacts)
    run.blocks(progress, table)
    if not measurement.embedding.tied:
        run.head()
    return RoundedTypes(tuple(plan.kinds), model.block_count, artifacts)


def types_rounded_before(checkpoint: Checkpoint, plan: TypePlan, work: Path, *, device: str) -> RoundedTypes | None:
    """Return what an earlier run rounded that was cut off before its end, None if that is not there, or not all of it.

    Args:
        checkpoint: As for ``round_types``.
        plan: As for ``round_types``.
        work: As for ``round_types``.
        device: As for ``round_types``.
    """
    artifacts = ResumeStore.existing(work, ROUNDED, type_rounding_identity(checkpoint, plan, device))
    blocks = language_model(checkpoint).block_count
    names = tuple(plan.kinds)
    if artifacts is None or not all(map(artifacts.has, [*names, *(f"drift-{index}" for index in range(blocks))])):
        return None
    return RoundedTypes(names, blocks, artifacts)


def table_importance(measurement: Measurement) -> Tensor:
    """Return what squared errors in each column of the token embeddings cost, float32, shape (hidden size,).

    A table that is the output head too costs there what its inputs weigh, summed over its rows, and as embeddings what
    the gradients say, summed over the rows that each token reads.
    """
    table, head = measurement.embedding, measurement.head
    importance = torch.from_numpy(table.importance)
    if table.tied:
        importance = importance + float(head.fisher.sum()) * torch.from_numpy(head.input_power)
    return importance


def _rounded_table(checkpoint: Checkpoint, measurement: Measurement, plan: TypePlan, artifacts: ResumeStore) -> Tensor:
    # Its rows are rounded each for itself: see ``bpwise.convert.gguf.ggml.curves``.
    name = measurement.embedding.name
    kind = plan.kinds[name]
    if not artifacts.has(name):
        weight = checkpoint.tensor(f"{name}.weight").float()
        importance = table_importance(measurement) if kind.quantized else None
        artifacts.save(name, {"data": torch.from_numpy(encode(weight, kind, importance, threads=cores()))})
    return decode(artifacts.load(name)["data"].numpy(), kind, threads=cores())


class _TypeRounder:
    """Rounds single linears to ggml's types."""

    def __init__(self, kinds: Mapping[str, GgmlType], source: LanguageModel) -> None:
        self._kinds = kinds
        self._source = source
        self.unquantized: frozenset[str] = frozenset()

    def round_linear(self, measured: MeasuredLinear, target: Tensor, gram: Tensor) -> dict[str, Tensor]:
        """See ``Rounder``."""
        kept = self._encoded(measured, target, gram)
        # Drift may have moved weights far, zeros above all: not by their size can a reader tell that they are in place.
        original = self._source.tensor(f"{measured.name}.weight")
        parts = zip(kept["data"].split(_SLICE_OUTPUTS), original.split(_SLICE_OUTPUTS), strict=True)
        squares = [
            (self.decoded(measured.name, {"data": data}) - weight.float()).square().sum(dim=1).sum(dtype=torch.float64)
            for data, weight in parts
        ]
        return {**kept, "distance": torch.stack(squares).sum()}

    def _encoded(self, measured: MeasuredLinear, target: Tensor, gram: Tensor) -> dict[str, Tensor]:
        kind = self._kinds[measured.name]
        if not kind.quantized:
            return {"data": torch.from_numpy(encode(target.T.contiguous().cpu(), kind))}
        factor = inverse_factor(gram, rounding_damping(measured))
        parts = [round_to_type(part, factor.upper, kind).data for part in target.split(_SLICE_OUTPUTS, dim=1)]
        return {"data": torch.from_numpy(np.concatenate(parts)), "damping": torch.tensor(factor.damping)}

    def decoded(self, name: str, kept: dict[str, Tensor]) -> Tensor:
        """See ``Rounder``."""
        return decode(kept["data"].numpy(), self._kinds[name])
