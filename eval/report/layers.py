"""What each linear of a quantized model got, and what that was expected to cost."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from ...checkpoint.files.paths import named, work_beside
from ...checkpoint.files.schemas import NonNegative, Number, check_schema, read_json
from ...checkpoint.source.checkpoint import TensorSource
from ...convert.exl2.file.reader import Exl2Model
from ...convert.gguf.file.reader import GgufModel
from ...convert.gguf.ggml.types import TYPES
from ...errors import FormatError

__all__ = ["LinearCost", "find_plan", "linear_costs"]

_REMEDY = "The plan is damaged: make it again with `bpwise plan`, or delete it."

_NUMBER = re.compile(r"[0-9]{1,9}")
_IN_BLOCK = re.compile(r"(?:[^.]+\.)+?(\d{1,9})\.(.+)", re.ASCII)


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Size and expected damage of one linear, or of the token embeddings.

    Attributes:
        name: Full name of the module.
        bpw: Bits per weight, overheads included.
        damage_nats: Damage that the plan predicted, nats per token; None if it is not known.
    """

    name: str
    bpw: float
    damage_nats: float | None = None

    @property
    def block(self) -> int | None:
        """Index of the decoder block; None outside of them."""
        match = _IN_BLOCK.fullmatch(self.name)
        return int(match[1]) if match else None

    @property
    def kind(self) -> str:
        """Last part of the name, as ``q_proj``: what blocks have in common."""
        return self.name.rpartition(".")[2]


def linear_costs(model: TensorSource, plan: Path | None = None) -> tuple[LinearCost, ...]:
    """Return what a quantized model's matrices take, from the model itself, and the damage from its plan.

    Args:
        model: EXL2 model or GGUF file; of others nothing is returned.
        plan: ``plan.json`` of the run that made it. A plan of other bits than the model has is of another model: the
            damage is then unknown.

    Raises:
        FormatError: The plan is damaged.
    """
    stored = _stored_bpw(model)
    planned = {} if plan is None else _planned(plan)
    if not all(math.isclose(stored.get(name, 0.0), bpw, rel_tol=1e-6) for name, (bpw, _) in planned.items()):
        planned = {}
    return tuple(LinearCost(name, bpw, planned[name][1] if name in planned else None) for name, bpw in stored.items())


def find_plan(model: Path) -> Path | None:
    """Return the plan in the work directory that `bpwise quantize` leaves beside a model, or a series, if any."""
    model = named(model)
    paths = [work_beside(model) / "plan.json", work_beside(model.parent) / model.name / "plan.json"]
    return next((path for path in paths if path.is_file()), None)


def _stored_bpw(model: TensorSource) -> dict[str, float]:
    if isinstance(model, Exl2Model):
        bits = {name: 8 * model.stored_bytes(name) for name in model.linears}
        bpw = {name: bits[name] / math.prod(model.shape(f"{name}.weight")) for name in bits}
        return {name: bpw.get(name, 16.0) for name in sorted([*bpw, *model.float16_linears], key=_model_order)}
    if isinstance(model, GgufModel):
        names = [name for name in model.names if name.endswith(".weight") and len(model.shape(name)) > 1]
        return {
            name.removesuffix(".weight"): model.stored(name).type.bits_per_weight
            for name in sorted(names, key=_model_order)
        }
    return {}


def _model_order(name: str) -> list[tuple[int, str]]:
    # Numbers as numbers: block 10 comes after block 9.
    return [(int(part), "") if _NUMBER.fullmatch(part) else (-1, part) for part in name.split(".")]


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
