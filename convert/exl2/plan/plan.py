"""The plan: how many bits every row group of every linear gets. Made from a measurement alone, in a second."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import NonNegative, Number, Positive, check_schema, read_json
from ....errors import FormatError
from ....linalg.allocate import allocate
from ....measure.measurement import MeasuredLinear, Measurement
from ..curves import Exl2Measured, exl2_curves
from ..file.layout import WIDTHS, RowGroup, group_rows, linear_bits, padded_columns
from .problem import AUTO, HEAD_BITS, AllocationProblem, HeadBits, SizeLimit, WidthOverride, allocation_problem
from .unquantized import FLOAT16_BITS, UnquantizedLinear

__all__ = ["PLAN_VERSION", "REMEDY", "LinearPlan", "Plan", "bpw_range", "is_plan", "make_plan", "measured_limit"]

PLAN_VERSION = 2

REMEDY = "The plan is damaged: make it again with `bpwise plan`."
"""What to do about a plan that cannot be read."""

_FLOAT16_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearPlan:
    """Bits of one linear.

    Attributes:
        name: Full name.
        in_features: K.
        out_features: Outputs, padding excluded.
        group_rows: Rows of each group, in the measured row order.
        group_bits: Width of each group, in the same order.
        damage_nats: Predicted damage, nats per token.
    """

    name: str
    in_features: Positive
    out_features: Positive
    group_rows: tuple[Positive, ...]
    group_bits: tuple[int, ...]
    damage_nats: NonNegative

    def __post_init__(self) -> None:
        """Check the groups.

        Raises:
            ValueError: They are not the linear's, or have widths that EXL2 has not.
        """
        if len(self.group_rows) != len(self.group_bits) or sum(self.group_rows) != self.in_features:
            raise ValueError("group_rows must add up to in_features, with an entry in group_bits for each")
        if not set(self.group_bits) <= set(WIDTHS):
            raise ValueError(f"group_bits must be among {WIDTHS}")

    @property
    def stored_order(self) -> tuple[int, ...]:
        """Indices of the groups in the order in which EXL2 stores them: widths never increasing, else as measured."""
        return tuple(sorted(range(len(self.group_bits)), key=lambda g: -self.group_bits[g]))

    @property
    def stored_groups(self) -> tuple[RowGroup, ...]:
        """The groups as EXL2 stores them."""
        return tuple(RowGroup(self.group_bits[g], self.group_rows[g]) for g in self.stored_order)

    @property
    def stored_bits(self) -> int:
        """Stored size in bits, overheads and padding included."""
        return linear_bits(self.out_features, self.stored_groups)

    @property
    def weights(self) -> int:
        """Number of weights, padding excluded."""
        return self.in_features * self.out_features

    @property
    def bpw(self) -> float:
        """Bits per weight, overheads included."""
        return self.stored_bits / self.weights


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Bits of a whole model.

    Attributes:
        linears: Quantized decoder linears in model order.
        head: The head's plan, or None if it stays at 16 bits.
        target_bpw: What was asked of the decoder, or with ``AUTO`` of decoder and head together; where a size was
            asked, what it leaves them.
        head_bits: What was asked of the head: one of ``HEAD_BITS``, or ``AUTO``.
        lower_bound_nats: No allocation within the budgets has a smaller predicted damage.
        measurement: Fingerprint of the measurement behind the plan.
        kept: Decoder linears that stay in float16, in model order.
        head_reason: Why the head stays at 16 bits though others were asked; else None.
    """

    linears: tuple[LinearPlan, ...]
    head: LinearPlan | None
    target_bpw: Number
    head_bits: HeadBits
    lower_bound_nats: Number
    measurement: str
    kept: tuple[UnquantizedLinear, ...] = ()
    head_reason: str | None = None

    def __post_init__(self) -> None:
        """Check that it is a plan of something.

        Raises:
            ValueError: There are no linears, or no such bits of a head.
        """
        if not (self.linears or self.kept):
            raise ValueError("linears and kept are both empty")
        if self.head_bits not in (*HEAD_BITS, AUTO):
            raise ValueError(f"head_bits must be one of {HEAD_BITS} or {AUTO!r}")

    @property
    def decoder_bits(self) -> int:
        """Stored size of the decoder's linears in bits, those in float16 included."""
        return sum(p.stored_bits for p in self.linears) + sum(p.stored_bits for p in self.kept)

    @property
    def bpw(self) -> float:
        """Decoder bits per weight: all ``q_*`` bits, and 16 for each weight in float16, over the decoder's weights."""
        weights = sum(p.weights for p in self.linears) + sum(p.weights for p in self.kept)
        return self.decoder_bits / weights

    @property
    def decoder_damage_nats(self) -> float:
        """Predicted damage of the decoder, nats per token."""
        return sum(p.damage_nats for p in self.linears)

    @property
    def damage_nats(self) -> float:
        """Predicted damage of the whole model, nats per token."""
        return self.decoder_damage_nats + (self.head.damage_nats if self.head else 0.0)

    @property
    def gap(self) -> float:
        """How far the predicted damage may be above the best possible, as a fraction of it."""
        return self.damage_nats / self.lower_bound_nats - 1 if self.lower_bound_nats > 0 else 0.0

    @property
    def head_code_bits(self) -> int:
        """Width of the head's codes as front ends show it: the mean over its weights, rounded; 16 if unquantized."""
        if self.head is None:
            return 16
        rows = self.head.group_rows
        code_bits = sum(bits * count for bits, count in zip(self.head.group_bits, rows, strict=True))
        return round(code_bits / sum(rows))

    def weights_per_width(self) -> dict[int, float]:
        """Return the share of the decoder's weights at each width, widest first; 16 bits are those in float16."""
        counts: Counter[int] = Counter({FLOAT16_BITS: sum(p.weights for p in self.kept)} if self.kept else {})
        for linear in self.linears:
            for bits, rows in zip(linear.group_bits, linear.group_rows, strict=True):
                counts[bits] += rows * linear.out_features
        total = sum(counts.values())
        return {bits: counts[bits] / total for bits in sorted(counts, reverse=True)}

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        entries = [_to_dict(p) for p in self.linears]
        write_json(
            path,
            {
                "bpwise_plan": PLAN_VERSION,
                "target_bpw": self.target_bpw,
                "bpw": self.bpw,
                "head_bits": self.head_bits,
                "predicted_damage_nats": self.damage_nats,
                "lower_bound_nats": self.lower_bound_nats,
                "measurement": self.measurement,
                "linears": entries,
                "head": _to_dict(self.head) if self.head else None,
                "kept": [asdict(linear) for linear in self.kept],
                "head_reason": self.head_reason,
            },
        )

    @classmethod
    def load(cls, path: Path) -> Plan:
        """Read a plan.

        Raises:
            FormatError: It is not a plan of this version.
        """
        raw = read_json(path, FormatError)
        if raw.get("bpwise_plan") != PLAN_VERSION:
            raise FormatError(f"{path}: not a plan of version {PLAN_VERSION}. Make it again with `bpwise plan`.")
        return check_schema(raw, cls, FormatError, where=str(path), remedy=REMEDY)


