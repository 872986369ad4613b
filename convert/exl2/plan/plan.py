"""The plan of an EXL2 model: how many bits every row group of every linear gets."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import NonNegative, Number, Positive, check_schema, checksummed
from ....errors import FormatError
from ....tables import Table
from ...model import Description
from ...plan import LinearCost, Plan
from ..file.describe import width_shares
from ..file.layout import WIDTHS, RowGroup, linear_bits
from .problem import AUTO, HEAD_BITS, HeadBits
from .unquantized import FLOAT16_BITS, UnquantizedLinear, unquantized_lines

__all__ = ["PLAN_VERSION", "Exl2Plan", "LinearPlan"]

PLAN_VERSION = 3

_REMEDY = "The plan is damaged: make it again with `bpwise plan`."


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


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Exl2Plan(Plan):
    """Bits of a whole model.

    Attributes:
        linears: Quantized decoder linears in model order.
        head: The head's plan, or None if it stays at 16 bits.
        target_bpw: What was asked of the decoder, or with ``AUTO`` of decoder and head together; where a size was
            asked, what it leaves them.
        head_bits: What was asked of the head: one of ``HEAD_BITS``, or ``AUTO``.
        lower_bound_nats: No allocation within the budgets has a smaller predicted damage.
        measurement: Fingerprint of the measurement behind the plan.
        unquantized: Decoder linears that stay in float16, in model order.
        head_reason: Why the head stays at 16 bits though others were asked; else None.
        other_bytes: Size of all that is not planned, in bytes, as far as a measurement tells.
    """

    format: ClassVar[str] = "exl2"
    linears: tuple[LinearPlan, ...]
    head: LinearPlan | None
    target_bpw: Number
    head_bits: HeadBits
    lower_bound_nats: Number
    measurement: str
    unquantized: tuple[UnquantizedLinear, ...] = ()
    head_reason: str | None = None
    other_bytes: int = 0

    def __post_init__(self) -> None:
        """Check that it is a plan of something.

        Raises:
            ValueError: There are no linears, or no such bits of a head.
        """
        if not (self.linears or self.unquantized):
            raise ValueError("linears and unquantized are both empty")
        if self.head_bits not in (*HEAD_BITS, AUTO):
            raise ValueError(f"head_bits must be one of {HEAD_BITS} or {AUTO!r}")

    @property
    def decoder_bits(self) -> int:
        """Stored size of the decoder's linears in bits, those in float16 included."""
        return sum(p.stored_bits for p in self.linears) + sum(p.stored_bits for p in self.unquantized)

    @property
    def bpw(self) -> float:
        """Decoder bits per weight: all ``q_*`` bits, and 16 for each weight in float16, over the decoder's weights."""
        weights = sum(p.weights for p in self.linears) + sum(p.weights for p in self.unquantized)
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

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors together, in bytes; metadata and tokenizer excluded."""
        return self.decoder_bits // 8 + (self.head.stored_bits // 8 if self.head else 0) + self.other_bytes

    def shares(self) -> dict[str, float]:
        """Return the share of the decoder's weights at each width, widest first; 16 bits are those in float16."""
        counts: Counter[int] = Counter(
            {FLOAT16_BITS: sum(p.weights for p in self.unquantized)} if self.unquantized else {}
        )
        for linear in self.linears:
            for bits, rows in zip(linear.group_bits, linear.group_rows, strict=True):
                counts[bits] += rows * linear.out_features
        total = sum(counts.values())
        return {f"{bits} bits": counts[bits] / total for bits in sorted(counts, reverse=True)}

    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every linear gets and is expected to cost: those in float16 nothing, a head only if quantized."""
        costs = [LinearCost(linear.name, linear.bpw, linear.damage_nats) for linear in self.linears]
        costs += [LinearCost(linear.name, float(FLOAT16_BITS), 0.0) for linear in self.unquantized]
        costs.sort(key=lambda cost: -1 if cost.block is None else cost.block)
        return (*costs, *([LinearCost(self.head.name, self.head.bpw, self.head.damage_nats)] if self.head else []))

    def identity(self) -> Any:
        """Return the measurement behind the plan, and all widths."""
        linears = (*self.linears, *([self.head] if self.head else []))
        groups = [[each.name, each.group_bits, each.group_rows] for each in linears]
        return [self.measurement, self.target_bpw, self.head_bits, groups]

    def describe(self) -> Description:
        """Return what is in the plan."""

        def row(linear: LinearPlan) -> tuple[str, ...]:
            size = f"{linear.in_features} x {linear.out_features}"
            shares = width_shares(linear.group_bits, linear.group_rows)
            return (linear.name, size, f"{linear.bpw:.3f}", f"{linear.damage_nats:.2e}", shares)

        return Description(
            kind="EXL2 plan",
            facts=(
                f"decoder {self.bpw:.4f} bits per weight, head {self.head.bpw if self.head else 16:.4f} "
                f"(asked {self.target_bpw:g}, head {self.head_bits})",
                f"predicted damage {self.damage_nats:.6f} nats/token, of it {self.decoder_damage_nats:.6f} in the "
                f"decoder (no plan of this size can go below {self.lower_bound_nats:.6f})",
                *(f"in float16: {line}" for line in unquantized_lines(self.unquantized, self.head_reason)),
                "decoder weights: " + ", ".join(f"{name} {100 * x:.1f} %" for name, x in self.shares().items()),
            ),
            table=Table(
                ("linear", "in x out", "bpw", "damage, nats/token", "share of rows at each width"),
                (
                    *(row(each) for each in (*self.linears, *([self.head] if self.head else []))),
                    *(
                        (x.name, f"{x.in_features} x {x.out_features}", "16.000", "", "float16")
                        for x in self.unquantized
                    ),
                ),
            ),
            content=self.content(),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        write_json(
            Path(path),
            checksummed(
                {
                    "bpwise_plan": PLAN_VERSION,
                    "format": "exl2",
                    "target_bpw": self.target_bpw,
                    "bpw": self.bpw,
                    "head_bits": self.head_bits,
                    "predicted_damage_nats": self.damage_nats,
                    "lower_bound_nats": self.lower_bound_nats,
                    "measurement": self.measurement,
                    "linears": [_to_dict(p) for p in self.linears],
                    "head": _to_dict(self.head) if self.head else None,
                    "unquantized": [asdict(linear) for linear in self.unquantized],
                    "head_reason": self.head_reason,
                    "other_bytes": self.other_bytes,
                }
            ),
        )

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> Exl2Plan:
        """Return the plan that a file holds; see ``Format.load_plan``.

        Raises:
            FormatError: It is not a plan of this version.
        """
        if raw.get("bpwise_plan") != PLAN_VERSION:
            raise FormatError(f"{where}: not a plan of version {PLAN_VERSION}. Make it again with `bpwise plan`.")
        return check_schema(raw, cls, FormatError, where=where, remedy=_REMEDY)


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
