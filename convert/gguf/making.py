"""Making GGUF plans from a measurement alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...checkpoint.source.linears import Shaped
from ...errors import BudgetError, ConfigError
from ...linalg.knapsack import choose
from ...measure.measurement import Measurement
from ..plan import shown_range
from .curves import gguf_curves
from .ggml.types import ggml_type
from .plan import OTHER_BYTES, GgufPlan, TensorPlan, TypeOverride

__all__ = ["TensorBytes", "make_gguf_plan", "require_gguf_plan", "size_range"]

_UNTOUCHED = "F16"
"""Taken for lossless: its damage is far below that of any quantized type."""


@dataclass(frozen=True, slots=True)
class TensorBytes:
    """Bytes that all tensors together can take.

    Attributes:
        target_bytes: About how many they will take, met from below.
        least_bytes: The fewest.
        most_bytes: The most.
    """

    target_bytes: int
    least_bytes: int
    most_bytes: int


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor and what it may become."""

    name: str
    rows: int
    row_weights: int
    damage_nats: dict[str, float]


def make_gguf_plan(
    measurement: Measurement,
    *,
    bpw: float | None = None,
    tensor_bytes: int | None = None,
    overrides: Sequence[TypeOverride] = (),
) -> GgufPlan:
    """Choose a type for every tensor.

    Args:
        measurement: The measured damages.
        bpw: Bits per weight over all tensors of the file; met from below, never exceeded. Where it is more than all
            tensors can take they get their largest types.
        tensor_bytes: The same as a number of bytes; one of the two is given.
        overrides: Types that tensors must have; of several that match, the last.

    Returns:
        The plan of least predicted damage.

    Raises:
        BudgetError: No plan is that small; the message gives the range that there is.
        ConfigError: No types were measured, or an override matches nothing or does not fit.
    """
    candidates = _candidates(measurement, overrides)
    target = _target(candidates, measurement.other_weights, bpw=bpw, tensor_bytes=tensor_bytes)
    names = [list(tensor.damage_nats) for tensor in candidates]
    sizes = [_sizes(tensor) for tensor in candidates]
    damages = [np.array(list(tensor.damage_nats.values())) for tensor in candidates]
    chosen = choose(damages, sizes, target - OTHER_BYTES * measurement.other_weights)
    tensors = tuple(
        TensorPlan(
            name=tensor.name,
            rows=tensor.rows,
            row_weights=tensor.row_weights,
            type=kinds[option],
            damage_nats=tensor.damage_nats[kinds[option]],
        )
        for tensor, kinds, option in zip(candidates, names, chosen.options, strict=True)
    )
    return GgufPlan(
        tensors=tensors,
        other_weights=measurement.other_weights,
        target_bytes=target,
        lower_bound_nats=chosen.lower_bound,
        measurement=measurement.fingerprint,
    )


def require_gguf_plan(
    linears: Sequence[Shaped],
    table: Shaped,
    other_weights: int,
    types: Sequence[str],
    *,
    bpw: float | None = None,
    tensor_bytes: int | None = None,
    overrides: Sequence[TypeOverride] = (),
) -> TensorBytes:
    """Refuse what ``make_gguf_plan`` would refuse of any measurement of a model, before there is one.

    Args:
        linears: Its decoder linears, and its head if that is a tensor of its own.
        table: Its embeddings: as many inputs as a token has channels, an output for each token.
        other_weights: Weights in norms and biases.
        types: Names of the types that are measured.
        bpw: As ``make_gguf_plan`` takes it.
        tensor_bytes: As ``make_gguf_plan`` takes it.
        overrides: As ``make_gguf_plan`` takes them.

    Returns:
        The bytes that all tensors can take, and about how many they will.

    Raises:
        BudgetError: No plan is that small.
        ConfigError: An override matches nothing or does not fit.
    """
    tensors = [_undamaged(x.name, x.out_features, x.in_features, types) for x in (*linears, table)]
    candidates = _restricted(tensors, overrides, types)
    target = _target(candidates, other_weights, bpw=bpw, tensor_bytes=tensor_bytes)
    least, most = _size_range(candidates, other_weights)
    return TensorBytes(min(target, most), least, most)


def size_range(measurement: Measurement, overrides: Sequence[TypeOverride] = ()) -> tuple[int, int]:
    """Return the fewest and the most bytes that the tensors of a plan can take.

    Raises:
        ConfigError: As ``make_gguf_plan``.
    """
    return _size_range(_candidates(measurement, overrides), measurement.other_weights)


