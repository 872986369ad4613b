"""What every tensor would cost in each of ggml's types: one number a type, since a type goes to a whole tensor.

Damage is that of ``bpwise.measure.curves``, as rounding with feedback will leave it.

Notes:
    ``damage[t] = 0.5 r sum_n F_n (dW_t^T H dW_t)_nn`` of a linear in type t, r being the generalization ratio
    (``heldout``), F the Fisher weights of a sample that stands for all outputs, and dW^T H dW what
    ``expected_rounding`` returns. A type t whose codes ggml searches for is measured on few outputs and set in relation
    to the coarsest other type c: ``damage[t] = damage[c] few(t) / few(c)``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ....linalg.parallel import run_all, threads_beside
from ....linalg.sampling import systematic_sample
from ....measure.curves import CurveInputs, LinearCurves
from ...numerics.tables import SAMPLED_ROWS
from .blocks import GRID_TYPES
from .kernels import TYPES, GgmlType, kernels_available
from .rounding import expected_rounding

__all__ = [
    "measure_types",
    "measured_types",
    "needs_tables",
]

_SEARCHED_ROWS = 32
"""How many of them are for types whose codes stand for several weights: ggml searches tables for these codes, which
takes several times as long as all other types together. What such a type costs relative to another is good to 2 %."""

_TINY = 1e-30
"""Keeps errors that are zero from being divided by."""

_LEFT_OUT = ("F32", "F16", "BF16", "TQ1_0", "TQ2_0")
"""Floating-point types cost nothing worth measuring; the ternary types are made for models trained on them."""


def measured_types() -> tuple[GgmlType, ...]:
    """Return the types that are measured, the largest first; none where ggml's library is not installed."""
    return tuple(kind for kind in TYPES.values() if kind.name not in _LEFT_OUT) if kernels_available() else ()


def measure_types(inputs: CurveInputs, kinds: Sequence[GgmlType]) -> list[LinearCurves]:
    """Measure the linears of an input group, to be rounded with feedback. A pure function of its arguments.

    Args:
        inputs: The linears.
        kinds: The types.

    Returns:
        For each linear ``damage_nats`` in each type, nats per token, float32, shape (types,); infinite where K is no
        whole number of the type's blocks.
    """
    gram = inputs.gram
    factor = inputs.hessian.factor(inputs.damping)
    fitting = [kind for kind in kinds if kind.fits(len(gram))]
    samples = [_Sample.of(fisher) for fisher in inputs.fishers]
    tasks = [
        partial(_errors, weight, sample.rows_for(kind), factor.upper, kind)
        for weight, sample in zip(inputs.weights, samples, strict=True)
        for kind in fitting
    ]
    found = iter(run_all(tasks, threads_beside(gram.device)))
    curves = []
    for sample in samples:
        known = sample.damages({kind: next(found) for kind in fitting})
        if not bool(gram.any()):  # The input is zero on every token, and so is whatever an error makes of it.
            known = dict.fromkeys(known, 0.0)
        damage = inputs.generalization_ratio * torch.tensor([known.get(kind, math.inf) for kind in kinds])
        curves.append(LinearCurves(tensors={"damage_nats": damage}, damping=factor.damping))
    return curves


def _errors(weight: Tensor, rows: Tensor, upper: Tensor, kind: GgmlType) -> Tensor:
    return expected_rounding(weight[:, rows.to(weight.device)].float().contiguous(), upper, kind)[0]


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """Outputs of a linear that its damage is measured on. All tensors are on the CPU.

    Attributes:
        rows: Their indices.
        shares: What each stands for, in units of the Fisher information.
        few: Those of them, as indices into ``rows``, that take part in types with searched codes.
        few_shares: What each of these stands for.
    """

    rows: Tensor
    shares: Tensor
    few: Tensor
    few_shares: Tensor

    @classmethod
    def of(cls, fisher: Tensor) -> _Sample:
        rows, shares = systematic_sample(fisher.cpu(), SAMPLED_ROWS)
        return cls(rows, shares, *systematic_sample(shares, _SEARCHED_ROWS))

    def rows_for(self, kind: GgmlType) -> Tensor:
        """Return the outputs that a type is measured on."""
        return self.rows[self.few] if needs_tables(kind) else self.rows

    def damages(self, errors: Mapping[GgmlType, Tensor]) -> dict[GgmlType, float]:
        """Return each type's damage, given its errors on the outputs that ``rows_for`` says."""
        plain = [kind for kind in errors if not needs_tables(kind)]
        known = {kind: 0.5 * float(errors[kind] @ self.shares) for kind in plain}
        scale = 0.5
        if plain:  # the few outputs are to all as they are in the coarsest of the other types
            coarsest = min(plain, key=lambda kind: kind.bits_per_weight)
            scale = known[coarsest] / max(float(errors[coarsest][self.few] @ self.few_shares), _TINY)
        searched = (kind for kind in errors if needs_tables(kind))
        return known | {kind: scale * float(errors[kind] @ self.few_shares) for kind in searched}


def needs_tables(kind: GgmlType) -> bool:
    """Return whether codes of a type stand for several weights, so that ggml searches tables for them."""
    return kind.name not in GRID_TYPES and kind.name.startswith("IQ")
