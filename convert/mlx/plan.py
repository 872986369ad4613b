"""The plan of an MLX model: which scheme every module gets, and which stay as they are. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar

import msgspec
import numpy as np

from ...checkpoint.files.atomic import write_json
from ...checkpoint.files.schemas import Count, Number, Positive, check_schema, checksummed
from ...errors import BudgetError, ConfigError, FormatError
from ...linalg.knapsack import choose
from ...measure.measurement import Measurement
from ...tables import Table
from ..model import Description
from ..plan import LinearCost, Plan, shown_range
from .grid.schemes import SCHEMES, Scheme, scheme_named
from .layout import Layout, StoredTensor
from .measured import mlx_curves

__all__ = ["PLAN_VERSION", "MlxPlan", "Override", "PlanProblem", "TensorPlan", "make_mlx_plan", "plan_problem"]

PLAN_VERSION = 1

_UNTOUCHED = "16"
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
            names += found or ([_UNTOUCHED] if each == _UNTOUCHED else [])
            if not found and each != _UNTOUCHED:
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
        return _stored_bytes(self.stored, self.kind)


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
        counts = {scheme.name: 0 for scheme in SCHEMES} | {_UNTOUCHED: 0}
        for tensor in self.tensors:
            counts[tensor.scheme or _UNTOUCHED] += tensor.stored.weights
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
                tensor.scheme or _UNTOUCHED,
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


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A module and what it may become: names of schemes, ``16`` among them, with the damage of each."""

    name: str
    tensor: StoredTensor
    damages: dict[str, float]

    @property
    def sizes(self) -> list[int]:
        return [_stored_bytes(self.tensor, scheme_named(name)) for name in self.damages]


@dataclass(frozen=True, slots=True)
class PlanProblem:
    """What a plan chooses from.

    Attributes:
        candidates: All modules that can be quantized.
        other_weights: Weights in all other tensors.
        other_bytes: Size of these.
    """

    candidates: tuple[_Candidate, ...]
    other_weights: int
    other_bytes: int

    @property
    def weights(self) -> int:
        """Number of all weights."""
        return sum(candidate.tensor.weights for candidate in self.candidates) + self.other_weights

    @property
    def size_range(self) -> tuple[int, int]:
        """The fewest and the most bytes that all tensors can take."""
        least, most = (sum(edge(each.sizes) for each in self.candidates) for edge in (min, max))
        return self.other_bytes + least, self.other_bytes + most

    def target_bytes(self, *, bpw: float | None, tensor_bytes: int | None) -> int:
        """Return how many bytes all tensors may take; one of the two is given.

        Raises:
            BudgetError: No plan is that small.
        """
        # Bits per weight are decimal numbers, just short of the whole number of bytes that they stand for.
        target = int(bpw * self.weights / 8 + 1e-3) if bpw is not None else tensor_bytes or 0
        least, most = self.size_range
        if target < least:
            low, high = (8 * size / self.weights for size in (least, most))
            raise BudgetError(
                f"{target} bytes of tensors ({8 * target / self.weights:.4f} bits per weight) cannot be reached: this "
                f"model can have from {least} to {most}, that is {shown_range(low, high)} bits per weight. Ask for a "
                "size in this range."
            )
        return target


def plan_problem(
    layout: Layout,
    damages: dict[str, Sequence[float]],
    schemes: Sequence[Scheme] = SCHEMES,
    overrides: Sequence[Override] = (),
) -> PlanProblem:
    """Return the problem that a model poses.

    Args:
        layout: Its modules.
        damages: Damage in each scheme of every linear, and of the token embeddings, by name; not finite where a scheme
            does not fit.
        schemes: What the damages are of.
        overrides: Schemes that modules may have; of several that match, the last.

    Raises:
        ConfigError: An override matches nothing, or does not fit.
    """
    candidates = []
    order = {name: place for place, name in enumerate(damages)}
    known = [name for name in layout.quantizable if all(x in damages for x in layout.tensors[name].linears)]
    for name in sorted(known, key=lambda name: order[layout.tensors[name].linears[0]]):
        tensor = layout.tensors[name]
        sums = np.sum([damages[linear] for linear in tensor.linears], axis=0)
        fitting = {x.name: float(own) for x, own in zip(schemes, sums, strict=True) if np.isfinite(own)}
        candidates.append(_Candidate(name, tensor, {_UNTOUCHED: 0.0, **fitting}))
    others = [tensor for name, tensor in layout.tensors.items() if name not in known]
    return PlanProblem(
        _restricted(candidates, overrides),
        sum(tensor.weights for tensor in others),
        sum(tensor.weights * tensor.item_bytes for tensor in others),
    )


def make_mlx_plan(
    measurement: Measurement,
    *,
    bpw: float | None = None,
    tensor_bytes: int | None = None,
    overrides: Sequence[Override] = (),
) -> MlxPlan:
    """Choose a scheme for every module.

    Args:
        measurement: The measured damages.
        bpw: Bits per weight over all tensors; met from below, never exceeded.
        tensor_bytes: The same as a number of bytes; one of the two is given.
        overrides: Schemes that modules may have; of several that match, the last.

    Returns:
        The plan of least predicted damage.

    Raises:
        BudgetError: No plan is that small; the message gives the range that there is.
        ConfigError: MLX was not measured, or an override matches nothing or does not fit.
    """
    curves = mlx_curves(measurement)
    damages = {name: list(map(float, own)) for name, own in curves.damages.items()}
    problem = plan_problem(curves.layout, damages, curves.schemes, overrides)
    target = problem.target_bytes(bpw=bpw, tensor_bytes=tensor_bytes)
    costs = [np.array(list(each.damages.values())).clip(min=0) for each in problem.candidates]
    sizes = [np.array(each.sizes) for each in problem.candidates]
    chosen = choose(costs, sizes, target - problem.other_bytes)
    tensors = []
    for each, option in zip(problem.candidates, chosen.options, strict=True):
        name = list(each.damages)[option]
        tensors.append(
            TensorPlan(
                name=each.name,
                shape=each.tensor.shape,
                item_bytes=each.tensor.item_bytes,
                linears=each.tensor.linears,
                scheme=None if name == _UNTOUCHED else name,
                damage_nats=each.damages[name],
            )
        )
    return MlxPlan(
        tensors=tuple(tensors),
        other_weights=problem.other_weights,
        other_bytes=problem.other_bytes,
        target_bytes=target,
        lower_bound_nats=chosen.lower_bound,
        measurement=measurement.fingerprint,
    )


def _stored_bytes(tensor: StoredTensor, scheme: Scheme | None) -> int:
    if scheme is None:
        return tensor.weights * tensor.item_bytes
    return tensor.rows * scheme.row_bytes(tensor.shape[-1], tensor.item_bytes)


def _restricted(candidates: Sequence[_Candidate], overrides: Sequence[Override]) -> tuple[_Candidate, ...]:
    found = []
    matched = set[Override]()
    for candidate in candidates:
        asked = [each for each in overrides if each.matches((candidate.name, *candidate.tensor.linears))]
        matched.update(asked)
        left = {name: own for name, own in candidate.damages.items() if not asked or name in asked[-1].names}
        if not left:
            raise ConfigError(
                f"--override {asked[-1]}: {candidate.name} has {candidate.tensor.shape[-1]} input channels. Expected a "
                f"multiple of the group size. Choose one of {', '.join(candidate.damages)}."
            )
        found.append(replace(candidate, damages=left))
    for override in overrides:
        if override not in matched:
            raise ConfigError(f"--override {override}: no module has such a name. `bpwise plan` lists the names.")
    return tuple(found)
