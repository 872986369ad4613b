"""What every module of a model may become, and what that costs: the allocation problem that a plan solves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ....errors import BudgetError, ConfigError
from ....linalg.knapsack import Choice, choose
from ....measure.measurement import Measurement
from ...plan import shown_range
from ..file.layout import Layout, StoredTensor
from ..grid.schemes import SCHEMES, Scheme, scheme_named
from .measured import mlx_curves
from .plan import UNTOUCHED, MlxPlan, Override, TensorPlan, stored_bytes

__all__ = ["PlanProblem", "make_mlx_plan", "measured_problem", "plan_problem"]


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A module and what it may become: names of schemes, ``16`` among them, with the damage of each."""

    name: str
    tensor: StoredTensor
    damages: dict[str, float]

    @property
    def sizes(self) -> list[int]:
        return [stored_bytes(self.tensor, scheme_named(name)) for name in self.damages]


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

    def best(self, target_bytes: int) -> Choice:
        """Return the choice of least damage, by places in each candidate's ``damages``.

        Args:
            target_bytes: Most bytes that all tensors together may take; as ``target_bytes`` returns it.
        """
        costs = [np.array(list(each.damages.values())).clip(min=0) for each in self.candidates]
        return choose(costs, [np.array(each.sizes) for each in self.candidates], target_bytes - self.other_bytes)


def plan_problem(
    layout: Layout,
    damages: Mapping[str, Sequence[float]],
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
        candidates.append(_Candidate(name, tensor, {UNTOUCHED: 0.0, **fitting}))
    others = [tensor for name, tensor in layout.tensors.items() if name not in known]
    return PlanProblem(
        _restricted(candidates, overrides),
        sum(tensor.weights for tensor in others),
        sum(tensor.weights * tensor.item_bytes for tensor in others),
    )


def measured_problem(measurement: Measurement, overrides: Sequence[Override] = ()) -> PlanProblem:
    """Return the problem that a measurement poses.

    Args:
        measurement: The measured damages.
        overrides: As ``plan_problem`` takes them.

    Raises:
        ConfigError: MLX was not measured, or an override matches nothing or does not fit.
        FormatError: The curves are damaged, or of another version.
    """
    curves = mlx_curves(measurement)
    damages = {name: list(map(float, own)) for name, own in curves.damages.items()}
    return plan_problem(curves.layout, damages, curves.schemes, overrides)


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
    problem = measured_problem(measurement, overrides)
    target = problem.target_bytes(bpw=bpw, tensor_bytes=tensor_bytes)
    chosen = problem.best(target)
    tensors = []
    for each, option in zip(problem.candidates, chosen.options, strict=True):
        name = list(each.damages)[option]
        tensors.append(
            TensorPlan(
                name=each.name,
                shape=each.tensor.shape,
                item_bytes=each.tensor.item_bytes,
                linears=each.tensor.linears,
                scheme=None if name == UNTOUCHED else name,
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
