"""What a plan decides on: the linears that are quantized, the widths that each may have, and its budget of bits."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ....checkpoint.source.linears import Shaped, matching
from ....errors import BudgetError, ConfigError
from ...plan import round_up, shown_range
from ..file.layout import WIDTHS, RowGroup, group_rows, linear_bits
from .unquantized import ASKED, FLOAT16_BITS, UnquantizedLinear, unquantized_reasons

__all__ = [
    "AUTO",
    "HEAD_BITS",
    "AllocationProblem",
    "HeadBits",
    "SizeLimit",
    "WidthOverride",
    "allocation_problem",
    "check_head_bits",
]

HEAD_BITS = (2, 3, 4, 5, 6, 8, 16)
"""Bits that the output head can be asked to have; 16 leaves it unquantized."""

AUTO = "auto"
"""Head bits that leave the choice to the plan: the head then shares the decoder's budget."""

HeadBits = int | Literal["auto"]

_BITS = re.compile(r"(\d*)(:?)(\d*)", re.ASCII)


@dataclass(frozen=True, slots=True)
class WidthOverride:
    """Widths that the user allows for some linears.

    Attributes:
        pattern: Shell pattern of full names, with or without ``.weight``.
        least: Fewest bits of every row group.
        most: Most bits of every row group.
    """

    pattern: str
    least: int
    most: int

    def __post_init__(self) -> None:
        """Check the widths.

        Raises:
            ConfigError: EXL2 has no width among them.
        """
        if not self.widths:
            raise ConfigError(
                f"--override {self.pattern}: no width of EXL2 from {self.least} to {self.most} bits. Expected some of "
                f"{sorted(WIDTHS)}. To leave linears unquantized, use --keep-fp16."
            )

    def __str__(self) -> str:
        """Return it as it is asked for."""
        return f"{self.pattern}={self.least}" + ("" if self.least == self.most else f":{self.most}")

    @property
    def widths(self) -> tuple[int, ...]:
        """The widths that it allows."""
        return tuple(bits for bits in WIDTHS if self.least <= bits <= self.most)

    @classmethod
    def parse(cls, text: str) -> WidthOverride:
        """Read ``PATTERN=BITS``: ``6`` for exactly that, ``5:`` at least, ``:6`` at most, ``4:6`` between.

        Raises:
            ConfigError: It has another form, or EXL2 has no such width.
        """
        pattern, _, bits = text.rpartition("=")
        match = _BITS.fullmatch(bits)
        if not pattern or match is None or not (match[1] or match[3]):
            raise ConfigError(
                f"--override: not usable. Got {text!r}."
                " Expected PATTERN=BITS with bits as 6, 5: (at least), :6 (at most) or 4:6, "
                "for example '*.down_proj=5:'."
                " Choose another."
            )
        least = int(match[1] or min(WIDTHS))
        most = int(match[3] or max(WIDTHS)) if match[2] else least
        return cls(pattern, least, most)


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeLimit:
    """Most bytes that a model may take.

    Attributes:
        total_bytes: What there is.
        other_bytes: What all but the linears and the head take of it.
        float16_head_bytes: What the head takes of it if it stays unquantized; 0 if it is the embedding then.
    """

    total_bytes: int
    other_bytes: int
    float16_head_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocationProblem:
    """What a plan decides on.

    Attributes:
        quantized: Decoder linears that are quantized, in model order.
        unquantized: Decoder linears that stay in float16.
        head: The output head, or None if it stays in float16.
        head_reason: Why the head stays in float16 though its bits were asked to be others; else None.
        head_bits: What was asked of the head.
        widths: Widths that the row groups of a linear may have, by its name.
        group_size: Rows of a group.
    """

    quantized: tuple[Shaped, ...]
    unquantized: tuple[UnquantizedLinear, ...]
    head: Shaped | None
    head_reason: str | None
    head_bits: HeadBits
    widths: dict[str, tuple[int, ...]]
    group_size: int

    @property
    def head_shares_budget(self) -> bool:
        """Whether the head shares the decoder's budget."""
        return self.head is not None and self.head_bits == AUTO

    @property
    def weights(self) -> int:
        """Number of weights that bits per weight are counted over: the decoder's, and the head's if it shares."""
        return sum(x.in_features * x.out_features for x in (*self._budgeted, *self.unquantized))

    @property
    def unquantized_bits(self) -> int:
        """Bits of the decoder linears that stay in float16: of the budget, but not for the plan to spend."""
        return sum(linear.stored_bits for linear in self.unquantized)

    @property
    def bits_range(self) -> tuple[int, int]:
        """The fewest and the most bits that these weights can take."""
        lowest, highest = (sum(self._bits(x, pick(self.widths[x.name])) for x in self._budgeted) for pick in (min, max))
        return lowest + self.unquantized_bits, highest + self.unquantized_bits

    @property
    def bpw_range(self) -> tuple[float, float]:
        """The same as bits per weight."""
        lowest, highest = self.bits_range
        return lowest / self.weights, highest / self.weights

    @property
    def head_alone_bits(self) -> int:
        """Most bits of a quantized head that has a budget of its own, else 0.

        As many as if all its codes had the width asked for, as far as its allowed widths go.
        """
        if self.head is None or self.head_shares_budget:
            return 0
        assert isinstance(self.head_bits, int)
        allowed = self.widths[self.head.name]
        return self._bits(self.head, min(max(self.head_bits, min(allowed)), max(allowed)))

    @property
    def _budgeted(self) -> tuple[Shaped, ...]:
        return (*self.quantized, self.head) if self.head_shares_budget and self.head is not None else self.quantized

    def _bits(self, linear: Shaped, width: int) -> int:
        groups = [RowGroup(width, rows) for rows in group_rows(linear.in_features, self.group_size)]
        return linear_bits(linear.out_features, groups)

    def budget_bits(self, bpw: float) -> int:
        """Return the bits that bits per weight stand for.

        Raises:
            BudgetError: No plan has this size; the message gives the range.
        """
        lowest, highest = self.bpw_range
        # Both ends of the range can be asked for as they are shown.
        if not lowest <= bpw <= round_up(highest):
            raise BudgetError(
                f"{bpw:g} bits per weight cannot be reached: this model at groups of {self.group_size} rows can have "
                f"from {shown_range(lowest, highest)}{self._as_asked()}. Ask for a size in this range."
            )
        # The product may fall just short of the whole number of bits that it stands for.
        return min(int(bpw * self.weights + 1e-3), self.bits_range[1])

    def budget_bits_within(self, limit: SizeLimit) -> int:
        """Return the bits that are left for the same weights within a size; no more than they can take.

        Raises:
            BudgetError: Nothing is that small; the message gives the range.
        """
        fixed = 8 * limit.other_bytes + (8 * limit.float16_head_bytes if self.head is None else self.head_alone_bits)
        lowest, highest = self.bits_range
        left = 8 * limit.total_bytes - fixed
        if left < lowest:
            raise BudgetError(
                f"{limit.total_bytes} bytes cannot be reached: all but the linears planned here takes "
                f"{-(-fixed // 8)}, and the whole from {-(-(fixed + lowest) // 8)} to {-(-(fixed + highest) // 8)}"
                f"{self._as_asked()}. Ask for a size in this range."
            )
        return min(left, highest)

    def _as_asked(self) -> str:
        free = all(len(self.widths[linear.name]) == len(WIDTHS) for linear in self._budgeted)
        return "" if free and not self.unquantized else " with these overrides and linears in float16"


