"""The rounding pass: blocks are quantized one after another, each on the inputs that the quantized ones before it make.

Two streams of hidden states run through the model side by side, the original's and the quantized one's. In every stage
of a block the weight is first moved to where it best reproduces the *original's* output from the *quantized* inputs,
so that the drift of the earlier stages is cancelled and not accumulated, and then rounded with error feedback.

Legend, per stage: X original inputs, Y quantized inputs (tokens, K); W weight (K, out); H = mean y y^T. With T the
original's output and S what Y makes of the unrounded weight, ``argmin ||Y V - T||^2 + ridge ||V - W||^2`` is
``V = W + (H + ridge)^-1 mean y^T (t - s)``. Source: the first step of Qronos (Zhang et al., arXiv 2505.11695),
with the residual stream's own drift included where a stage's output joins it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.checkpoint import Checkpoint
from ..convert.exl2.layout import RowGroup
from ..convert.exl2.linear import QuantizedLinear
from ..convert.work import StageDirectory
from ..errors import ConfigError
from ..measure.calibration import CalibrationSet
from ..measure.families import BLOCK_OUTPUT, HEAD, Stage
from ..measure.measurement import MeasuredLinear, Measurement
from ..measure.run import resolve_device
from ..measure.statistics import tapped_inputs
from ..measure.stream import StreamedModel, check_finite, micro_batches
from ..progress import Progress, silent
from ..rounding.feedback import round_linear
from ..rounding.hessian import damped_solve, inverse_factor
from ..rounding.parallel import run_all
from .plan import LinearPlan, Plan

__all__ = ["RoundConfig", "RoundedModel", "round_model"]

_TAIL_TOKENS = 4096
"""Positions that pass through the final norm at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundConfig:
    """Options of the rounding stage.

    Attributes:
        damping: What is added to the diagonal of every Gram matrix, relative to its mean, dimensionless.
        drift_damping: The same for the correction of drift; infinite for none. It needs far more than rounding does:
            with a few thousand calibration tokens, 0.02 overfits and is worse than no correction on held-out text.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
    """

    damping: float = 0.02
    drift_damping: float = 0.5
    device: str = "auto"

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            ConfigError: One of them makes no sense.
        """
        if not 0 < self.damping < 1:
            raise ConfigError(f"damping must lie between 0 and 1, got {self.damping}.")
        if not self.drift_damping > 0:
            raise ConfigError(f"drift_damping must be positive, got {self.drift_damping}.")


@dataclass(frozen=True, slots=True, eq=False)
class RoundedModel:
    """The quantized linears of a model, on disk until they are asked for.

    Attributes:
        names: Full names of the linears, in model order, the head last.
        pieces: Where they are kept.
    """

    names: tuple[str, ...]
    pieces: StageDirectory

    def linear(self, name: str) -> QuantizedLinear:
        """Return one quantized linear."""
        return _unpack(self.pieces.load(name))

    def damping(self, name: str) -> float:
        """Return the relative damping that the linear's rounding took; infinite if it went without feedback."""
        return float(self.pieces.load(name)["damping"])


def round_model(
    checkpoint: Checkpoint,
    calibration: CalibrationSet,
    measurement: Measurement,
    plan: Plan,
    config: RoundConfig,
    work: Path,
    progress: Progress = silent,
) -> RoundedModel:
    """Quantize every linear as the plan says.

    Args:
        checkpoint: The original model.
        calibration: Token ids, shape (rows, tokens).
        measurement: Gives each linear's row order and output weights.
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
    identity = {
        "model": checkpoint.fingerprint,
        "calibration": calibration.fingerprint,
        "measurement": plan.measurement,
        "groups": [[p.name, p.group_bits, p.group_rows] for p in (*plan.linears, *([plan.head] if plan.head else []))],
        "damping": config.damping,
        # JSON knows no infinity.
        "drift_damping": str(config.drift_damping),
        "device": device.type,
    }
    pieces = StageDirectory(work, "rounded", identity)
    model = StreamedModel(checkpoint, device=device, dtype=torch.float32)
    run = _Rounding(model, calibration.tokens, measurement, plan, config, pieces)
    run.blocks(progress)
    names = [p.name for p in plan.linears]
    if plan.head is not None:
        run.head()
        names.append(HEAD)
    return RoundedModel(tuple(names), pieces)


class _StageReached(Exception):
    """Ends a block's forward at the stage that is being rounded."""


