"""What every module of a model may become, and what that costs: the allocation problem that a plan solves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ....errors import ConfigError
from ....measure.measurement import Measurement
from ...numerics.allocation import TensorsProblem
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
    def weights(self) -> int:
        return self.tensor.weights

    @property
    def costs(self) -> NDArray[np.float64]:
        return np.array(list(self.damages.values())).clip(min=0)

    @property
    def sizes(self) -> NDArray[np.int64]:
        return np.array([stored_bytes(self.tensor, scheme_named(name)) for name in self.damages])


PlanProblem = TensorsProblem[_Candidate]
"""Which schemes a plan chooses from."""


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
                dtype=each.tensor.dtype,
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
