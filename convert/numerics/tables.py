"""Tables of token embeddings: what rounding them costs, whatever onto. On a sample of rows that stands for all.

Notes:
    Of token embeddings ``damage = 0.5 sum_v u_v sum_k F_k dE[v, k]^2``, u_v being the share of token v in the text.
    Where they are the head, too, feedback goes by ``M = diag F + H sum_v F_v``, what an error costs summed over rows;
    it leaves ``e_v = dE_v^T M dE_v``, of which ``a_v = sum_k F_k dE[v, k]^2`` is the embeddings' part:
    ``damage = 0.5 sum_v (r F_v (e_v - a_v) / sum F + u_v a_v)``, r being the generalization ratio of the head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...linalg.hessian import factor_hessian
from ...linalg.parallel import run_all
from ...linalg.sampling import systematic_sample
from ...measure.curves import TableInputs, TiedHead

__all__ = ["SAMPLED_ROWS", "Expected", "Rounded", "measure_embeddings", "measure_tied_table", "tied_gram"]

SAMPLED_ROWS = 128
"""Rows of a tensor, that is outputs or tokens, that its damage is measured on."""

_TINY = 1e-30
"""Keeps costs that are zero from being divided by."""

Rounded = Callable[[Tensor], Tensor]
"""Rounds rows of a table, shape (rows, K), and returns the values that a reader makes of them."""

Expected = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Estimates what rounding with feedback leaves of a weight, shape (K, out), with the factor R of M: dW^T M dW of every
output, shape (out,), and dW, shape (K, out)."""


def measure_embeddings(inputs: TableInputs, choices: Sequence[Rounded | None]) -> Tensor:
    """Measure a table of embeddings on a sample of tokens that stands for all.

    Args:
        inputs: The table.
        choices: What rounds to each choice of the format; None where it does not fit.

    Returns:
        ``0.5 sum_v u_v sum_k F_k dE[v, k]^2`` for each choice, nats per token, float32, shape (choices,); infinite
        where it does not fit.
    """
    rows, shares = systematic_sample(inputs.uses, SAMPLED_ROWS)
    sampled = inputs.embeddings(rows).float().contiguous()

    def damage(rounded: Rounded) -> float:
        return 0.5 * float((sampled - rounded(sampled)).square() @ inputs.fisher @ shares)

    return _of_fitting(choices, damage)


def tied_gram(fisher: Tensor, head: TiedHead) -> Tensor:
    """Return what errors in a row of a table cost that is embeddings and output head, summed over its rows.

    Args:
        fisher: F of the embeddings, float32, shape (K,).
        head: The head.

    Returns:
        ``diag F + H sum_v F_v``, float32, shape (K, K).
    """
    gram = head.gram * head.fisher.sum()
    gram.diagonal().add_(fisher)
    return gram


def measure_tied_table(inputs: TableInputs, head: TiedHead, gram: Tensor, choices: Sequence[Expected | None]) -> Tensor:
    """Measure a table that is embeddings and output head, to be rounded with feedback, on a sample of its rows.

    Args:
        inputs: The table.
        head: The head.
        gram: ``tied_gram``, M.
        choices: What estimates each choice of the format; None where it does not fit.

    Returns:
        The damage of both uses for each choice, nats per token, float32, shape (choices,); infinite where it does not
        fit.
    """
    upper = factor_hessian(gram, head.damping).upper
    total = head.fisher.sum().clamp(min=_TINY)
    seen = head.generalization_ratio * head.fisher / total
    costs = seen * (gram.trace() - inputs.fisher.sum()) + inputs.uses * inputs.fisher.sum()
    rows, shares = systematic_sample(costs, SAMPLED_ROWS)
    shares = shares / costs[rows].clamp(min=_TINY)  # how many rows each of them stands for
    weight = inputs.embeddings(rows).float().T.contiguous()

    def damage(expected: Expected) -> float:
        errors, missed = expected(weight, upper)
        embedded = inputs.fisher @ missed.square()
        return 0.5 * float((seen[rows] * (errors - embedded).clamp(min=0) + inputs.uses[rows] * embedded) @ shares)

    return _of_fitting(choices, damage)


def _of_fitting(choices: Sequence[Any], damage: Callable[[Any], float]) -> Tensor:
    tasks = [(lambda: math.inf) if choice is None else partial(damage, choice) for choice in choices]
    return torch.tensor(run_all(tasks, torch.device("cpu")))
