"""One input group, once its statistics are summed: damping, curves, and all of it as the tensors of an artifact."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from ..linalg.hessian import Hessian
from .curves import CurveInputs, CurveMaker, LinearCurves, TiedHead
from .measurement import MeasuredLinear
from .model.batches import check_finite
from .statistics.heldout import cross_validate_damping, finite_damping
from .statistics.inputs import InputStatistics

__all__ = ["TINY", "FinishedLinear", "finished_linears", "measure_group", "split_formats", "tied_head"]

_log = logging.getLogger(__name__)

TINY = 1e-30
"""Keeps sums that are zero from being divided by."""

_GRAM, _RATIO = "gram", "generalization_ratio"
"""Fields of an artifact that only ``tied_head`` reads."""

_LARGEST_WEIGHT = 65504.0
"""Token weights are kept in float16."""


@dataclass(frozen=True, slots=True, eq=False)
class FinishedLinear:
    """One linear, measured.

    Attributes:
        linear: What is known of it whatever the format.
        curves: Its curves, by format and by name.
    """

    linear: MeasuredLinear
    curves: dict[str, dict[str, NDArray[Any]]]


def measure_group(
    linears: Mapping[str, Any],
    sums: InputStatistics,
    couplings: Mapping[str, Tensor],
    makers: Sequence[CurveMaker],
    dampings: Sequence[float],
    *,
    keep_gram: bool = False,
) -> dict[str, Tensor]:
    """Measure the linears of an input group in every format.

    Args:
        linears: By full name.
        sums: Their statistics, ``fisher`` by the same names; its memory is used.
        couplings: How their outputs act together, shape (out, rank), by name.
        makers: The formats' curves.
        dampings: Dampings of the Hessian to choose from, on held-out sequences.
        keep_gram: Whether what is returned holds, of a single linear, what ``tied_head`` reads, too.

    Returns:
        What ``finished_linears`` reads, for an artifact.

    Raises:
        NumericalError: NaN or infinity in statistics or damages.
    """
    weights = [module.weight.detach().T for module in linears.values()]
    fishers = [sums.fisher[name] / sums.tokens for name in linears]
    totals = [half.weight for half in sums.halves]
    halves = [half.mean() for half in sums.halves]
    for name, fisher in zip(linears, fishers, strict=True):
        check_finite(fisher, name, "squared gradients")
    for sums_of_half in (*halves, torch.tensor(totals)):
        check_finite(sums_of_half, next(iter(linears)), "weighted inputs")
    rows = [
        torch.cat([half.new_zeros(len(half), 0), *of_half], dim=1) / max(total, TINY) ** 0.5
        for half, of_half, total in zip(halves, sums.row_gradients, totals, strict=True)
    ]
    judged = cross_validate_damping(weights, halves, fishers, row_gradients=rows, dampings=dampings)
    _log.debug(
        "damping %g for %s (%.3g times the damage on unseen text)",
        judged.damping,
        ", ".join(linears),
        judged.generalization_ratio,
    )
    first, second = (half.mul_(total) for total, half in zip(totals, halves, strict=True))
    gram = first.add_(second).div_(max(sum(totals), TINY))
    del halves, second
    inputs = CurveInputs(
        names=tuple(linears),
        weights=weights,
        hessian=Hessian(gram),
        fishers=fishers,
        damping=judged.damping,
        generalization_ratio=judged.generalization_ratio,
    )
    curves = {maker.name: maker.linears(inputs) for maker in makers}
    packed = _packed(inputs, curves, couplings, sums)
    if keep_gram:
        (name,) = linears
        packed |= {f"{name}|{_GRAM}": gram, f"{name}|{_RATIO}": torch.tensor(judged.generalization_ratio)}
    return packed


def _packed(
    inputs: CurveInputs,
    curves: Mapping[str, Sequence[LinearCurves]],
    couplings: Mapping[str, Tensor],
    sums: InputStatistics,
) -> dict[str, Tensor]:
    power = inputs.gram.diagonal().clone()
    token_weights = sums.scaled_weights().clamp(max=_LARGEST_WEIGHT).half().view(-1, sums.row_tokens)
    packed: dict[str, Tensor] = {}
    for index, (name, fisher) in enumerate(zip(inputs.names, inputs.fishers, strict=True)):
        own = {format_: each[index] for format_, each in curves.items()}
        fields = {
            "fisher": fisher,
            "input_power": power,
            "coupling": couplings[name].half(),
            "token_weights": token_weights,
            "damping": torch.tensor(max((each.damping for each in own.values()), default=inputs.damping)),
            **{f"{format_}/{key}": x for format_, each in own.items() for key, x in each.tensors.items()},
        }
        packed |= {f"{name}|{field}": tensor for field, tensor in fields.items()}
    return packed


def finished_linears(artifact: Mapping[str, Tensor]) -> dict[str, FinishedLinear]:
    """Return the linears of an artifact, by name.

    Args:
        artifact: What ``measure_group`` returned, of any number of groups; and for experts ``NAME|chosen_tokens``.
    """
    linears: dict[str, dict[str, Tensor]] = {}
    for key, tensor in artifact.items():
        name, field = key.split("|")
        linears.setdefault(name, {})[field] = tensor
    return {name: _finished(name, fields) for name, fields in linears.items()}


def tied_head(artifact: Mapping[str, Tensor]) -> TiedHead:
    """Return what errors in a table cost as the output head, of the head's artifact, made with ``keep_gram``."""
    fields = {key.split("|")[1]: tensor.cpu() for key, tensor in artifact.items()}
    return TiedHead(
        gram=fields[_GRAM],
        fisher=fields["fisher"],
        damping=finite_damping(float(fields["damping"])),
        generalization_ratio=float(fields[_RATIO]),
    )


def _finished(name: str, fields: Mapping[str, Tensor]) -> FinishedLinear:
    linear = MeasuredLinear(
        name=name,
        fisher=fields["fisher"].numpy(),
        input_power=fields["input_power"].numpy(),
        coupling=fields["coupling"].numpy(),
        token_weights=fields["token_weights"].numpy(),
        damping=float(fields["damping"]),
        chosen_tokens=int(fields["chosen_tokens"]) if "chosen_tokens" in fields else None,
    )
    return FinishedLinear(linear, split_formats(fields))


def split_formats(fields: Mapping[str, Tensor]) -> dict[str, dict[str, NDArray[Any]]]:
    """Return the tensors called ``FORMAT/NAME``, by format and name."""
    formats: dict[str, dict[str, NDArray[Any]]] = {}
    for field, tensor in fields.items():
        format_, slash, key = field.partition("/")
        if slash:
            formats.setdefault(format_, {})[key] = tensor.numpy()
    return formats
