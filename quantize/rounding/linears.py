"""Rounding the linears of one input group, and keeping what comes of it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.model.structure import InputGroup
from ...convert.rounding import Rounder
from ...linalg.hessian import Hessian
from ...linalg.parallel import run_all, threads_beside
from ...measure.layers.linears import LinearView, linear_of
from ...measure.measurement import Measurement
from ...measure.model.stream import StreamedModel
from .drift import InputSums, shifted

__all__ = ["LinearRounder"]


class LinearRounder:
    """Moves, rounds and keeps linears.

    Attributes:
        device: Where that is done.
        correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
    """

    def __init__(
        self,
        model: StreamedModel,
        measurement: Measurement,
        rounder: Rounder,
        store: ResumeStore,
        *,
        correct_drift: bool,
    ) -> None:
        """Hold what rounding needs.

        Args:
            model: The original.
            measurement: What is known of each linear.
            rounder: Rounds single linears.
            store: Keeps the artifacts, by name of the linear.
            correct_drift: As the attribute.
        """
        self.device = model.device
        self.correct_drift = correct_drift
        self._model = model
        self._measured = {linear.name: linear for linear in (*measurement.linears, measurement.head)}
        self._rounder = rounder
        self._store = store

    def names_of(self, block: int, group: InputGroup) -> dict[str, str]:
        """Return the linears of a group that do not stay as they are: full names, by those in the block."""
        names = zip(group.linears, self._model.linear_names(block, group), strict=True)
        return {inner: name for inner, name in names if name not in self._rounder.unquantized}

    def token_weights(self, name: str) -> Tensor:
        """Return what each calibration token counts for a linear, float32, shape (rows, tokens), on the device."""
        return torch.from_numpy(self._measured[name].token_weights).to(self.device).float()

    def round_group_(
        self, index: int, block: nn.Module, group: InputGroup, names: Mapping[str, str], sums: InputSums
    ) -> None:
        """Round linears that share their input, each on its own; their weights become what a reader will decode.

        Args:
            index: Which block holds them.
            block: The block.
            group: Their input group.
            names: Which of it are rounded, as ``names_of`` returns them.
            sums: Over all inputs of the group; used up.
        """
        gram, shift = sums.solved(correct_drift=self.correct_drift)
        hessian = Hessian(gram)
        structure = self._model.structure(index)
        modules = {name: linear_of(block, structure, inner) for inner, name in names.items()}
        run_all(
            [partial(self._round_, name, each, hessian, shift, group.joins_stream) for name, each in modules.items()],
            threads_beside(self.device) if self._rounder.on_cpu else self.device,
        )

    def _round_(self, name: str, module: LinearView, hessian: Hessian, shift: Tensor | None, joins: bool) -> None:
        artifact = self.round_linear(name, shifted(module.weight, shift, joins=joins), hessian)
        module.weight.copy_(self._rounder.decoded(name, artifact))

    def round_linear(self, name: str, target: Tensor, hessian: Hessian) -> dict[str, Tensor]:
        """Round one linear, keep the artifact and return it; arguments as for ``Rounder.round_linear``."""
        artifact = self._rounder.round_linear(self._measured[name], target, hessian)
        self._store.save(name, artifact)
        return artifact
