"""Error curves: what every row group of a linear would cost at every bit width.

Notes:
    ``damage[g, b] = 0.5 r sum_n F_n sum_{k in g} e_kn(b)^2``, e being what error feedback leaves when all groups have
    width b (``feedback.errors_by_group``), F_n the Fisher weight of an output, r the generalization ratio
    (``heldout``). The sum over n runs over a sample of outputs whose weights stand for all F. Since
    ``sum_k e_kn^2 = (dW^T H dW)_nn``, the sum over g is the damage that ``bpwise.measure.curves`` defines. Source: GPTQ
    (arXiv 2210.17323) for e; that its squares add up to the linear's error lets every group be booked, and planned, by
    itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ....checkpoint.carry.carried import require_float16_weights
from ....linalg.hessian import factor_hessian, inverse_diagonal
from ....linalg.parallel import run_all
from ....linalg.row_groups import grouped_rows, row_powers
from ....linalg.sampling import systematic_sample
from ....measure.curves import CurveInputs, LinearCurves
from ....measure.model.batches import check_finite
from ..file.layout import group_rows
from .feedback import errors_by_group

__all__ = ["SAMPLED_COLUMNS", "measure_curves"]

SAMPLED_COLUMNS = 128
"""Outputs of a linear that its curve is measured on. A sample (the trial had 512) changes a row group's damage by 2 to
4 %, at all its widths alike, which the allocation hardly feels; and large linears take no longer than small ones."""


def measure_curves(inputs: CurveInputs, widths: Sequence[int], group_size: int) -> list[LinearCurves]:
    """Measure the linears of an input group, each in a row order of its own. A pure function of its arguments.

    Args:
        inputs: The linears. Damage is summed over a sample of the outputs that stands for all.
        widths: Bit widths to try.
        group_size: Rows of a group.

    Returns:
        For each linear ``damage_nats``, nats per token, float32, shape (groups, widths), and ``order``, the input
        channel of each row, int32, shape (K,): groups are cut in this order (see ``row_groups``).

    Raises:
        NumericalError: A weight is beyond float16's range, or a damage is NaN or infinite.
    """
    gram, fishers = inputs.gram, inputs.fishers
    require_float16_weights(dict(zip(inputs.names, inputs.weights, strict=True)))
    costs = inverse_diagonal(inputs.hessian.factor(inputs.damping)).reciprocal()
    orders = [
        grouped_rows(costs, row_powers(weight, fisher), group_size)
        for weight, fisher in zip(inputs.weights, fishers, strict=True)
    ]
    factors = [factor_hessian(gram, inputs.damping, order=order) for order in orders]
    rows = group_rows(gram.shape[0], group_size)
    tasks = [
        partial(_damage, weight, order, factor.upper, rows, widths, fisher)
        for weight, order, factor, fisher in zip(inputs.weights, orders, factors, fishers, strict=True)
    ]
    damages = [inputs.generalization_ratio * damage for damage in run_all(tasks, gram.device)]
    if not bool(gram.diagonal().any()):  # The input is zero on every token, and so is whatever an error makes of it.
        damages = [torch.zeros_like(damage) for damage in damages]
    for name, damage in zip(inputs.names, damages, strict=True):
        check_finite(damage, name, "predicted damages")
    return [
        LinearCurves(tensors={"damage_nats": damage, "order": order.int()}, damping=factor.damping)
        for damage, order, factor in zip(damages, orders, factors, strict=True)
    ]


def _damage(
    weight: Tensor, order: Tensor, upper: Tensor, rows: Sequence[int], widths: Sequence[int], fisher: Tensor
) -> Tensor:
    columns, shares = systematic_sample(fisher, SAMPLED_COLUMNS)
    return 0.5 * errors_by_group(weight[order[:, None], columns].float(), upper, rows, widths, shares)
