"""What every tensor would cost in each of ggml's types: one number a type, since a type goes to a whole tensor.

Damage is that of the error curves (``curves``), from the same statistics, with the feedback that rounding will have.
The output head and the embeddings are rounded without feedback where they are one table: its two uses ask for
different feedback.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from ..convert.gguf.ggml import TYPES, GgmlType, decode, encode, kernels_available
from ..rounding.ggml import errors_on_types, rounded_together
from ..rounding.hessian import inverse_factor
from ..rounding.parallel import run_all
from .sampling import systematic_sample

__all__ = ["SAMPLED_ROWS", "measure_plain_types", "measure_types", "measured_types"]

SAMPLED_ROWS = 256
"""Rows of a tensor, that is outputs or tokens, that its damage is measured on."""

_LEFT_OUT = ("F32", "F16", "BF16", "TQ1_0", "TQ2_0")
"""Floating-point types cost nothing worth measuring; the ternary types are made for models trained on them."""


def measured_types() -> tuple[GgmlType, ...]:
    """Return the types that are measured, the largest first; none where ggml's library is not installed."""
    return tuple(kind for kind in TYPES.values() if kind.name not in _LEFT_OUT) if kernels_available() else ()


def measure_types(
    weights: Sequence[Tensor],
    gram: Tensor,
    fishers: Sequence[Tensor],
    kinds: Sequence[GgmlType],
    *,
    damping: float,
    inflation: float = 1.0,
) -> list[Tensor]:
    """Measure the linears that share one input, rounded with feedback. A pure function of its arguments.

    Args:
        weights: Each linear's weight, float32, shape (K, out): the transpose of a Hugging Face weight.
        gram: H, weighted mean of x x^T over tokens, float32, shape (K, K).
        fishers: Fisher weights of each linear's outputs, float32, shape (out,).
        kinds: The types.
        damping: First damping to try, relative to the mean of H's diagonal.
        inflation: Damage on other tokens than those of H, relative to that on H (see ``heldout``).

    Returns:
        Damage of each linear in each type, nats per token, float32, shape (types,); infinite where K is no whole number
        of the type's blocks.
    """
    upper = inverse_factor(gram, damping).upper
    fitting = [kind for kind in kinds if kind.fits(len(gram))]
    groups = rounded_together(fitting)
    tasks = [
        partial(_damages_with_feedback, weight, upper, fisher, group)
        for weight, fisher in zip(weights, fishers, strict=True)
        for group in groups
    ]
    found = iter(run_all(tasks, gram.device))
    damages = []
    for _ in weights:
        known = {kind: damage for group in groups for kind, damage in zip(group, next(found), strict=True)}
        damage = torch.tensor([known.get(kind, math.inf) for kind in kinds])
        # Where the input is zero on every token, so is whatever an error makes of it.
        damages.append(inflation * damage if bool(gram.any()) else torch.zeros_like(damage))
    return damages


def measure_plain_types(
    weight: Tensor, gram: Tensor, row_weights: Tensor, kinds: Sequence[GgmlType], *, inflation: float = 1.0
) -> Tensor:
    """Measure one tensor rounded without feedback.

    Args:
        weight: The transpose of the tensor as it is stored, float32, shape (K, rows): outputs of a linear, or the
            embeddings of some tokens.
        gram: What an error in a row costs, float32, shape (K, K): H as above, or the diagonal Fisher of an embedding.
        row_weights: Fisher weight of each output, or share of each token among all tokens, float32, shape (rows,).
        kinds: As above.
        inflation: As above.

    Returns:
        ``0.5 * sum_r row_weights_r (dW^T gram dW)_rr`` in each type, nats per token, float32, shape (types,), infinite
        as above.
    """
    importance = gram.diagonal().cpu()
    rows, shares = systematic_sample(row_weights, SAMPLED_ROWS)
    sampled = weight[:, rows].contiguous()

    def damage(kind: GgmlType) -> float:
        if not kind.fits(len(weight)):
            return math.inf
        decoded = decode(encode(sampled.T.contiguous().cpu(), kind, importance), kind)
        error = sampled - decoded.T.to(sampled.device)
        return 0.5 * float(((gram @ error) * error).sum(dim=0) @ shares)

    return inflation * torch.tensor(run_all([partial(damage, kind) for kind in kinds], gram.device))


def _damages_with_feedback(weight: Tensor, upper: Tensor, fisher: Tensor, group: Sequence[GgmlType]) -> list[float]:
    rows, shares = systematic_sample(fisher, SAMPLED_ROWS)
    damages: list[float] = (0.5 * errors_on_types(weight[:, rows].contiguous(), upper, group) @ shares).tolist()
    return damages
