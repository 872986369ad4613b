"""The plan of a GGUF file: which of ggml's types every tensor gets."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

import msgspec

from ...checkpoint.files.atomic import write_json
from ...checkpoint.files.schemas import Count, Number, Positive, check_schema
from ...errors import ConfigError, FormatError
from ...tables import Table
from ..model import Description
from ..plan import LinearCost, Plan
from .file.names import gguf_name
from .ggml.types import TYPES, GgmlType, ggml_type

__all__ = ["OTHER_BYTES", "PLAN_VERSION", "GgufPlan", "TensorPlan", "TypeOverride", "type_shares"]

PLAN_VERSION = 2

_REMEDY = "The plan is damaged: make it again with `bpwise plan`."

OTHER_BYTES = 4
"""Norms and biases are stored as F32, as llama.cpp's converter does."""


def type_shares(weights: Iterable[tuple[GgmlType, int]]) -> dict[str, float]:
    """Return the share of all weights in each type, the largest type first.

    Args:
        weights: Type and number of weights of every tensor.
    """
    counts: Counter[GgmlType] = Counter()
    for kind, count in weights:
        counts[kind] += count
    largest_first = sorted(counts, key=lambda kind: -kind.bits_per_weight)
    return {kind.name: counts[kind] / counts.total() for kind in largest_first}


@dataclass(frozen=True, slots=True)
class TypeOverride:
    """A type that the user asks for.

    Attributes:
        pattern: Shell pattern of tensor names, with or without ``.weight``: those of Transformers
            (``model.layers.0.*``) or of llama.cpp (``blk.0.*``).
        kind: The type.
    """

    pattern: str
    kind: GgmlType

    @classmethod
    def parse(cls, text: str) -> TypeOverride:
        """Read ``PATTERN=TYPE``.

        Raises:
            ConfigError: It has another form, or there is no such type.
        """
        pattern, equals, name = text.rpartition("=")
        if not (pattern and equals):
            raise ConfigError(
                f"--override: not usable. Got {text!r}. Expected PATTERN=TYPE, for example 'blk.0.*=Q8_0'. Correct it."
            )
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
class GgufPlan(Plan):
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
        return sum(tensor.stored_bytes for tensor in self.tensors) + OTHER_BYTES * self.other_weights

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

    def shares(self) -> dict[str, float]:
        """Return the share of all planned weights in each type, the largest type first."""
        return type_shares((tensor.kind, tensor.rows * tensor.row_weights) for tensor in self.tensors)

    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every tensor gets and is expected to cost."""
        return tuple(LinearCost(x.name, x.kind.bits_per_weight, x.damage_nats) for x in self.tensors)

    def identity(self) -> Any:
        """Return the measurement behind the plan, and all types."""
        return [self.measurement, [[tensor.name, tensor.type] for tensor in self.tensors]]

    def describe(self) -> Description:
        """Return what is in the plan."""
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares().items())
        return Description(
            kind="GGUF plan",
            facts=(
                f"{self.bpw:.4f} bits per weight over all tensors, {self.stored_bytes / 2**20:.1f} MiB (at most "
                f"{self.target_bytes / 2**20:.1f} MiB asked)",
                f"predicted damage {self.damage_nats:.6f} nats/token (no plan of this size can go below "
                f"{self.lower_bound_nats:.6f})",
                f"weights: {shares}",
            ),
            table=Table(
                ("tensor", "in x out", "type", "bpw", "damage, nats/token"),
                tuple(
                    (
                        tensor.name,
                        f"{tensor.row_weights} x {tensor.rows}",
                        tensor.type,
                        f"{tensor.kind.bits_per_weight:.3f}",
                        f"{tensor.damage_nats:.2e}",
                    )
                    for tensor in self.tensors
                ),
            ),
        )

    def save(self, path: Path) -> None:
        """Write the plan as JSON."""
        derived = {"bpw": self.bpw, "predicted_damage_nats": self.damage_nats}
        write_json(path, {"bpwise_plan": PLAN_VERSION, "format": "gguf", **derived, **asdict(self)})

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> GgufPlan:
        """Return the plan that a file holds; see ``Format.load_plan``.

        Raises:
            FormatError: It is not a plan of this version.
        """
        if raw.get("bpwise_plan") != PLAN_VERSION:
            raise FormatError(f"{where}: not a GGUF plan of version {PLAN_VERSION}. Make it again with `bpwise plan`.")
        return check_schema(raw, cls, FormatError, where=where, remedy=_REMEDY)
