"""The plan of a GGUF file: which of ggml's types every tensor gets."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import Count, Number, Positive, check_schema, checksummed
from ....checkpoint.source.linears import matching
from ....errors import ConfigError, FormatError
from ....tables import Table, bytes_text
from ...model import Description
from ...plan import LinearCost, Plan, TensorsPlan
from ..ggml.types import TYPES, GgmlType, ggml_type

__all__ = ["EMBEDDINGS", "HEAD", "PLAN_VERSION", "GgufPlan", "TensorPlan", "TypeOverride", "type_shares"]

PLAN_VERSION = 3

EMBEDDINGS, HEAD = "token_embd.weight", "output.weight"
"""The table of token embeddings and the output head; without the second the first is both."""

_REMEDY = "The plan is damaged: make it again with `bpwise plan`."

_SHOWN_PLAIN = 3
"""Names of plainly rounded tensors that a plan's facts give."""


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
    """A type that the user asks for, or several to choose from.

    Attributes:
        pattern: Shell pattern of names, with or without ``.weight``: of a tensor in the file (``blk.0.*``), or of a
            linear that it is made of (``model.layers.0.*``).
        kinds: The types, at least one.
    """

    pattern: str
    kinds: tuple[GgmlType, ...]

    @classmethod
    def parse(cls, text: str) -> TypeOverride:
        """Read ``PATTERN=TYPE[,TYPE...]``.

        Raises:
            ConfigError: It has another form, or there is no such type.
        """
        pattern, equals, names = text.rpartition("=")
        if not (pattern and equals):
            raise ConfigError(
                f"--override: not usable. Got {text!r}. Expected PATTERN=TYPE[,TYPE...], for example 'blk.0.*=Q8_0'. "
                "Correct it."
            )
        return cls(pattern, tuple(ggml_type(name) for name in names.split(",")))

    def __str__(self) -> str:
        """Return it as it is asked for."""
        return f"{self.pattern}={','.join(kind.name for kind in self.kinds)}"

    def matches(self, names: Iterable[str]) -> bool:
        """Return whether the pattern means a tensor.

        Args:
            names: Its name in the file, and those of its linears, each with or without ``.weight``.
        """
        return bool(matching(self.pattern, (name.removesuffix(".weight") for name in names)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """Type of one tensor.

    Attributes:
        name: Its name in the file, as ``blk.0.attn_q.weight``.
        shape: Sizes of its dimensions, outermost first: of stacked experts three.
        linears: Full names of the linears that it is made of, in Transformers; empty where they are not known.
        type: Name of the type.
        damage_nats: Predicted damage, nats per token; None where nothing was measured of it, so that it is rounded
            plainly, by ggml alone.
    """

    name: str
    shape: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=1)]
    linears: tuple[str, ...]
    type: str
    damage_nats: Number | None

    def __post_init__(self) -> None:
        """Check the type.

        Raises:
            ValueError: There is no such type, or rows are not whole blocks of it.
        """
        if self.type not in TYPES or not TYPES[self.type].fits(self.shape[-1]):
            raise ValueError(f"type must be one of {', '.join(TYPES)}, with rows of whole blocks of it")

    @property
    def kind(self) -> GgmlType:
        """The type."""
        return ggml_type(self.type)

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def stored_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape[:-1]) * self.kind.row_bytes(self.shape[-1])


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GgufPlan(TensorsPlan[TensorPlan]):
    """Types of a whole model.

    Attributes:
        tensors: All that is rounded: in model order what was measured, the token embeddings last; then the others. The
            rest is as in ``TensorsPlan``; norms, biases, routers and convolutions stay as they are.
    """

    format: ClassVar[str] = "gguf"
    tensors: Annotated[tuple[TensorPlan, ...], msgspec.Meta(min_length=1)]
    other_weights: Count
    other_bytes: Count
    target_bytes: Count
    lower_bound_nats: Number
    measurement: str

    @property
    def kinds(self) -> dict[str, GgmlType]:
        """Type of every tensor, by its name in the file."""
        return {tensor.name: tensor.kind for tensor in self.tensors}

    @property
    def plain(self) -> tuple[TensorPlan, ...]:
        """The tensors of which nothing was measured."""
        return tuple(tensor for tensor in self.tensors if tensor.damage_nats is None)

    def shares(self) -> dict[str, float]:
        """Return the share of all planned weights in each type, the largest type first."""
        return type_shares((tensor.kind, tensor.weights) for tensor in self.tensors)

    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every tensor gets and is expected to cost."""
        return tuple(
            LinearCost(x.name.removesuffix(".weight"), x.kind.bits_per_weight, x.damage_nats) for x in self.tensors
        )

    @property
    def vram_bytes(self) -> int:
        """Size of all tensors but the table of embeddings, which is in main memory unless it is the head, too."""
        sizes = {tensor.name: tensor.stored_bytes for tensor in self.tensors}
        return self.stored_bytes - (sizes.get(EMBEDDINGS, 0) if HEAD in sizes else 0)

    def identity(self) -> Any:
        """Return the measurement behind the plan, and all types."""
        return [self.measurement, [[tensor.name, tensor.type] for tensor in self.tensors]]

    def describe(self) -> Description:
        """Return what is in the plan."""
        return Description(
            kind="GGUF plan",
            facts=(*self.facts, *([_plain_fact(self.plain)] if self.plain else [])),
            table=Table(
                ("tensor", "shape", "type", "bpw", "damage, nats/token"),
                tuple(
                    (
                        tensor.name,
                        " x ".join(map(str, tensor.shape)),
                        tensor.type,
                        f"{tensor.kind.bits_per_weight:.3f}",
                        "not measured" if tensor.damage_nats is None else f"{tensor.damage_nats:.2e}",
                    )
                    for tensor in self.tensors
                ),
            ),
            content=self.content(),
        )

    def content(self) -> dict[str, Any]:
        """Return what it tells, for programs: tensors instead of linears."""
        tensors = [
            {
                "name": tensor.name,
                "shape": list(tensor.shape),
                "type": tensor.type,
                "bpw": tensor.kind.bits_per_weight,
                "damage_nats": tensor.damage_nats,
            }
            for tensor in self.tensors
        ]
        return {**{key: value for key, value in Plan.content(self).items() if key != "linears"}, "tensors": tensors}

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        derived = {"bpw": self.bpw, "predicted_damage_nats": self.damage_nats}
        write_json(Path(path), checksummed({"bpwise_plan": PLAN_VERSION, "format": "gguf", **derived, **asdict(self)}))

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> GgufPlan:
        """Return the plan that a file holds; see ``Format.load_plan``.

        Raises:
            FormatError: It is not a plan of this version.
        """
        if raw.get("bpwise_plan") != PLAN_VERSION:
            raise FormatError(f"{where}: not a GGUF plan of version {PLAN_VERSION}. Make it again with `bpwise plan`.")
        return check_schema(raw, cls, FormatError, where=where, remedy=_REMEDY)


def _plain_fact(plain: Sequence[TensorPlan]) -> str:
    names = ", ".join(tensor.name for tensor in plain[:_SHOWN_PLAIN])
    more = f" and {len(plain) - _SHOWN_PLAIN} more" if len(plain) > _SHOWN_PLAIN else ""
    size = bytes_text(sum(tensor.stored_bytes for tensor in plain))
    return f"not measured, rounded by ggml alone: {len(plain)} tensors of {size} ({names}{more})"
