"""The plan of an MLX model: which scheme every module gets, and which stay as they are. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import Count, Number, Positive, check_schema, checksummed
from ....checkpoint.source.linears import matching
from ....errors import ConfigError, FormatError
from ....tables import Table
from ...model import Description
from ...plan import LinearCost, TensorsPlan
from ..file.layout import StoredTensor
from ..grid.schemes import SCHEMES, Scheme, scheme_named

__all__ = ["PLAN_VERSION", "UNTOUCHED", "MlxPlan", "Override", "TensorPlan", "stored_bytes"]

PLAN_VERSION = 1

UNTOUCHED = "16"
"""As overrides call a module that is not quantized."""

_REMEDY = "The plan is damaged: make it again with `bpwise plan`."


@dataclass(frozen=True, slots=True)
class Override:
    """Schemes that the user allows.

    Attributes:
        pattern: Shell pattern of names, with or without ``.weight``: of a module in mlx-lm or of a linear in it.
        names: Names of schemes, or ``16`` for a module that is not quantized.
    """

    pattern: str
    names: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Override:
        """Read ``PATTERN=WHAT[,WHAT...]``: bits, bits and group size, or 16.

        Raises:
            ConfigError: It has another form.
        """
        pattern, equals, asked = text.rpartition("=")
        names: list[str] = []
        for each in asked.split(","):
            found = [scheme.name for scheme in SCHEMES if each in (scheme.name, str(scheme.bits))]
            names += found or ([UNTOUCHED] if each == UNTOUCHED else [])
            if not found and each != UNTOUCHED:
                pattern = ""
        if not (pattern and equals):
            raise ConfigError(
                f"--override: not usable. Got {text!r}. Expected PATTERN=WHAT[,WHAT...] with 2, 3, 4, 5, 6, 8, a width "
                "and a group size as 4g64, or 16, for example '*.down_proj=6,8'. Correct it."
            )
        return cls(pattern, tuple(names))

    def __str__(self) -> str:
        """Return it as it may be asked for."""
        return f"{self.pattern}={','.join(self.names)}"

    def matches(self, names: Iterable[str]) -> bool:
        """Return whether the pattern means one of some names, each with or without ``.weight``."""
        return bool(matching(self.pattern, (name.removesuffix(".weight") for name in names)))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What one module gets.

    Attributes:
        name: Name of its weight in mlx-lm.
        shape: Sizes of the weight's dimensions, outermost first.
        dtype: Of the weight before it is quantized, and of scales, as torch calls it.
        linears: Full names of the linears, in Transformers, that it is made of.
        scheme: Name of the scheme; None leaves it as it is.
        damage_nats: Predicted damage, nats per token.
    """

    name: str
    shape: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=2)]
    dtype: str
    linears: tuple[str, ...]
    scheme: str | None
    damage_nats: Number

    def __post_init__(self) -> None:
        """Check the scheme.

        Raises:
            ValueError: There is no such scheme, or rows are not whole groups of it.
        """
        kind = self.kind
        if self.scheme is not None and (kind is None or not kind.fits(self.shape[-1])):
            raise ValueError("scheme must be one of MLX's, with rows of whole groups of it")

    @property
    def kind(self) -> Scheme | None:
        """The scheme; None if it stays as it is."""
        return None if self.scheme is None else scheme_named(self.scheme)

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return self._stored.weights

    @property
    def stored_bytes(self) -> int:
        """Size of its tensors."""
        return stored_bytes(self._stored, self.kind)

    @property
    def _stored(self) -> StoredTensor:
        return StoredTensor(shape=self.shape, dtype=self.dtype)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MlxPlan(TensorsPlan[TensorPlan]):
    """Schemes of a whole model.

    Attributes:
        tensors: All modules that can be quantized, in model order, the token embeddings last; the rest is as in
            ``TensorsPlan``.
    """

    format: ClassVar[str] = "mlx"
    tensors: Annotated[tuple[TensorPlan, ...], msgspec.Meta(min_length=1)]
    other_weights: Count
    other_bytes: Count
    target_bytes: Count
    lower_bound_nats: Number
    measurement: str

    @property
    def kinds(self) -> dict[str, Scheme]:
        """Scheme of every module that is quantized, by the name of its weight."""
        return {tensor.name: tensor.kind for tensor in self.tensors if tensor.kind is not None}

    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every module gets and is expected to cost."""
        return tuple(
            LinearCost(
                tensor.name.removesuffix(".weight"),
                8 * tensor.stored_bytes / tensor.weights,
                tensor.damage_nats,
                tensor.weights,
            )
            for tensor in self.tensors
        )

    def shares(self) -> dict[str, float]:
        """Return the share of the planned weights in each scheme, the largest first."""
        counts = {scheme.name: 0 for scheme in SCHEMES} | {UNTOUCHED: 0}
        for tensor in self.tensors:
            counts[tensor.scheme or UNTOUCHED] += tensor.weights
        return {name: count / sum(counts.values()) for name, count in counts.items() if count}

    def identity(self) -> Any:
        """Return the measurement behind the plan, and all schemes."""
        return [self.measurement, [[tensor.name, tensor.scheme] for tensor in self.tensors]]

    def describe(self) -> Description:
        """Return what is in the plan."""
        rows = tuple(
            (
                cost.name,
                " x ".join(map(str, tensor.shape)),
                tensor.scheme or UNTOUCHED,
                f"{cost.bpw:.3f}",
                f"{cost.damage_nats:.2e}",
            )
            for cost, tensor in zip(self.costs(), self.tensors, strict=True)
        )
        return Description(
            kind="MLX plan",
            facts=self.facts,
            table=Table(("module", "shape", "scheme", "bpw", "damage, nats/token"), rows),
            content=self.content(),
        )

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON."""
        derived = {"bpw": self.bpw, "predicted_damage_nats": self.damage_nats}
        write_json(Path(path), checksummed({"bpwise_plan": PLAN_VERSION, "format": "mlx", **derived, **asdict(self)}))

    @classmethod
    def from_json(cls, raw: dict[str, Any], where: str) -> MlxPlan:
        """Return the plan that a file holds; see ``Format.load_plan``.

        Raises:
            FormatError: It is not a plan of this version.
        """
        if raw.get("bpwise_plan") != PLAN_VERSION:
            raise FormatError(f"{where}: not an MLX plan of version {PLAN_VERSION}. Make it again with `bpwise plan`.")
        return check_schema(raw, cls, FormatError, where=where, remedy=_REMEDY)


def stored_bytes(tensor: StoredTensor, scheme: Scheme | None) -> int:
    """Return the size of a weight in a scheme, with its scales and biases; None leaves it as it is."""
    if scheme is None:
        return tensor.weights * tensor.item_bytes
    return tensor.rows * scheme.row_bytes(tensor.shape[-1], tensor.item_bytes)