class _Rounding:
    """One run of the rounding stage."""

    def __init__(
        self,
        model: StreamedModel,
        tokens: Tensor,
        measurement: Measurement,
        plan: Plan,
        config: RoundConfig,
        pieces: StageDirectory,
    ) -> None:
        self.model = model
        self.tokens = tokens
        self.plans = {p.name: p for p in (*plan.linears, *([plan.head] if plan.head else []))}
        self.measured = {linear.name: linear for linear in (*measurement.linears, measurement.head)}
        self.config = config
        self.pieces = pieces
        self.batches = micro_batches(*tokens.shape)

    def blocks(self, progress: Progress) -> None:
        """Round all decoder blocks, in order."""
        embedded = self.model.embed(self.tokens)
        state = {"original": embedded, "quantized": embedded}
        finished = max((i for i in range(self.model.block_count) if self.pieces.has(f"state-{i}")), default=-1)
        if finished >= 0:
            state = self.pieces.load(f"state-{finished}")
        for index in progress(range(self.model.block_count), "quantize: round"):
            if index <= finished:
                continue
            state = self._round_block(index, **state)
            self.pieces.save(f"state-{index}", state)
            self.pieces.discard(f"state-{index - 1}")

    def _round_block(self, index: int, original: Tensor, quantized: Tensor) -> dict[str, Tensor]:
        where = self.model.block_name(index)
        with torch.no_grad(), self.model.block(index) as block:
            targets, original = self._run_original(index, block, original)
            for number, stage in enumerate(self.model.family.stages):
                gram, drift = self._compare(index, block, stage, quantized, targets.pop(number))
                shift = self._solved(gram, drift)
                names = self.model.family.linear_names(index, stage)
                tasks = [
                    partial(self._round_linear, name, block.get_submodule(inner), gram, shift, stage.joins is not None)
                    for inner, name in zip(stage.linears, names, strict=True)
                ]
                run_all(tasks, self.model.device)
            output = torch.empty_like(quantized)
            for batch in self.batches:
                output[batch] = self._run(index, quantized, batch).cpu()
            check_finite(output, f"{where}, quantized")
        return {"original": original, "quantized": output}

    def _run(self, index: int, hidden: Tensor, batch: slice) -> Tensor:
        return self.model.run_block(index, hidden[batch].to(self.model.device))

    def _run_original(self, index: int, block: Any, hidden: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        # What every stage should see or make: its original input, or the original sum where it joins the stream.
        kept: dict[int, list[Tensor]] = {}
        outputs = []
        stages = self.model.family.stages
        for batch in self.batches:
            with _taps(block, [_watched(stage) for stage in stages]) as taps:
                output = self._run(index, hidden, batch)
            outputs.append(output.cpu())
            for number, stage in enumerate(stages):
                watched = _watched(stage)
                kept.setdefault(number, []).append((output if watched is None else taps[watched]).cpu())
        output = torch.cat(outputs)
        check_finite(output, self.model.block_name(index))
        return {number: torch.cat(parts) for number, parts in kept.items()}, output

    def _compare(self, index: int, block: Any, stage: Stage, hidden: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Run the quantized stream up to a stage.

        Returns:
            The mean of y y^T, shape (K, K), and the mean of y^T (target - current): for a stage that joins the
            stream, of the sums, shape (K, hidden); else of the inputs, shape (K, K).
        """
        watched = _watched(stage)
        width = block.get_submodule(stage.linears[0]).in_features
        gram = torch.zeros(width, width, device=self.model.device)
        drift = torch.zeros(width, width if stage.joins is None else target.shape[-1], device=self.model.device)
        for batch in self.batches:
            with _taps(block, [stage.linears[0], watched], stop_at=watched) as taps, suppress(_StageReached):
                output = self._run(index, hidden, batch)
            inputs = taps[stage.linears[0]].flatten(0, -2)
            missing = target[batch].to(self.model.device) - (output if watched is None else taps[watched])
            gram.addmm_(inputs.T, inputs)
            drift.addmm_(inputs.T, missing.flatten(0, -2))
        tokens = self.tokens.numel()
        return gram / tokens, drift / tokens

    def _solved(self, gram: Tensor, drift: Tensor) -> Tensor | None:
        if math.isinf(self.config.drift_damping):
            return None
        return damped_solve(gram, drift, self.config.drift_damping)

    def _round_linear(self, name: str, module: Any, gram: Tensor, shift: Tensor | None, joins: bool) -> None:
        linear = self._rounded(self.plans[name], _shifted(module.weight, shift, joins), gram)
        module.weight.copy_(linear.dequantize().to(module.weight))

    def head(self) -> None:
        """Round the output head on what the quantized decoder gives it."""
        if self.pieces.has(HEAD):
            return
        state = self.pieces.load(f"state-{self.model.block_count - 1}")
        with torch.no_grad(), self.model.tail() as head:
            gram = torch.zeros(head.in_features, head.in_features, device=self.model.device)
            drift = torch.zeros_like(gram)
            original, quantized = (state[key].flatten(0, 1) for key in ("original", "quantized"))
            for first in range(0, len(original), _TAIL_TOKENS):
                positions = slice(first, first + _TAIL_TOKENS)
                wanted, inputs = (self._head_input(head, hidden[None, positions]) for hidden in (original, quantized))
                gram.addmm_(inputs.T, inputs)
                drift.addmm_(inputs.T, wanted - inputs)
            tokens = len(original)
            gram, drift = gram / tokens, drift / tokens
            target = _shifted(head.weight, self._solved(gram, drift), False)
        run_all([partial(self._rounded, self.plans[HEAD], target, gram)], self.model.device)

    def _head_input(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        with _taps(head, [""], stop_at="") as taps, suppress(_StageReached):
            self.model.logits(hidden.to(self.model.device))
        return taps[""].flatten(0, -2)

    def _rounded(self, plan: LinearPlan, target: Tensor, gram: Tensor) -> QuantizedLinear:
        measured = self.measured[plan.name]
        order = _stored_order(plan, measured).to(target.device)
        factor = inverse_factor(gram[order][:, order], self.config.damping)
        fisher = torch.from_numpy(measured.fisher).to(target.device)
        linear, _ = round_linear(target, factor.upper, plan.stored_groups, order, fisher)
        linear.validate(plan.name)
        self.pieces.save(plan.name, _pack(linear, factor.damping))
        return linear


def _shifted(weight: Tensor, shift: Tensor | None, joins: bool) -> Tensor:
    # The weight [inputs, outputs], moved by `shift`: itself where the stage joins the stream, else times the weight.
    plain = weight.detach().T.float()
    if shift is None:
        return plain
    return plain + shift if joins else torch.addmm(plain, shift, plain)


def _stored_order(plan: LinearPlan, measured: MeasuredLinear) -> Tensor:
    # The measured row order, its groups rearranged by width.
    starts = [0, *itertools.accumulate(plan.group_rows)]
    order = torch.from_numpy(measured.order).long()
    return torch.cat([order[starts[g] : starts[g] + plan.group_rows[g]] for g in plan.stored_order])


def _watched(stage: Stage) -> str | None:
    # The submodule whose input shows what the stage reads or, where it joins the residual stream, makes.
    if stage.joins is None:
        return stage.linears[0]
    return None if stage.joins == BLOCK_OUTPUT else stage.joins


@contextmanager
def _taps(module: nn.Module, names: Sequence[str | None], stop_at: str | None = None) -> Iterator[dict[str, Tensor]]:
    """Keep the latest inputs of submodules; end the forward once ``stop_at`` has been reached."""

    def stop(*_: object) -> None:
        raise _StageReached

    with tapped_inputs(module, [name for name in dict.fromkeys(names) if name is not None]) as taps:
        handle = None if stop_at is None else module.get_submodule(stop_at).register_forward_pre_hook(stop)
        try:
            yield taps
        finally:
            if handle is not None:
                handle.remove()


def _pack(linear: QuantizedLinear, damping: float) -> dict[str, Tensor]:
    return {
        "groups": torch.tensor([[group.bits, group.rows] for group in linear.groups]),
        "codes": linear.codes,
        "scale_codes": linear.scale_codes,
        "ceilings": linear.ceilings,
        "order": linear.order,
        "damping": torch.tensor(damping),
    }


def _unpack(tensors: dict[str, Tensor]) -> QuantizedLinear:
    return QuantizedLinear(
        groups=tuple(RowGroup(bits, rows) for bits, rows in tensors["groups"].tolist()),
        codes=tensors["codes"],
        scale_codes=tensors["scale_codes"],
        ceilings=tensors["ceilings"],
        order=tensors["order"],
    )
