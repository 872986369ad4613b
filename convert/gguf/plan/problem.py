"""What every tensor of a GGUF file may become, and what that costs: the allocation problem that a plan solves."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from ....checkpoint.source.linears import Shaped
from ....errors import ConfigError
from ....measure.measurement import Measurement
from ...numerics.allocation import TensorsProblem
from ..file.roles import matrices_of
from ..ggml.types import GgmlType, ggml_type
from .layout import Layout
from .measured import gguf_curves
from .plan import TypeOverride

__all__ = ["Candidate", "PlanProblem", "estimated_problem", "measured_problem", "unmeasured_problem"]

_UNTOUCHED = "F16"
"""Taken for lossless: its damage is far below that of any quantized type."""

_PLAIN = "Q8_0"
"""Of matrices that nothing is known of: its damage is below what evaluation can see."""

_OTHER_BYTES = 4
"""Of a norm's or a bias's weight before there is a file: the converter stores them as F32."""

Damages = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A tensor and what it may become.

    Attributes:
        name: Its name in the file.
        shape: Sizes of its dimensions, outermost first.
        linears: Full names of the linears that it is made of.
        damage_nats: Damage in every type that it may have, nats per token.
        measured: Whether that is known; it is taken for 0 where it is not.
    """

    name: str
    shape: tuple[int, ...]
    linears: tuple[str, ...]
    damage_nats: Mapping[str, float]
    measured: bool = True

    @property
    def weights(self) -> int:
        """Number of its weights."""
        return math.prod(self.shape)

    @property
    def costs(self) -> NDArray[np.float64]:
        """Damage in every type, nats per token."""
        return np.array(list(self.damage_nats.values()))

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Bytes in every type."""
        rows = math.prod(self.shape[:-1])
        return np.array([rows * ggml_type(name).row_bytes(self.shape[-1]) for name in self.damage_nats])


PlanProblem = TensorsProblem[Candidate]
"""Which types a plan chooses from."""


def measured_problem(
    measurement: Measurement, overrides: Sequence[TypeOverride] = (), layout: Layout | None = None
) -> PlanProblem:
    """Return the problem that a measurement poses.

    Args:
        measurement: The measured damages.
        overrides: Types that tensors must have; of several that match, the last.
        layout: The unquantized file that is at hand, with the map of the one measured; None for that one.

    Raises:
        ConfigError: No types were measured, or an override matches nothing or does not fit.
        FormatError: The curves are damaged, or of another version.
    """
    curves = gguf_curves(measurement)
    head, table = measurement.head, measurement.embedding
    damages: dict[str, Damages] = {}
    for linear in (*measurement.linears, head):
        for tensor, damage in curves.damages(linear.name):
            damages[tensor] = damages[tensor] + damage if tensor in damages else damage
    for tensor in curves.layout.rows.tensors_of(table.name):
        damages[tensor] = curves.table_damage_nats
    known = {*(linear.name for linear in measurement.linears), head.name, table.name}
    own = measurement.layer_embedding
    if own is not None:
        known.add(own.name)
        damages |= dict.fromkeys(
            curves.layout.rows.tensors_of(own.name), curves.tensors.tensors[f"{own.name}.damage_nats"]
        )
    return _problem(layout or curves.layout, damages, known, curves.types, overrides)


def unmeasured_problem(
    layout: Layout, matrices: Iterable[str], types: Sequence[str], overrides: Sequence[TypeOverride] = ()
) -> PlanProblem:
    """Return the problem that a file will pose, without damages.

    Args:
        layout: The unquantized file.
        matrices: Names of the linears that are going to be measured, of the head and of the embeddings.
        types: Names of the types that are going to be measured.
        overrides: As ``measured_problem`` takes them.

    Raises:
        ConfigError: An override matches nothing or does not fit.
    """
    known = list(matrices)
    tensors = [tensor for name in known for tensor in layout.rows.tensors_of(name)]
    damages = {tensor: _without_damage(layout.tensors[tensor].shape[-1], types) for tensor in tensors}
    return _problem(layout, damages, known, types, overrides)


def estimated_problem(
    linears: Sequence[Shaped], other_weights: int, types: Sequence[str], overrides: Sequence[TypeOverride] = ()
) -> PlanProblem:
    """Return about the problem that a model will pose, before there is a file of it: as if every linear were a tensor.

    Args:
        linears: Its decoder linears, its head if that is a tensor of its own, and its embeddings: as many inputs as a
            token has channels, an output for each token.
        other_weights: Weights in norms and biases.
        types: Names of the types that are measured.
        overrides: As ``measured_problem`` takes them; what they match is known of linears only.

    Raises:
        ConfigError: An override does not fit.
    """
    candidates = [
        _fitting(x.name, (x.out_features, x.in_features), (x.name,), types, _without_damage(x.in_features, types))
        for x in linears
    ]
    known = [each for each in overrides if any(each.matches(candidate.linears) for candidate in candidates)]
    return PlanProblem(_restricted(candidates, known, types), other_weights, _OTHER_BYTES * other_weights)


def _problem(
    layout: Layout,
    damages: Mapping[str, Damages],
    known: Collection[str],
    types: Sequence[str],
    overrides: Sequence[TypeOverride],
) -> PlanProblem:
    rows, matrices = layout.rows.tensors, set(matrices_of(layout.tensors))
    candidates = [
        _fitting(name, layout.tensors[name].shape, rows[name].linears, types, damage)
        for name, damage in damages.items()
        if name in matrices and set(rows[name].linears) <= set(known)  # otherwise a part of it was not measured
    ]
    measured = {candidate.name for candidate in candidates}
    for name in layout.plain:
        if name not in measured and ggml_type(_PLAIN).fits(layout.tensors[name].shape[-1]):
            linears = rows[name].linears if name in rows else ()
            candidates.append(Candidate(name, layout.tensors[name].shape, linears, {_PLAIN: 0.0}, measured=False))
    rounded = {candidate.name for candidate in candidates}
    others = [each for name, each in layout.tensors.items() if name not in rounded]
    return PlanProblem(
        _restricted(candidates, overrides, types),
        sum(each.weights for each in others),
        sum(each.stored_bytes for each in others),
    )


def _without_damage(row_weights: int, types: Sequence[str]) -> Damages:
    return np.array([0.0 if ggml_type(kind).fits(row_weights) else np.inf for kind in types], dtype=np.float32)


def _fitting(
    name: str, shape: tuple[int, ...], linears: tuple[str, ...], types: Sequence[str], damage: Damages
) -> Candidate:
    fitting = {kind: float(own) for kind, own in zip(types, damage, strict=True) if np.isfinite(own)}
    return Candidate(name, shape, linears, {_UNTOUCHED: 0.0, **fitting})


def _restricted(
    candidates: Sequence[Candidate], overrides: Sequence[TypeOverride], measured: Sequence[str]
) -> tuple[Candidate, ...]:
    # The tensors with the types that overrides leave them.
    matched = [[each for each in overrides if each.matches((x.name, *x.linears))] for x in candidates]
    for override in overrides:
        if not any(override in each for each in matched):
            raise ConfigError(f"--override {override}: no tensor has such a name. `bpwise plan` lists the names.")
    return tuple(
        _overridden(candidate, asked[-1], measured) if asked else candidate
        for candidate, asked in zip(candidates, matched, strict=True)
    )


def _overridden(candidate: Candidate, override: TypeOverride, measured: Sequence[str]) -> Candidate:
    row_weights = candidate.shape[-1]
    fitting = [kind for kind in override.kinds if kind.fits(row_weights)]
    if not fitting:
        least = min(override.kinds, key=lambda kind: kind.block_weights)
        raise ConfigError(
            f"--override {override}: {candidate.name} has rows of {row_weights} weights. Expected "
            f"a multiple of {least.block_weights} for {least.name}. Choose one of {', '.join(candidate.damage_nats)}."
        )
    known = [kind for kind in fitting if _known(kind, candidate, measured)]
    if not known:
        raise ConfigError(
            f"--override {override}: the measurement does not know this type of {candidate.name}. Choose another."
        )
    if not candidate.measured:  # damages are not known, so there is no choosing: it stays as it is where it may
        known = [kind for kind in known if kind.name in candidate.damage_nats] or known
        known = [max(known, key=lambda kind: kind.bits_per_weight)]
    return replace(candidate, damage_nats={kind.name: candidate.damage_nats.get(kind.name, 0.0) for kind in known})


def _known(kind: GgmlType, candidate: Candidate, measured: Sequence[str]) -> bool:
    return not kind.quantized or (kind.name in measured and not (kind.needs_importance and not candidate.measured))
