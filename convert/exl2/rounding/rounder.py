"""Rounding to EXL2: every linear as its plan says; scales tuned in the end where that is asked for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.model.families import HEAD
from ....checkpoint.source.language import LanguageModel
from ....linalg.hessian import Hessian, factor_hessian
from ....linalg.outputs import OutputFeedback
from ....measure.measurement import MeasuredLinear, Measurement
from ...numerics.fit import fit_factors, fitted_factors
from ...numerics.scales import Groups
from ...rounding import Refinement, RoundedModel, Rounder, rounding_damping
from ..file.layout import RowGroup
from ..file.linear import QuantizedLinear
from ..plan.measured import exl2_curves
from ..plan.plan import Exl2Plan, LinearPlan
from .coupling import OUTPUT_SETS
from .feedback import round_linear_

__all__ = ["Exl2Rounder", "rounded_linear", "tune_rounded"]


class Exl2Rounder(Rounder):
    """Rounds single linears to EXL2."""

    def __init__(self, plan: Exl2Plan, measurement: Measurement, *, couple_outputs: bool = True) -> None:
        """Take what rounding needs beside the linears themselves.

        Args:
            plan: Gives each row group's width.
            measurement: Gives each linear's row order.
            couple_outputs: Whether outputs make up for each other's errors.
        """
        linears = (*plan.linears, *([plan.head] if plan.head else []))
        self.names = tuple(linear.name for linear in linears)
        self.identity: Mapping[str, Any] = {"couple_outputs": couple_outputs}
        self.unquantized = frozenset(linear.name for linear in plan.unquantized)
        self._plans = {linear.name: linear for linear in linears}
        self._curves = exl2_curves(measurement)
        self._couple_outputs = couple_outputs

    def round_linear(self, measured: MeasuredLinear, target: Tensor, hessian: Hessian) -> dict[str, Tensor]:
        """See ``Rounder``."""
        plan = self._plans[measured.name]
        order = self._stored_order(plan).to(target.device)
        factor = factor_hessian(hessian.gram, rounding_damping(measured), order=order)
        fisher = torch.from_numpy(measured.fisher).to(target.device)
        coupling = torch.from_numpy(measured.coupling)
        outputs = OutputFeedback.of(fisher, coupling, OUTPUT_SETS) if self._couple_outputs else None
        linear, _ = round_linear_(target, factor.upper, plan.stored_groups, order, fisher, outputs)
        linear.validate(plan.name)
        return _pack(linear, factor.damping)

    def decoded(self, name: str, artifact: Mapping[str, Tensor]) -> Tensor:
        """See ``Rounder``."""
        return _unpack(artifact).dequantize()

    def _stored_order(self, plan: LinearPlan) -> Tensor:
        # The measured row order, its groups rearranged by width.
        starts = [0, *itertools.accumulate(plan.group_rows)]
        order = torch.from_numpy(self._curves.order(plan.name)).long()
        return torch.cat([order[starts[g] : starts[g] + plan.group_rows[g]] for g in plan.stored_order])


def rounded_linear(rounded: RoundedModel, source: LanguageModel, name: str, *, tuned: bool) -> QuantizedLinear:
    """Return one linear as it is to be written.

    Readers do not reorder the biases of an MLP along with the rows of its last linear. In an MLP that has some, the
    neurons themselves are reordered instead, which changes nothing for the model around it.

    Args:
        rounded: What rounding made.
        source: The original.
        name: Full name of the linear.
        tuned: Whether its scales are those that ``tune_rounded`` found.
    """
    linear = _unpack(rounded.artifact(name))
    factors = fitted_factors(rounded) if tuned else {}
    if name in factors:
        linear = replace(linear, max_scales=(linear.max_scales.float() * factors[name].inputs).half())
    makers, reader = source.family.mlp
    block = next((name.removesuffix(x) for x in (*makers, reader) if name.endswith(f".{x}")), None)
    if block is None or f"{block}{makers[0]}.bias" not in source.names:
        return linear
    if name == block + reader:
        return replace(linear, order=torch.arange(linear.in_features))
    neurons = rounded.artifact(block + reader)["order"]
    return replace(
        linear,
        codes=linear.codes[:, neurons],
        scale_codes=linear.scale_codes[:, neurons],
        bias=source.tensor(f"{name}.bias")[neurons].half(),
    )


def tune_rounded(rounded: RoundedModel, source: LanguageModel, refinement: Refinement) -> None:
    """Fit the scales of the decoder's row groups to what the original predicts (``convert.numerics``), once.

    Args:
        rounded: What rounding made; what is found is kept beside it.
        source: The original.
        refinement: As for ``fit_factors``.

    Raises:
        NumericalError: NaN or infinity in activations or gradients.
    """

    def decoded(name: str) -> Tensor:
        return _unpack({key: value.to(refinement.device) for key, value in rounded.artifact(name).items()}).dequantize()

    weights = {name: partial(decoded, name) for name in rounded.names}
    groups = {name: Groups(_unpack(rounded.artifact(name)).group_of_input) for name in rounded.names if name != HEAD}
    fit_factors(rounded, source, weights, groups, refinement)


def _pack(linear: QuantizedLinear, damping: float) -> dict[str, Tensor]:
    return {
        "groups": torch.tensor([[group.bits, group.rows] for group in linear.groups]),
        "codes": linear.codes,
        "scale_codes": linear.scale_codes,
        "max_scales": linear.max_scales,
        "order": linear.order,
        "damping": torch.tensor(damping),
    }


def _unpack(tensors: Mapping[str, Tensor]) -> QuantizedLinear:
    return QuantizedLinear(
        groups=tuple(RowGroup(bits, rows) for bits, rows in tensors["groups"].tolist()),
        codes=tensors["codes"],
        scale_codes=tensors["scale_codes"],
        max_scales=tensors["max_scales"],
        order=tensors["order"],
    )