def _size_range(candidates: Sequence[_Tensor], other_weights: int) -> tuple[int, int]:
    other = OTHER_BYTES * other_weights
    sizes = [_sizes(tensor) for tensor in candidates]
    return other + sum(int(size.min()) for size in sizes), other + sum(int(size.max()) for size in sizes)


def _sizes(tensor: _Tensor) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array([tensor.rows * ggml_type(name).row_bytes(tensor.row_weights) for name in tensor.damage_nats])


def _target(candidates: Sequence[_Tensor], other_weights: int, *, bpw: float | None, tensor_bytes: int | None) -> int:
    # The bytes that a target stands for, as far as they can be reached.
    assert (bpw is None) != (tensor_bytes is None), "one target"
    weights = sum(tensor.rows * tensor.row_weights for tensor in candidates) + other_weights
    # The product may fall just short of the whole number of bytes that it stands for.
    target = int(bpw * weights / 8 + 1e-3) if bpw is not None else tensor_bytes
    assert target is not None
    least, most = _size_range(candidates, other_weights)
    if target < least:
        raise BudgetError(
            f"{target} bytes of tensors ({8 * target / weights:.4f} bits per weight) cannot be reached: this model can "
            f"have from {least} to {most}, that is {shown_range(8 * least / weights, 8 * most / weights)} bits per "
            "weight. Ask for a size in this range."
        )
    return target


def _candidates(measurement: Measurement, overrides: Sequence[TypeOverride]) -> list[_Tensor]:
    # Every tensor with the damage of each type that fits it.
    curves = gguf_curves(measurement)
    head, table = measurement.head, measurement.embedding
    tensors = [
        _fitting(curves.types, linear.name, linear.out_features, linear.in_features, curves.damage_nats(linear.name))
        for linear in (*measurement.linears, *([] if table.tied else [head]))
    ]
    damage = curves.table_damage_nats + (curves.damage_nats(head.name) if table.tied else 0)
    tensors.append(_fitting(curves.types, table.name, table.tokens, table.hidden_size, damage))
    return _restricted(tensors, overrides, curves.types)


def _restricted(
    tensors: Sequence[_Tensor], overrides: Sequence[TypeOverride], measured: Sequence[str]
) -> list[_Tensor]:
    # The tensors with the types that overrides leave them.
    for override in overrides:
        if not any(override.matches(tensor.name) for tensor in tensors):
            raise ConfigError(
                f"--override {override.pattern}={override.kind.name}: no tensor has such a name. "
                "`bpwise plan` lists the names."
            )
    asked = [next((o for o in reversed(overrides) if o.matches(tensor.name)), None) for tensor in tensors]
    return [
        _overridden(tensor, override, measured) if override else tensor
        for tensor, override in zip(tensors, asked, strict=True)
    ]


def _fitting(
    types: Sequence[str],
    name: str,
    rows: int,
    row_weights: int,
    damage_nats: np.ndarray[tuple[int], np.dtype[np.float32]],
) -> _Tensor:
    fitting = {kind: float(damage) for kind, damage in zip(types, damage_nats, strict=True) if np.isfinite(damage)}
    return _Tensor(name, rows, row_weights, {_UNTOUCHED: 0.0, **fitting})


def _undamaged(name: str, rows: int, row_weights: int, types: Sequence[str]) -> _Tensor:
    # A tensor of which nothing was measured: in no type it costs anything.
    fitting = (kind for kind in types if ggml_type(kind).fits(row_weights))
    return _Tensor(name, rows, row_weights, {_UNTOUCHED: 0.0, **dict.fromkeys(fitting, 0.0)})


def _overridden(tensor: _Tensor, override: TypeOverride, measured: Sequence[str]) -> _Tensor:
    kind = override.kind
    if not kind.fits(tensor.row_weights):
        raise ConfigError(
            f"--override {override.pattern}={kind.name}: {tensor.name} has rows of {tensor.row_weights} weights. "
            f"Expected a multiple of {kind.block_weights} for this type. Choose one of {', '.join(tensor.damage_nats)}."
        )
    if kind.quantized and kind.name not in measured:
        raise ConfigError(
            f"--override {override.pattern}={kind.name}: the measurement does not know this type. Choose another."
        )
    return _Tensor(tensor.name, tensor.rows, tensor.row_weights, {kind.name: tensor.damage_nats.get(kind.name, 0.0)})
