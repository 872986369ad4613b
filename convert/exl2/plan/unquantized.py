"""Linears that stay in float16: because they were asked to, or because EXL2 cannot hold them.

EXL2 readers build attention and MLP of a layer each as one, so whole *units* stay (``_unit_of``).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from ....checkpoint.files.schemas import Positive
from ....checkpoint.model.families import HEAD
from ....checkpoint.source.linears import Shaped, matching
from ....errors import ConfigError
from ..file.layout import MAX_ROWS, ROW_MULTIPLE

__all__ = ["ASKED", "FLOAT16_BITS", "UnquantizedLinear", "unquantized_lines", "unquantized_reasons"]

FLOAT16_BITS = 16

ASKED = "asked for"
"""Reason of what the user wants to keep."""

_UNIT = re.compile(r"((?:[^.]+\.)+?\d+\.[^.]+)\..+", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class UnquantizedLinear:
    """A linear that stays in float16.

    Attributes:
        name: Full name.
        in_features: Number of input features.
        out_features: Number of outputs.
        reason: Why.
    """

    name: str
    in_features: Positive
    out_features: Positive
    reason: str

    @property
    def weights(self) -> int:
        """Number of weights."""
        return self.in_features * self.out_features

    @property
    def stored_bits(self) -> int:
        """Stored size in bits."""
        return FLOAT16_BITS * self.weights


def _unit_of(name: str) -> str:
    """Return what EXL2 readers build as one: all linears of it are quantized, or none is.

    Source: format document, section 6. It is ``model.layers.0.self_attn`` or ``model.layers.0.mlp``, whatever they are
    made of; anything outside the blocks is a unit of its own.

    Args:
        name: Full name of a linear.
    """
    match = _UNIT.fullmatch(name)
    return match[1] if match else name


def unquantized_lines(unquantized: Iterable[UnquantizedLinear], head_reason: str | None) -> list[str]:
    """Return what stays in float16, and why, one line a reason."""
    counts: dict[str, list[int]] = {}
    for linear in unquantized:
        counts.setdefault(linear.reason, []).append(linear.weights)
    lines = [f"{len(sizes)} linears, {sum(sizes)} weights: {reason}" for reason, sizes in counts.items()]
    return [*lines, *([f"{HEAD}: {head_reason}"] if head_reason else [])]


def unquantized_reasons(decoder: Sequence[Shaped], head: Shaped, patterns: Sequence[str]) -> dict[str, str]:
    """Return why each linear that stays in float16 does, by its name.

    Args:
        decoder: The decoder's linears.
        head: The output head.
        patterns: Shell patterns of linears that the user wants to keep.

    Raises:
        ConfigError: A pattern matches nothing, or together they match a part of a unit only.
    """
    units: dict[str, list[str]] = {}
    for linear in (*decoder, head):
        units.setdefault(_unit_of(linear.name), []).append(linear.name)
    reasons: dict[str, str] = {}
    for linear in (*decoder, head):
        if linear.in_features % ROW_MULTIPLE or linear.in_features > MAX_ROWS:
            why = (
                f"{linear.name.rpartition('.')[2]} has {linear.in_features} input features, EXL2 needs a multiple of "
                f"{ROW_MULTIPLE} up to {MAX_ROWS}"
            )
            reasons |= dict.fromkeys(units[_unit_of(linear.name)], why)
    asked: set[str] = set()
    for pattern in patterns:
        matched = matching(pattern, (linear.name for linear in (*decoder, head)))
        if not matched:
            raise ConfigError(f"--keep-fp16 {pattern}: no linear has such a name. `bpwise plan` lists the names.")
        asked |= matched
    _refuse_parts(units, asked, reasons.keys())
    return {**dict.fromkeys(asked, ASKED), **reasons}


def _refuse_parts(units: Mapping[str, Sequence[str]], asked: Set[str], unfit: Set[str]) -> None:
    missing = {
        unit: [name for name in names if name not in asked and name not in unfit]
        for unit, names in units.items()
        if not asked.isdisjoint(names)
    }
    partial = [unit for unit, names in missing.items() if names]
    if not partial:
        return
    unit = partial[0]
    hint, likewise = f"{unit}.*", ""
    if len(partial) > 1:
        hint, likewise = f"*.{unit.rpartition('.')[2]}.*", f" (and likewise in {len(partial) - 1} more)"
    raise ConfigError(
        f"--keep-fp16: {', '.join(name for name in units[unit] if name in asked)} would stay in float16 without "
        f"{', '.join(missing[unit])}{likewise}, but EXL2 readers need all linears of {unit} quantized or none. "
        f"Keep those too, for example with --keep-fp16 '{hint}'."
    )
