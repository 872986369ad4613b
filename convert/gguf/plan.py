"""The plan of a GGUF file: which of ggml's types every tensor gets. Made from a measurement alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from ...checkpoint.files.atomic import write_json
from ...checkpoint.files.schemas import Count, Number, Positive, check_schema, read_json
from ...checkpoint.source.linears import Shaped
from ...errors import BudgetError, ConfigError, FormatError
from ...linalg.knapsack import choose
from ...measure.measurement import Measurement
from ..exl2.plan.plan import REMEDY
from ..exl2.plan.problem import shown_range
from .curves import gguf_curves
from .file.names import gguf_name
from .ggml.types import TYPES, GgmlType, ggml_type

__all__ = [
    "TYPE_PLAN_KEY",
    "TYPE_PLAN_VERSION",
    "Override",
    "TensorPlan",
    "TypePlan",
    "make_type_plan",
    "require_type_plan",
    "size_range",
]

TYPE_PLAN_VERSION = 1

TYPE_PLAN_KEY = "bpwise_type_plan"
"""Where a file says that it is a GGUF plan, and of which version."""

_UNTOUCHED = "F16"
"""Taken for lossless: its damage is far below that of any quantized type."""

_OTHER_BYTES = 4
"""Norms and biases are stored as F32, as llama.cpp's converter does."""


