"""Rounding to EXL2: every linear as its plan says, through the rounding pass."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ....checkpoint.files.resume import ResumeStore
from ....checkpoint.model.families import HEAD
from ....checkpoint.source.checkpoint import Checkpoint
from ....checkpoint.source.language import LanguageModel, WeightOverlay, language_model
from ....linalg.hessian import inverse_factor
from ....measure.measurement import MeasuredLinear, Measurement
from ....measure.model.stream import StreamedModel
from ....measure.run import kept_inputs, resolve_device
from ....progress import Progress, silent
from ....quantize.rounding.rounding_pass import ROUNDED, RoundingPass
from ... import rounded as any_format
from ...rounded import Drift, rounding_damping
from ..file.layout import RowGroup
from ..file.linear import QuantizedLinear
from ..plan.plan import LinearPlan, Plan
from .coupling import OutputFeedback
from .feedback import round_linear_
from .tuning import tune_scales

__all__ = ["RoundConfig", "RoundedModel", "round_model", "rounded_before", "rounding_identity", "tune_model"]

_TUNED = "tuned"
"""Piece with what tuning found."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundConfig:
    """Options of the rounding stage.

    Attributes:
        correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
        couple_outputs: Whether outputs answer to each other's errors.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
        offload_dir: Directory for files with the hidden states of all rows; None keeps them in memory.
    """

    correct_drift: bool = True
    couple_outputs: bool = True
    device: str = "auto"
    offload_dir: Path | None = None


@dataclass(frozen=True, slots=True, eq=False)
class RoundedModel:
    """The quantized linears of a model, on disk until they are asked for.

    Attributes:
        names: Full names of the linears, in model order, the head last.
        blocks: Number of decoder blocks.
        artifacts: Where they are kept.
        source: The original.
        tuned: What tuning multiplies the largest scales of the decoder's linears by, float32, shape (groups,); empty
            without.
    """

    names: tuple[str, ...]
    blocks: int
    artifacts: ResumeStore
    source: LanguageModel
    tuned: Mapping[str, Tensor] = field(default_factory=dict)

    def linear(self, name: str) -> QuantizedLinear:
        """Return one quantized linear, as it is to be written.

        Readers do not reorder the biases of an MLP along with the rows of its last linear. In an MLP that has some, the
        neurons themselves are reordered instead, which changes nothing for the model around it.
        """
        linear = _unpack(self.artifacts.load(name))
        if name in self.tuned:
            linear = replace(linear, max_scales=(linear.max_scales.float() * self.tuned[name]).half())
        makers, reader = self.source.family.mlp
        block = next((name.removesuffix(x) for x in (*makers, reader) if name.endswith(f".{x}")), None)
        if block is None or f"{block}{makers[0]}.bias" not in self.source.names:
            return linear
        if name == block + reader:
            return replace(linear, order=torch.arange(linear.in_features))
        neurons = self.artifacts.load(block + reader)["order"]
        return replace(
            linear,
            codes=linear.codes[:, neurons],
            scale_codes=linear.scale_codes[:, neurons],
            bias=self.source.tensor(f"{name}.bias")[neurons].half(),
        )

    def decoded(self, name: str, device: torch.device) -> Tensor:
        """Return the weight that a reader makes of a linear before tuning, its rows in the original's order.

        Float16, shape (out, K), on the device.
        """
        return _unpack({key: value.to(device) for key, value in self.artifacts.load(name).items()}).dequantize()

    def damping(self, name: str) -> float:
        """Return the relative damping that the linear's rounding took; infinite if it went without feedback."""
        damping = self.artifacts.number(name, "damping")
        assert damping is not None
        return damping

    def drift(self) -> list[Drift]:
        """Return how far the hidden states after every block are from the original's, over the calibration rows."""
        return any_format.RoundedModel(self.names, self.blocks, self.artifacts).drift()


def rounding_identity(checkpoint: Checkpoint, plan: Plan, config: RoundConfig) -> dict[str, Any]:
    """Return all that the artifacts of ``round_model`` depend on, as ``ResumeStore`` takes it."""
    return {
        "model": checkpoint.fingerprint,
        "measurement": plan.measurement,
        "groups": [[p.name, p.group_bits, p.group_rows] for p in (*plan.linears, *([plan.head] if plan.head else []))],
        "correct_drift": config.correct_drift,
        "couple_outputs": config.couple_outputs,
        "device": resolve_device(config.device).type,
    }


def round_model(
    checkpoint: Checkpoint,
    measurement: Measurement,
    plan: Plan,
    config: RoundConfig,
    work: Path,
    progress: Progress = silent,
) -> RoundedModel:
    """Quantize every linear as the plan says.

    Args:
        checkpoint: The original model.
        measurement: Gives the calibration rows, and each linear's row order, output and token weights.
        plan: Gives each row group's width.
        config: Options.
        work: Work directory; finished blocks in it are not done again.
        progress: Wraps the blocks.

    Returns:
        The quantized linears.

    Raises:
        NumericalError: NaN or infinity in activations.
    """
    device = resolve_device(config.device)
    artifacts = ResumeStore(work, ROUNDED, rounding_identity(checkpoint, plan, config))
    source = language_model(checkpoint)
    model = StreamedModel(source, device=device, dtype=torch.float32, offload_dir=config.offload_dir)
    rounder: Any = _Exl2Rounder(plan, couple_outputs=config.couple_outputs)
    run = RoundingPass(
        model,
        measurement,
        rounder,
        artifacts,
        correct_drift=config.correct_drift,
        inputs=kept_inputs(work, measurement),
    )
    run.blocks(progress)
    names = [p.name for p in plan.linears]
    if plan.head is not None:
        run.head()
        names.append(HEAD)
    return RoundedModel(tuple(names), model.block_count, artifacts, source)


