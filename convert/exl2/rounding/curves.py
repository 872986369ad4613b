"""Error curves: what every row group of a linear would cost at every bit width."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ....linalg.hessian import inverse_factor
from ....linalg.parallel import run_all
from ....linalg.row_groups import grouped_rows, row_powers
from ....linalg.sampling import systematic_sample
from ..file.layout import group_rows
from .feedback import errors_by_group

__all__ = ["SAMPLED_COLUMNS", "ErrorCurve", "measure_curves"]

SAMPLED_COLUMNS = 128
"""Outputs of a linear that its curve is measured on. A sample (the trial had 512) changes a row group's damage by 2 to
4 %, at all its widths alike, which the allocation hardly feels; and large linears take no longer than small ones."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ErrorCurve:
    """Predicted damage of one linear.

    Attributes:
        damage_nats: Damage of each row group at each width, nats per token, float32, shape (groups, widths). A
            linear's damage is the sum over its groups, at the width each has.
        order: Input feature of each row, int64, shape (K,). Groups are cut in this order (see ``row_groups``).
        fisher: Mean over tokens of (dL/dy)^2 of each output, float32, shape (out,), nats per squared unit of y.
        input_power: Weighted mean over tokens of x^2 of each input feature, float32, shape (K,).
        damping: Damping of the Gram matrix that the factorisation took, relative to the mean of its diagonal;
            infinite where none helped and the rounding went without feedback.
    """

    damage_nats: Tensor
    order: Tensor
    fisher: Tensor
    input_power: Tensor
    damping: float


def measure_curves(
    weights: Sequence[Tensor],
    gram: Tensor,
    fishers: Sequence[Tensor],
    *,
    widths: Sequence[int],
    group_size: int,
    damping: float,
    generalization_ratio: float = 1.0,
) -> list[ErrorCurve]:
    """Measure the linears that share one input, each in a row order of its own. A pure function of its arguments.

    The damage of an error dW is estimated as ``0.5 * sum_n F_n (dW^T H dW)_nn``, the second-order KL divergence between
    the original and the damaged model with a diagonal Fisher information F of the linear's outputs and a weight of each
    token in H (see ``statistics``). The sum runs over a sample of the outputs that stands for all.

    Args:
        weights: Each linear's weight, floating point, shape (K, out): the transpose of a Hugging Face weight.
        gram: H, weighted mean of x x^T over tokens, float32, shape (K, K).
        fishers: F of each linear, float32, shape (out,).
        widths: Bit widths to try.
        group_size: Rows of a group.
        damping: First damping to try, relative to the mean of H's diagonal.
        generalization_ratio: Damage on other tokens than those of H, relative to that on H (see ``heldout``).

    Returns:
        One curve per linear.
    """
    power = gram.diagonal().clone()
    # To sort by, single precision will do. H^-1 = U^T U.
    costs = inverse_factor(gram, damping, dtype=torch.float32).upper.square_().sum(dim=0).reciprocal_()
    orders = [
        grouped_rows(costs, row_powers(weight, fisher), group_size)
        for weight, fisher in zip(weights, fishers, strict=True)
    ]
    factors = [inverse_factor(gram, damping, order=order) for order in orders]
    rows = group_rows(gram.shape[0], group_size)
    tasks = [
        partial(_damage, weight, order, factor.upper, rows, widths, fisher)
        for weight, order, factor, fisher in zip(weights, orders, factors, fishers, strict=True)
    ]
    damages = run_all(tasks, gram.device)
    if not bool(power.any()):  # The input is zero on every token, and so is whatever an error makes of it.
        damages = [torch.zeros_like(damage) for damage in damages]
    return [
        ErrorCurve(
            damage_nats=generalization_ratio * damage,
            order=order,
            fisher=fisher,
            input_power=power,
            damping=factor.damping,
        )
        for damage, order, factor, fisher in zip(damages, orders, factors, fishers, strict=True)
    ]


def _damage(
    weight: Tensor, order: Tensor, upper: Tensor, rows: Sequence[int], widths: Sequence[int], fisher: Tensor
) -> Tensor:
    columns, shares = systematic_sample(fisher, SAMPLED_COLUMNS)
    return 0.5 * errors_by_group(weight[order[:, None], columns].float(), upper, rows, widths, shares)
