"""The plan of an MLX model: which scheme every module gets, and which stay as they are. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec

from ....checkpoint.files.atomic import write_json
from ....checkpoint.files.schemas import Count, Number, Positive, check_schema, checksummed
from ....errors import ConfigError, FormatError
from ....tables import Table
from ...model import Description
from ...plan import LinearCost, Plan
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
        bare = (name.removesuffix(".weight") for name in names)
        return any(fnmatchcase(known, self.pattern) for name in bare for known in (name, f"{name}.weight"))


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlan:
    """What one module gets.

    Attributes:
        name: Name of its weight in mlx-lm.
        shape: Sizes of the weight's dimensions, outermost first.
        item_bytes: Bytes of a weight that is not quantized, and of a scale.
        linears: Full names of the linears, in Transformers, that it is made of.
        scheme: Name of the scheme; None leaves it as it is.
        damage_nats: Predicted damage, nats per token.
    """

    name: str
    shape: Annotated[tuple[Positive, ...], msgspec.Meta(min_length=2)]
    item_bytes: Annotated[int, msgspec.Meta(ge=1, le=8)]
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
    def stored(self) -> StoredTensor:
        """The weight before it is quantized."""
        dtype = "float32" if self.item_bytes > 2 else "bfloat16"
        return StoredTensor(shape=self.shape, dtype=dtype, linears=self.linears)

    @property
    def stored_bytes(self) -> int:
        """Size of its tensors."""
        return stored_bytes(self.stored, self.kind)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class MlxPlan(Plan):
    """Schemes of a whole model.

    Attributes:
        tensors: All modules that can be quantized, in model order, the token embeddings last.
        other_weights: Weights in tensors that stay as they are.
        other_bytes: Size of these.
        target_bytes: Most bytes that all tensors together may take.
        lower_bound_nats: No choice within the target has a smaller predicted damage.
        measurement: Fingerprint of the measurement behind the plan.
    """

    format: ClassVar[str] = "mlx"
    tensors: Annotated[tuple[TensorPlan, ...], msgspec.Meta(min_length=1)]
    other_weights: Count
    other_bytes: Count
    target_bytes: Count
    lower_bound_nats: Number
    measurement: str

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors, of those that stay too."""
        return sum(tensor.stored_bytes for tensor in self.tensors) + self.other_bytes

    @property
    def bpw(self) -> float:
        """Bits per weight over all tensors, as mlx-lm counts."""
        weights = sum(tensor.stored.weights for tensor in self.tensors) + self.other_weights
        return 8 * self.stored_bytes / weights

    @property
    def gap(self) -> float:
        """How far the predicted damage may be above the best possible, as a fraction of it."""
        damage = self.damage_nats or 0.0
        return damage / self.lower_bound_nats - 1 if self.lower_bound_nats > 0 else 0.0

    @property
    def kinds(self) -> dict[str, Scheme]:
        """Scheme of every module that is quantized, by the name of its weight."""
        return {tensor.name: tensor.kind for tensor in self.tensors if tensor.kind is not None}

    def costs(self) -> tuple[LinearCost, ...]:
        """Return what every module gets and is expected to cost."""
        return tuple(
            LinearCost(
                tensor.name.removesuffix(".weight"),
                8 * tensor.stored_bytes / tensor.stored.weights,
                tensor.damage_nats,
                tensor.stored.weights,
            )
            for tensor in self.tensors
        )

    def shares(self) -> dict[str, float]:
        """Return the share of the planned weights in each scheme, the largest first."""
        counts = {scheme.name: 0 for scheme in SCHEMES} | {UNTOUCHED: 0}
        for tensor in self.tensors:
            counts[tensor.scheme or UNTOUCHED] += tensor.stored.weights
        return {name: count / sum(counts.values()) for name, count in counts.items() if count}

    def identity(self) -> Any:
        """Return the measurement behind the plan, and all schemes."""
        return [self.measurement, [[tensor.name, tensor.scheme] for tensor in self.tensors]]

    def describe(self) -> Description:
        """Return what is in the plan."""
        shares = ", ".join(f"{name} {100 * share:.1f} %" for name, share in self.shares().items())
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
            facts=(
                f"{self.bpw:.4f} bits per weight over all tensors, {self.stored_bytes / 2**20:.1f} MiB (at most "
                f"{self.target_bytes / 2**20:.1f} MiB asked)",
                f"predicted damage {self.damage_nats:.6f} nats/token (no plan of this size can go below "
                f"{self.lower_bound_nats:.6f})",
                f"weights: {shares}",
            ),
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