@dataclass(frozen=True, slots=True)
class Override:
    """A type that the user asks for.

    Attributes:
        pattern: Shell pattern of tensor names, with or without ``.weight``: those of Transformers
            (``model.layers.0.*``) or of llama.cpp (``blk.0.*``).
        kind: The type.
    """

    pattern: str
    kind: GgmlType

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read ``PATTERN=TYPE``.

        Raises:
            ConfigError: It has another form, or there is no such type.
        """
        pattern, equals, name = text.rpartition("=")
        if not (pattern and equals):
            raise ConfigError(f"--override: got {text!r}, expected PATTERN=TYPE, for example 'blk.0.*=Q8_0'.")
        return cls(pattern, ggml_type(name))

    def matches(self, name: str) -> bool:
        """Return whether the pattern names a linear or the embeddings, by their name in Transformers."""
        full = f"{name}.weight"
        theirs = gguf_name(full) or full
        return any(fnmatchcase(known, self.pattern) for known in (name, full, theirs, theirs.removesuffix(".weight")))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """Type of one tensor.

    Attributes:
        name: Full name of the module in Transformers.
        rows: Outputs of a linear, or tokens.
        row_weights: Weights in a row.
        type: Name of the type.
        damage_nats: Predicted damage, nats per token.
    """

    name: str
    rows: Positive
    row_weights: Positive
    type: str
    damage_nats: Number

    def __post_init__(self) -> None:
        """Check the type.

        Raises:
            ValueError: There is no such type, or rows are not whole blocks of it.
        """
        if self.type not in TYPES or not TYPES[self.type].fits(self.row_weights):
            raise ValueError(f"type must be one of {', '.join(TYPES)}, with row_weights a multiple of its blocks")

    @property
    def kind(self) -> GgmlType:
        """The type."""
        return ggml_type(self.type)

    @property
    def stored_bytes(self) -> int:
        """Size of the tensor's data."""
        return self.rows * self.kind.row_bytes(self.row_weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class TypePlan:
    """Types of a whole model.

    Attributes:
        tensors: Decoder linears in model order, then the head if it is a tensor of its own, then the embeddings.
        other_weights: Weights in norms and biases, which stay in F32.
        target_bytes: Most bytes that all tensors together may take.
        lower_bound_nats: No choice within the target has a smaller predicted damage.
        measurement: Fingerprint of the measurement behind the plan.
    """

    tensors: Annotated[tuple[TensorPlan, ...], msgspec.Meta(min_length=1)]
    other_weights: Count
    target_bytes: Count
    lower_bound_nats: Number
    measurement: str

    @property
    def weights(self) -> int:
        """Number of all weights of the model."""
        return sum(tensor.rows * tensor.row_weights for tensor in self.tensors) + self.other_weights

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors' data, norms and biases included."""
        return sum(tensor.stored_bytes for tensor in self.tensors) + _OTHER_BYTES * self.other_weights

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors of the file, as llama.cpp counts."""
        return 8 * self.stored_bytes / self.weights

    @property
    def damage_nats(self) -> float:
        """Predicted damage, nats per token."""
        return sum(tensor.damage_nats for tensor in self.tensors)

    @property
    def gap(self) -> float:
        """How far the predicted damage may be above the best possible, as a fraction of it."""
        return self.damage_nats / self.lower_bound_nats - 1 if self.lower_bound_nats > 0 else 0.0

    @property
    def kinds(self) -> dict[str, GgmlType]:
        """Type of every tensor, by the module's name in Transformers."""
        return {tensor.name: tensor.kind for tensor in self.tensors}

    def weights_per_type(self) -> dict[str, float]:
        """Return the share of all planned weights in each type, the largest type first."""
        counts: Counter[str] = Counter()
        for tensor in self.tensors:
            counts[tensor.type] += tensor.rows * tensor.row_weights
        total = sum(counts.values())
        return {
            name: counts[name] / total for name in sorted(counts, key=lambda name: -ggml_type(name).bits_per_weight)
        }

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        derived = {"bpw": self.bpw, "predicted_damage_nats": self.damage_nats}
        write_json(path, {TYPE_PLAN_KEY: TYPE_PLAN_VERSION, **derived, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> TypePlan:
        """Read a plan.

        Raises:
            FormatError: It is not a plan of this version.
        """
        raw = read_json(path, FormatError)
        if raw.get(TYPE_PLAN_KEY) != TYPE_PLAN_VERSION:
            raise FormatError(f"{path}: not a GGUF plan of version {TYPE_PLAN_VERSION}. Make it with `bpwise plan`.")
        return check_schema(raw, cls, FormatError, where=str(path), remedy=REMEDY)


@dataclass(frozen=True, slots=True)
class _Tensor:
    """A tensor and what it may become."""

    name: str
    rows: int
    row_weights: int
    damage_nats: dict[str, float]


def make_type_plan(
    measurement: Measurement,
    *,
    bpw: float | None = None,
    tensor_bytes: int | None = None,
    overrides: Sequence[Override] = (),
) -> TypePlan:
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
        ConfigError: GGUF was not measured, or an override matches nothing or does not fit.
    """
    candidates = _candidates(measurement, overrides)
    target = _target(candidates, measurement.other_weights, bpw=bpw, tensor_bytes=tensor_bytes)
    names = [list(tensor.damage_nats) for tensor in candidates]
    sizes = [_sizes(tensor) for tensor in candidates]
    damages = [np.array(list(tensor.damage_nats.values())) for tensor in candidates]
    chosen = choose(damages, sizes, target - _OTHER_BYTES * measurement.other_weights)
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
    return TypePlan(
        tensors=tensors,
        other_weights=measurement.other_weights,
        target_bytes=target,
        lower_bound_nats=chosen.lower_bound,
        measurement=measurement.fingerprint,
    )


def require_type_plan(
    linears: Sequence[Shaped],
    table: Shaped,
    other_weights: int,
    types: Sequence[str],
    *,
    bpw: float | None = None,
    tensor_bytes: int | None = None,
    overrides: Sequence[Override] = (),
) -> int:
    """Refuse what ``make_type_plan`` would refuse of any measurement of a model, before there is one.

    Args:
        linears: Its decoder linears, and its head if that is a tensor of its own.
        table: Its embeddings: as many inputs as a token has channels, an output for each token.
        other_weights: Weights in norms and biases.
        types: Names of the types that are measured.
        bpw: As ``make_type_plan`` takes it.
        tensor_bytes: As ``make_type_plan`` takes it.
        overrides: As ``make_type_plan`` takes them.

    Returns:
        About the bytes that all tensors will take, met from below.

    Raises:
        BudgetError: No plan is that small.
        ConfigError: An override matches nothing or does not fit.
    """
    tensors = [_undamaged(x.name, x.out_features, x.in_features, types) for x in (*linears, table)]
    candidates = _restricted(tensors, overrides, types)
    target = _target(candidates, other_weights, bpw=bpw, tensor_bytes=tensor_bytes)
    return min(target, _size_range(candidates, other_weights)[1])


def size_range(measurement: Measurement, overrides: Sequence[Override] = ()) -> tuple[int, int]:
    """Return the fewest and the most bytes that the tensors of a plan can take.

    Raises:
        ConfigError: As ``make_type_plan``.
    """
    return _size_range(_candidates(measurement, overrides), measurement.other_weights)


def _size_range(candidates: Sequence[_Tensor], other_weights: int) -> tuple[int, int]:
    other = _OTHER_BYTES * other_weights
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


def _candidates(measurement: Measurement, overrides: Sequence[Override]) -> list[_Tensor]:
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


def _restricted(tensors: Sequence[_Tensor], overrides: Sequence[Override], measured: Sequence[str]) -> list[_Tensor]:
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


def _fitting(types: Sequence[str], name: str, rows: int, row_weights: int, damage_nats: NDArray[np.float32]) -> _Tensor:
    fitting = {kind: float(damage) for kind, damage in zip(types, damage_nats, strict=True) if np.isfinite(damage)}
    return _Tensor(name, rows, row_weights, {_UNTOUCHED: 0.0, **fitting})


def _undamaged(name: str, rows: int, row_weights: int, types: Sequence[str]) -> _Tensor:
    # A tensor of which nothing was measured: in no type it costs anything.
    fitting = (kind for kind in types if ggml_type(kind).fits(row_weights))
    return _Tensor(name, rows, row_weights, {_UNTOUCHED: 0.0, **dict.fromkeys(fitting, 0.0)})


def _overridden(tensor: _Tensor, override: Override, measured: Sequence[str]) -> _Tensor:
    kind = override.kind
    if not kind.fits(tensor.row_weights):
        raise ConfigError(
            f"--override {override.pattern}={kind.name}: {tensor.name} has rows of {tensor.row_weights} weights, "
            f"expected a multiple of {kind.block_weights} for this type. Choose one of {', '.join(tensor.damage_nats)}."
        )
    if kind.quantized and kind.name not in measured:
        raise ConfigError(f"--override {override.pattern}={kind.name}: the measurement does not know this type.")
    return _Tensor(tensor.name, tensor.rows, tensor.row_weights, {kind.name: tensor.damage_nats.get(kind.name, 0.0)})