def is_plan(path: Path) -> bool:
    """Return whether a file is a plan, of either format and any version."""
    try:
        return not {"bpwise_plan", "bpwise_type_plan"}.isdisjoint(read_json(path, FormatError))
    except FormatError:
        return False


def make_plan(
    measurement: Measurement,
    *,
    bpw: float | None = None,
    size: SizeLimit | None = None,
    head_bits: HeadBits,
    overrides: Sequence[WidthOverride] = (),
    keep_fp16: Sequence[str] = (),
) -> Plan:
    """Allocate bits to every row group of the decoder and of the head.

    Args:
        measurement: The measured curves.
        bpw: Decoder bits per weight, overheads included, and 16 for each weight in float16; met from below, never
            exceeded. With ``AUTO`` those of decoder and head together.
        size: The same as a size of the whole model; one of the two is given.
        head_bits: Bits of the output head: 2, 3, 4, 5, 6 or 8, as large as if all its codes had that width, though its
            groups may have others; 16 for unquantized; ``AUTO`` to let it share the decoder's budget.
        overrides: Widths that linears may have; of several that match, the last. Those of the head go before
            ``head_bits``.
        keep_fp16: Shell patterns of linears that stay in float16: whole attention blocks, whole MLPs, or the head. What
            EXL2 cannot hold stays so anyway.

    Returns:
        The plan of least predicted damage.

    Raises:
        ConfigError: As ``allocation_problem``, or EXL2 was not measured.
        FormatError: EXL2's curves are damaged.
        BudgetError: No plan has this size; the message gives the range that there is.
    """
    assert (bpw is None) != (size is None), "one target"
    measured = {linear.name: linear for linear in (*measurement.linears, measurement.head)}
    curves = exl2_curves(measurement)
    scope = _scope(measurement, curves, head_bits, overrides, keep_fp16)
    budget = scope.budget_bits(bpw) if bpw is not None else 0
    if size is not None:
        budget = scope.budget_bits_within(size)
        bpw = math.floor(budget / scope.weights * 1e4) / 1e4
    assert bpw is not None
    names = [linear.name for linear in (*scope.quantized, *([scope.head] if scope.head and scope.shares else []))]
    plans, lower_bound = _allocated([measured[name] for name in names], curves, scope, budget - scope.kept_bits)
    if scope.head is not None and not scope.shares:
        head_plans, head_bound = _allocated([measurement.head], curves, scope, scope.head_alone_bits)
        plans, lower_bound = [*plans, *head_plans], lower_bound + head_bound
    count = len(scope.quantized)
    return Plan(
        linears=tuple(plans[:count]),
        head=plans[count] if len(plans) > count else None,
        target_bpw=bpw,
        head_bits=head_bits,
        lower_bound_nats=lower_bound,
        measurement=measurement.fingerprint,
        kept=scope.kept,
        head_reason=scope.head_reason,
    )


