"""Tuning of GGUF files: the float16 scales of blocks get factors that bring the predictions closer to the original's.

A block's scale is a number for 256 weights, or for 32: all of them together would learn the calibration text by heart.
So a factor holds for a column of blocks of a linear, all its outputs, and another one for an output, all its inputs.
The fitting is that of all formats: ``convert.numerics.fit``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ...checkpoint.source.language import LanguageModel
from ..numerics.fit import fit_factors, fitted_factors
from ..numerics.scales import Factors, Groups
from ..rounding import Refinement, RoundedModel
from .ggml.factors import SCALED_TYPES, multiplied
from .rounder import GgufRounder, squared_distance
from .rows.slices import stored_part

__all__ = ["TunedGguf", "tune_gguf"]


@dataclass(frozen=True, slots=True, eq=False)
class TunedGguf(RoundedModel):
    """What ``GgufRounder`` made, times the factors that were fitted.

    Attributes:
        rounder: Knows parts and types.
        source: The original.
        factors: By linear.
    """

    rounder: GgufRounder
    source: LanguageModel
    factors: Mapping[str, Factors]

    @classmethod
    def of(cls, rounded: RoundedModel, rounder: GgufRounder, source: LanguageModel) -> TunedGguf:
        """Take the factors that ``tune_gguf`` left beside what was rounded."""
        return cls(rounded.names, rounded.blocks, rounded.store, rounder, source, fitted_factors(rounded))

    def artifact(self, name: str) -> dict[str, Tensor]:
        """See ``RoundedModel``."""
        made = RoundedModel.artifact(self, name)
        if name not in self.factors:
            return made
        original = self.source.tensor(f"{name}.weight").T
        inputs, outputs = self.factors[name].inputs, self.factors[name].outputs
        assert outputs is not None
        widest = _widest(self.rounder, name)
        for number, part, kind in self.rounder.planned(name):
            columns = inputs.repeat_interleave(widest // kind.block_weights)
            factors = outputs[torch.from_numpy(part.outputs)][:, None] * columns
            data = multiplied(made[f"data.{number}"].numpy(), kind, factors)
            made[f"data.{number}"] = torch.from_numpy(data)
            made[f"distance.{number}"] = squared_distance(data, stored_part(original, part).T, kind)
        return made

    def number(self, name: str, key: str) -> float | None:
        """See ``RoundedModel``."""
        if name not in self.factors:
            return RoundedModel.number(self, name, key)
        value = self.artifact(name).get(key)
        return None if value is None else float(value)


def tune_gguf(rounded: RoundedModel, rounder: GgufRounder, source: LanguageModel, refinement: Refinement) -> None:
    """Fit factors of the decoder's linears to what the original predicts, once.

    Args:
        rounded: What rounding made; what is found is kept beside it.
        rounder: Made it.
        source: The original.
        refinement: As for ``fit_factors``.

    Raises:
        NumericalError: NaN or infinity in activations or gradients.
    """

    def decoded(name: str) -> Tensor:
        return rounder.decoded(name, rounded.artifact(name))

    weights = {name: partial(decoded, name) for name in rounded.names}
    if source.tied_embeddings and rounder.table is not None:
        weights[source.head_name] = weights[rounder.table]
    groups = {
        name: found
        for name in rounded.names
        if name not in (rounder.table, source.head_name) and (found := _groups(rounder, source, name)) is not None
    }
    fit_factors(rounded, source, weights, groups, refinement)


def _groups(rounder: GgufRounder, source: LanguageModel, name: str) -> Groups | None:
    # None where a part has no scales to multiply, or parts have their columns in different orders.
    planned = list(rounder.planned(name))
    outputs, inputs = source.shape(f"{name}.weight")
    if sum(len(part.outputs) for _, part, _ in planned) != outputs:
        return None
    if len({part.column_key for _, part, _ in planned}) > 1 or any(k.name not in SCALED_TYPES for *_, k in planned):
        return None
    columns = planned[0][1].columns
    of_inputs = torch.empty(inputs, dtype=torch.int64)
    of_inputs[slice(None) if columns is None else torch.from_numpy(columns)] = torch.arange(inputs) // _widest(
        rounder, name
    )
    return Groups(of_inputs, torch.arange(outputs))


def _widest(rounder: GgufRounder, name: str) -> int:
    return max(kind.block_weights for _, _, kind in rounder.planned(name))
