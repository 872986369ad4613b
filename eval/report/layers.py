"""Size of each linear of a quantized model, and the damage that its plan expected of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from ...checkpoint.files.paths import named, work_beside
from ...checkpoint.source.checkpoint import TensorSource
from ...convert.model import QuantizedModel
from ...convert.plan import LinearCost
from ...convert.registry import format_naming, is_older_plan, load_plan

__all__ = ["find_plan", "linear_costs", "predicted_damage"]


def linear_costs(model: TensorSource, plan: Path | None = None) -> tuple[LinearCost, ...]:
    """Return what a quantized model's matrices take, from the model itself, and the damage from its plan.

    Args:
        model: A quantized model; of others nothing is returned.
        plan: ``plan.json`` of the run that made it. A plan of other bits than the model has is of another model, and
            what one of an earlier version says is not read: the damage is then unknown.

    Raises:
        FormatError: The plan is damaged.
    """
    stored = model.stored_bpw() if isinstance(model, QuantizedModel) else {}
    planned = (
        {}
        if plan is None or is_older_plan(plan)
        else {cost.name: (cost.bpw, cost.damage_nats) for cost in load_plan(plan).costs()}
    )
    if not all(math.isclose(stored.get(name, 0.0), bpw, rel_tol=1e-6) for name, (bpw, _) in planned.items()):
        planned = {}
    return tuple(LinearCost(name, bpw, planned[name][1] if name in planned else None) for name, bpw in stored.items())


def predicted_damage(model: TensorSource, costs: Sequence[LinearCost]) -> float | None:
    """Return the damage that a quantized model's plan predicted, in nats per token, None if that is not known.

    Args:
        model: The model.
        costs: What is known of its linears.
    """
    if isinstance(model, QuantizedModel) and model.predicted_damage_nats is not None:
        return model.predicted_damage_nats
    known = [cost.damage_nats for cost in costs if cost.damage_nats is not None]
    return sum(known) if known else None


def find_plan(model: Path) -> Path | None:
    """Return the plan in the work directory that `bpwise quantize` leaves beside a model, or a series, if any."""
    model = named(model)
    format_ = format_naming(model)
    if format_ is not None:
        model = format_.whole_path(model)
    paths = [work_beside(model) / "plan.json", work_beside(model.parent) / model.name / "plan.json"]
    return next((path for path in paths if path.is_file()), None)