def allocation_problem(
    decoder: Sequence[Shaped],
    head: Shaped,
    *,
    group_size: int,
    head_bits: HeadBits,
    overrides: Sequence[WidthOverride] = (),
    keep_fp16: Sequence[str] = (),
) -> AllocationProblem:
    """Find out what a plan decides on.

    Args:
        decoder: The decoder's linears, in model order.
        head: The output head.
        group_size: Rows of a group.
        head_bits: Bits of the head: one of ``HEAD_BITS``, or ``AUTO``.
        overrides: Widths that linears may have; of several that match, the last.
        keep_fp16: Shell patterns of linears that stay in float16.

    Raises:
        ConfigError: There are no such head bits; a pattern matches nothing, or linears to keep are not all of a unit;
            or nothing is left to quantize.
    """
    check_head_bits(head_bits)
    reasons = unquantized_reasons(decoder, head, keep_fp16)
    if head_bits == FLOAT16_BITS:
        reasons.setdefault(head.name, ASKED)
    quantized = tuple(linear for linear in decoder if linear.name not in reasons)
    if not quantized:
        why = "; ".join(sorted({reasons[linear.name] for linear in decoder}))
        raise ConfigError(
            f"decoder: all linears would stay in float16 ({why}), nothing is left to quantize. Keep fewer of them."
        )
    names = {linear.name for linear in (*quantized, head)} - reasons.keys()
    for override in overrides:
        if not matching(override.pattern, names):
            among = "; those that have stay in float16" if matching(override.pattern, reasons) else ""
            raise ConfigError(
                f"--override {override.pattern}: no quantized linear has such a name{among}. "
                "`bpwise plan` lists the names."
            )
    widths: dict[str, tuple[int, ...]] = dict.fromkeys(names, WIDTHS)
    for override in overrides:
        widths |= dict.fromkeys(matching(override.pattern, names), override.widths)
    return AllocationProblem(
        quantized=quantized,
        unquantized=tuple(
            UnquantizedLinear(
                name=x.name, in_features=x.in_features, out_features=x.out_features, reason=reasons[x.name]
            )
            for x in decoder
            if x.name in reasons
        ),
        head=None if head.name in reasons else head,
        head_reason=None if head_bits == FLOAT16_BITS else reasons.get(head.name),
        head_bits=head_bits,
        widths=widths,
        group_size=group_size,
    )


def check_head_bits(head_bits: HeadBits) -> None:
    """Refuse head bits that there are not.

    Raises:
        ConfigError: The message lists those that there are.
    """
    if head_bits != AUTO and not (isinstance(head_bits, int) and head_bits in HEAD_BITS):
        raise ConfigError(
            f"head bits: not usable. Got {head_bits!r}. Expected one of {HEAD_BITS} or {AUTO!r}. Choose another."
        )