def _allocated(
    linears: Sequence[MeasuredLinear], curves: Exl2Measured, scope: AllocationProblem, budget_bits: int
) -> tuple[list[LinearPlan], float]:
    # The linears' plans within a common budget, overheads included, and a lower bound of their damage.
    rows = [group_rows(linear.in_features, curves.group_size) for linear in linears]
    overhead = sum(
        linear_bits(linear.out_features, [RowGroup(0, n) for n in counts])
        for linear, counts in zip(linears, rows, strict=True)
    )
    columns = np.concatenate(
        [
            np.asarray(counts, dtype=np.int64) * padded_columns(linear.out_features)
            for linear, counts in zip(linears, rows, strict=True)
        ]
    )
    damages = [curves.damage_nats(linear.name) for linear in linears]
    allowed = [np.isin(curves.widths, scope.widths[linear.name]) for linear in linears]
    solved = allocate(
        np.concatenate([np.where(a, x, np.inf) for x, a in zip(damages, allowed, strict=True)]).astype(np.float64),
        columns[:, None] * np.asarray(curves.widths, dtype=np.int64),
        budget_bits - overhead,
    )
    plans = []
    first = 0
    for linear, damage, counts in zip(linears, damages, rows, strict=True):
        plans.append(_linear_plan(linear, damage, counts, solved.choice[first : first + len(counts)], curves.widths))
        first += len(counts)
    return plans, solved.lower_bound


def bpw_range(
    measurement: Measurement,
    head_bits: HeadBits = FLOAT16_BITS,
    overrides: Sequence[WidthOverride] = (),
    keep_fp16: Sequence[str] = (),
) -> tuple[float, float]:
    """Return the smallest and the largest bits per weight that a plan from a measurement can have.

    Args:
        measurement: The measurement.
        head_bits: With ``AUTO`` the head counts too, otherwise only the decoder.
        overrides: As in ``make_plan``.
        keep_fp16: As in ``make_plan``.
    """
    return _scope(measurement, exl2_curves(measurement), head_bits, overrides, keep_fp16).bpw_range


def measured_limit(measurement: Measurement, max_bytes: int) -> SizeLimit:
    """Return the limit of all tensors, without their files' headers, as far as a measurement tells.

    Args:
        measurement: Says how many weights there are beside the linears; they are counted at 2 bytes, though those of a
            float32 checkpoint are carried over in float32.
        max_bytes: Largest size.
    """
    table, head = measurement.embedding, measurement.head
    return SizeLimit(
        total_bytes=max_bytes,
        other_bytes=_FLOAT16_BYTES * (table.tokens * table.hidden_size + measurement.other_weights),
        float16_head_bytes=0 if table.tied else _FLOAT16_BYTES * head.in_features * head.out_features,
    )


def _scope(
    measurement: Measurement,
    curves: Exl2Measured,
    head_bits: HeadBits,
    overrides: Sequence[WidthOverride],
    keep_fp16: Sequence[str],
) -> AllocationProblem:
    return allocation_problem(
        measurement.linears,
        measurement.head,
        group_size=curves.group_size,
        head_bits=head_bits,
        overrides=overrides,
        keep_fp16=keep_fp16,
    )


def _linear_plan(
    linear: MeasuredLinear,
    damage_nats: NDArray[np.float32],
    rows: list[int],
    choice: NDArray[Any],
    widths: tuple[int, ...],
) -> LinearPlan:
    return LinearPlan(
        name=linear.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        group_rows=tuple(rows),
        group_bits=tuple(widths[option] for option in choice),
        damage_nats=float(damage_nats[np.arange(len(choice)), choice].sum(dtype=np.float64)),
    )


def _to_dict(plan: LinearPlan) -> dict[str, Any]:
    return {
        "name": plan.name,
        "in_features": plan.in_features,
        "out_features": plan.out_features,
        "bpw": plan.bpw,
        "damage_nats": plan.damage_nats,
        "group_rows": list(plan.group_rows),
        "group_bits": list(plan.group_bits),
    }
