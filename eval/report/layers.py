"""Size of each linear of a quantized model, and the damage that its plan expected of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...checkpoint.files.paths import named, work_beside
from ...checkpoint.files.schemas import NonNegative, Number, check_schema, read_json
from ...checkpoint.source.checkpoint import TensorSource
from ...convert.format import LinearCost, QuantizedModel
from ...convert.gguf.ggml.types import TYPES
from ...errors import FormatError

__all__ = ["find_plan", "linear_costs"]

_REMEDY = "The plan is damaged: make it again with `bpwise plan`, or delete it."


def linear_costs(model: TensorSource, plan: Path | None = None) -> tuple[LinearCost, ...]:
    """Return what a quantized model's matrices take, from the model itself, and the damage from its plan.

    Args:
        model: A quantized model; of others nothing is returned.
        plan: ``plan.json`` of the run that made it. A plan of other bits than the model has is of another model: the
            damage is then unknown.

    Raises:
        FormatError: The plan is damaged.
    """
    stored = model.stored_bpw() if isinstance(model, QuantizedModel) else {}
    planned = {} if plan is None else _planned(plan)
    if not all(math.isclose(stored.get(name, 0.0), bpw, rel_tol=1e-6) for name, (bpw, _) in planned.items()):
        planned = {}
    return tuple(LinearCost(name, bpw, planned[name][1] if name in planned else None) for name, bpw in stored.items())


def find_plan(model: Path) -> Path | None:
    """Return the plan in the work directory that `bpwise quantize` leaves beside a model, or a series, if any."""
    model = named(model)
    paths = [work_beside(model) / "plan.json", work_beside(model.parent) / model.name / "plan.json"]
    return next((path for path in paths if path.is_file()), None)


@dataclass(frozen=True, slots=True)
class _PlannedLinear:
    """What is read of a linear in a plan for EXL2."""

    name: str
    bpw: NonNegative
    damage_nats: NonNegative


@dataclass(frozen=True, slots=True)
class _Named:
    """What is read of a linear in float16."""

    name: str


@dataclass(frozen=True, slots=True)
class _Plan:
    """What is read of a plan for EXL2."""

    linears: tuple[_PlannedLinear, ...]
    head: _PlannedLinear | None
    kept: tuple[_Named, ...] = ()


@dataclass(frozen=True, slots=True)
class _PlannedTensor:
    """What is read of a tensor in a plan for GGUF."""

    name: str
    type: str
    damage_nats: Number

    def __post_init__(self) -> None:
        """Check the type.

        Raises:
            ValueError: There is no such type.
        """
        if self.type not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}")


@dataclass(frozen=True, slots=True)
class _TypePlan:
    """What is read of a plan for GGUF."""

    tensors: tuple[_PlannedTensor, ...]


def _planned(path: Path) -> dict[str, tuple[float, float]]:
    raw = read_json(path, FormatError)
    check = partial(check_schema, raw, error=FormatError, where=str(path), remedy=_REMEDY)
    if "bpwise_type_plan" in raw:
        tensors = check(_TypePlan).tensors
        return {each.name: (TYPES[each.type].bits_per_weight, each.damage_nats) for each in tensors}
    plan = check(_Plan)
    planned = {each.name: (each.bpw, each.damage_nats) for each in (*plan.linears, *([plan.head] if plan.head else []))}
    return planned | {each.name: (16.0, 0.0) for each in plan.kept}