def rounded_before(checkpoint: Checkpoint, plan: Plan, config: RoundConfig, work: Path) -> RoundedModel | None:
    """Return what an earlier run rounded that was cut off before its end, None if that is not there, or not all of it.

    Args:
        checkpoint: As for ``round_model``.
        plan: As for ``round_model``.
        config: As for ``round_model``.
        work: As for ``round_model``.
    """
    artifacts = ResumeStore.existing(work, ROUNDED, rounding_identity(checkpoint, plan, config))
    source = language_model(checkpoint)
    names = (*(p.name for p in plan.linears), *([] if plan.head is None else [HEAD]))
    drifts = [f"drift-{index}" for index in range(source.block_count)]
    if artifacts is None or not all(map(artifacts.has, [*names, *drifts])):
        return None
    return RoundedModel(names, source.block_count, artifacts, source)


def tune_model(
    rounded: RoundedModel, measurement: Measurement, config: RoundConfig, progress: Progress = silent
) -> RoundedModel:
    """Fit the scales of the decoder's row groups to what the original predicts (see ``tuning``).

    Args:
        rounded: What ``round_model`` made, in the same run.
        measurement: Gives the calibration rows.
        config: Where to run, and where states are kept.
        progress: Wraps the steps.

    Returns:
        The same linears with other largest scales; the head stays as it is.

    Raises:
        NumericalError: NaN or infinity in activations or gradients.
    """
    artifacts, device = rounded.artifacts, resolve_device(config.device)
    if not artifacts.has(_TUNED):
        source = WeightOverlay(
            rounded.source.base, {name: partial(rounded.decoded, name, device) for name in rounded.names}
        )
        original, quantized = (
            StreamedModel(each, device=device, dtype=torch.float32, offload_dir=config.offload_dir)
            for each in (rounded.source, source)
        )
        groups = {name: _unpack(artifacts.load(name)).group_of_input for name in rounded.names if name != HEAD}
        tokens = torch.from_numpy(measurement.tokens).long()
        states = any_format.RoundedModel(rounded.names, rounded.blocks, artifacts).last_states(config.offload_dir)
        wanted = states["original"]
        artifacts.save(_TUNED, tune_scales(original, quantized, groups, tokens, wanted, artifacts, progress))
    return replace(rounded, tuned=artifacts.load(_TUNED))


class _Exl2Rounder:
    """Rounds single linears to EXL2."""

    def __init__(self, plan: Plan, *, couple_outputs: bool) -> None:
        self._plans = {p.name: p for p in (*plan.linears, *([plan.head] if plan.head else []))}
        self._couple_outputs = couple_outputs
        self.unquantized = frozenset(linear.name for linear in plan.kept)

    def round_linear(self, measured: MeasuredLinear, target: Tensor, gram: Tensor) -> dict[str, Tensor]:
        """See ``Rounder``."""
        plan = self._plans[measured.name]
        order = _stored_order(plan, measured).to(target.device)
        factor = inverse_factor(gram, rounding_damping(measured), order=order)
        fisher = torch.from_numpy(measured.fisher).to(target.device)
        outputs = OutputFeedback.of(fisher, torch.from_numpy(measured.coupling)) if self._couple_outputs else None
        linear, _ = round_linear_(target, factor.upper, plan.stored_groups, order, fisher, outputs)
        linear.validate(plan.name)
        return _pack(linear, factor.damping)

    def decoded(self, name: str, kept: dict[str, Tensor]) -> Tensor:
        """See ``Rounder``."""
        return _unpack(kept).dequantize()


def _stored_order(plan: LinearPlan, measured: MeasuredLinear) -> Tensor:
    # The measured row order, its groups rearranged by width.
    starts = [0, *itertools.accumulate(plan.group_rows)]
    order = torch.from_numpy(measured.order).long()
    return torch.cat([order[starts[g] : starts[g] + plan.group_rows[g]] for g in plan.stored_order])


def _pack(linear: QuantizedLinear, damping: float) -> dict[str, Tensor]:
    return {
        "groups": torch.tensor([[group.bits, group.rows] for group in linear.groups]),
        "codes": linear.codes,
        "scale_codes": linear.scale_codes,
        "max_scales": linear.max_scales,
        "order": linear.order,
        "damping": torch.tensor(damping),
    }


def _unpack(tensors: dict[str, Tensor]) -> QuantizedLinear:
    return QuantizedLinear(
        groups=tuple(RowGroup(bits, rows) for bits, rows in tensors["groups"].tolist()),
        codes=tensors["codes"],
        scale_codes=tensors["scale_codes"],
        max_scales=tensors["max_scales"],
        order=tensors["order"],
    )
