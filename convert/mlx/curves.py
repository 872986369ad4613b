"""Measuring MLX's curves: the damage of every linear, and of the token embeddings, in every scheme.

Notes:
    ``damage[s] = 0.5 r sum_n F_n (dW_s^T H dW_s)_nn`` of a linear in scheme s, r being the generalization ratio
    (``heldout``), F the Fisher weights of a sample that stands for all outputs, and dW^T H dW what
    ``expected_rounding`` returns.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.carry.carried import require_float16_weights
from ...linalg.parallel import run_all
from ...linalg.sampling import systematic_sample
from ...measure.curves import CurveInputs, CurveMaker, LinearCurves, TableInputs
from ..numerics.tables import SAMPLED_ROWS, measure_embeddings, measure_tied_table, tied_gram
from .file.layout import Layout
from .grid.rounding import expected_rounding, round_plainly
from .grid.schemes import SCHEMES, Scheme
from .plan.measured import CURVES_VERSION, NAME

__all__ = ["MlxCurves"]

_DTYPE = torch.bfloat16
"""Of scales and biases in trials: that of nearly all models, and the coarser of the usual two."""


class MlxCurves(CurveMaker):
    """See ``CurveMaker``.

    Attributes:
        layout: The model as mlx-lm has it.
    """

    name = NAME
    version = CURVES_VERSION

    def __init__(self, layout: Layout) -> None:
        """Choose what is measured.

        Args:
            layout: The model as mlx-lm has it.
        """
        self.layout = layout

    @property
    def header(self) -> dict[str, Any]:
        """See ``CurveMaker``."""
        return {"schemes": [scheme.name for scheme in SCHEMES], "model": self.layout.to_json()}

    def linears(self, inputs: CurveInputs) -> list[LinearCurves]:
        """See ``CurveMaker``: ``damage_nats``, shape (schemes,); infinite where a scheme does not fit.

        Raises:
            NumericalError: A weight is beyond float16's range.
        """
        require_float16_weights(dict(zip(inputs.names, inputs.weights, strict=True)))
        gram = inputs.gram
        factor = inputs.hessian.factor(inputs.damping)
        dead = not bool(gram.diagonal().any())  # The input is zero on every token, and so is what an error makes of it.
        tasks = [
            partial(_damage, weight, fisher, factor.upper, scheme)
            for weight, fisher in zip(inputs.weights, inputs.fishers, strict=True)
            for scheme in SCHEMES
        ]
        found = torch.tensor(run_all(tasks, gram.device)).view(len(inputs.weights), len(SCHEMES))
        damages = torch.where(found.isfinite() & torch.tensor(dead), 0.0, inputs.generalization_ratio * found)
        return [LinearCurves(tensors={"damage_nats": damage}, damping=factor.damping) for damage in damages.unbind()]

    def table(self, inputs: TableInputs) -> dict[str, Tensor]:
        """See ``CurveMaker``: ``damage_nats`` of the table, shape (schemes,), in both uses if it is the head, too.

        Of a table that is both, ``gram`` is what an error in a row costs on average, float32, shape (K, K).
        """
        fitting = [scheme if scheme.fits(len(inputs.fisher)) else None for scheme in SCHEMES]
        if inputs.head is None:
            rounded = [None if x is None else partial(_plainly, x, inputs.fisher) for x in fitting]
            return {"damage_nats": measure_embeddings(inputs, rounded)}
        gram = tied_gram(inputs.fisher, inputs.head)
        expected = [None if x is None else partial(expected_rounding, scheme=x, dtype=_DTYPE) for x in fitting]
        return {"damage_nats": measure_tied_table(inputs, inputs.head, gram, expected), "gram": gram}


def _damage(weight: Tensor, fisher: Tensor, upper: Tensor, scheme: Scheme) -> float:
    if not scheme.fits(len(upper)):
        return math.inf
    columns, shares = systematic_sample(fisher, SAMPLED_ROWS)
    errors, _ = expected_rounding(weight[:, columns].float().contiguous(), upper, scheme, _DTYPE)
    return 0.5 * float(errors @ shares)


def _plainly(scheme: Scheme, costs: Tensor, rows: Tensor) -> Tensor:
    return round_plainly(rows.T.contiguous(), costs, scheme, _DTYPE).decoded().T
