"""What another number of threads changes: sums are added in another order, so numbers differ in their last bits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from bpwise.convert.exl2.plan.plan import Exl2Plan
from bpwise.convert.gguf.plan.plan import GgufPlan
from bpwise.convert.plan import Plan
from bpwise.convert.registry import format_named
from bpwise.measure.measurement import Measurement
from bpwise.quantize.planning.plans import plan_points
from numpy.typing import NDArray
from safetensors.numpy import load_file


@dataclass(frozen=True)
class Differences:
    """How two measurements of one model differ.

    Attributes:
        changed_bytes: Of all numbers.
        all_bytes: Of all numbers.
        integers: Whole numbers that differ: places in orders of rows.
        damage: Largest difference of a damage, relative to itself.
        others: Largest difference of any other number, relative to the largest of its tensor. Directions in which
            outputs act together have no sign.
    """

    changed_bytes: int
    all_bytes: int
    integers: int
    damage: float
    others: float


def differences(first: Path, second: Path) -> Differences:
    """Compare two measurement files."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    pairs = {name: (one[name], other[name]) for name in one}
    damages = [pair for name, pair in pairs.items() if name.endswith("damage_nats")]
    rest = [_alike(name, a, b) for name, (a, b) in pairs.items() if not name.endswith("damage_nats")]
    return Differences(
        changed_bytes=sum(int((_bytes(a) != _bytes(b)).sum()) for a, b in pairs.values()),
        all_bytes=sum(a.nbytes for a in one.values()),
        integers=sum(int((a != b).sum()) for a, b in rest if a.dtype.kind != "f"),
        damage=max(_largest(a, b, np.abs(a.astype(float))) for a, b in damages),
        others=max(_largest(a, b, np.abs(a.astype(float)).max(initial=0)) for a, b in rest if a.dtype.kind == "f"),
    )


def _alike(name: str, one: NDArray[Any], other: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    if not name.endswith(".coupling"):
        return one, other
    turned = (one.astype(float) * other).sum(axis=0) < 0
    return one, np.where(turned, -other, other)


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    return np.frombuffer(values.tobytes(), dtype=np.uint8)


def _largest(one: NDArray[Any], other: NDArray[Any], relative_to: Any) -> float:
    one, other = one.astype(float), other.astype(float)
    equal = one == other  # infinities too
    gaps = np.abs(np.where(equal, 0, one) - np.where(equal, 0, other))
    return float((gaps / np.where(gaps > 0, relative_to, 1)).max(initial=0))


def decisions(plan: Plan) -> dict[str, Any]:
    """Return what a plan gives every linear or tensor, without the damages that it predicts."""
    if isinstance(plan, Exl2Plan):
        heads = (plan.head,) if plan.head else ()
        return {f"{x.name}[{g}]": bits for x in (*plan.linears, *heads) for g, bits in enumerate(x.group_bits)}
    assert isinstance(plan, GgufPlan), "a format of which it is known what its plans decide"
    return {x.name: x.type for x in plan.tensors}


@dataclass(frozen=True)
class PlanDifferences:
    """How the plans that two measurements lead to differ, over all sizes in steps of a quarter bit.

    Attributes:
        plans: How many differ.
        all_plans: How many there are.
        decisions: What is decided otherwise: widths of groups, types of tensors.
        all_decisions: What is decided.
    """

    plans: int
    all_plans: int
    decisions: int
    all_decisions: int


def plan_differences(first: Path, second: Path, format_: str) -> PlanDifferences:
    """Compare the plans of a format."""
    own = format_named(format_)
    pairs = [
        (decisions(one.plan), decisions(other.plan))
        for one, other in zip(
            *(plan_points(own, Measurement.load(path), own.Options()) for path in (first, second)), strict=True
        )
    ]
    return PlanDifferences(
        plans=sum(a != b for a, b in pairs),
        all_plans=len(pairs),
        decisions=sum(sum(a[key] != b[key] for key in a) for a, b in pairs),
        all_decisions=sum(len(a) for a, _ in pairs),
    )
