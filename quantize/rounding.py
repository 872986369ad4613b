"""The rounding pass: blocks are quantized one after another, each on the inputs that the quantized ones before it make.

Two streams of hidden states run through the model side by side, the original's and the quantized one's. In every stage
of a block the weight is first moved to where it best reproduces the *original's* output from the *quantized* inputs,
so that the drift of the earlier stages is cancelled and not accumulated (``drift``), and then rounded with error
feedback.
"""

from __future__ import annotations

import itertools
import math
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
from ..measure.families import BLOCK_OUTPUT, HEAD, Stage
from ..measure.heldout import DAMPINGS
from ..measure.measurement import MeasuredLinear, Measurement
from ..measure.run import resolve_device
from ..measure.statistics import tapped_inputs
from ..measure.stream import StreamedModel, check_finite, micro_batches
from ..progress import Progress, silent
from ..rounding.coupling import OutputFeedback
from ..rounding.feedback import round_linear
from ..rounding.hessian import inverse_factor
from ..rounding.parallel import run_all
from .drift import StageSums
from .plan import LinearPlan, Plan
from .stepped import SteppedForwards

__all__ = ["Drift", "RoundConfig", "RoundedModel", "round_model"]

_TINY = 1e-30


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundConfig:
    """Options of the rounding stage.

    Attributes:
        correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
        couple_outputs: Whether outputs answer to each other's errors.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps``, or ``auto`` for the best at hand.
    """

    correct_drift: bool = True
    couple_outputs: bool = True
    device: str = "auto"


@dataclass(frozen=True, slots=True, eq=False)
class RoundedModel:
    """The quantized linears of a model, on disk until they are asked for.

    Attributes:
        names: Full names of the linears, in model order, the head last.
        blocks: Number of decoder blocks.
        pieces: Where they are kept.
    """

    names: tuple[str, ...]
    blocks: int
    pieces: StageDirectory

    def linear(self, name: str) -> QuantizedLinear:
        """Return one quantized linear."""
        return _unpack(self.pieces.load(name))

    def damping(self, name: str) -> float:
        """Return the relative damping that the linear's rounding took; infinite if it went without feedback."""
        return float(self.pieces.load(name)["damping"])

    def drift(self) -> list[Drift]:
        """Return how far the hidden states after every block are from the original's, over the calibration rows."""
        kept = (self.pieces.load(f"drift-{index}")["drift"].tolist() for index in range(self.blocks))
        return [Drift(first_token=first, other_tokens=others) for first, others in kept]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Distance of hidden states from the original's, relative to their norm, as root mean squares over tokens.

    Attributes:
        first_token: Of the first token of every row, whose activations are by far the largest in many models.
        other_tokens: Of all others.
    """

    first_token: float
    other_tokens: float


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
    identity = {
        "model": checkpoint.fingerprint,
        "measurement": plan.measurement,
        "groups": [[p.name, p.group_bits, p.group_rows] for p in (*plan.linears, *([plan.head] if plan.head else []))],
        "correct_drift": config.correct_drift,
        "couple_outputs": config.couple_outputs,
        "device": device.type,
    }
    pieces = StageDirectory(work, "rounded", identity)
    model = StreamedModel(checkpoint, device=device, dtype=torch.float32)
    run = _Rounding(model, measurement, plan, config, pieces)
    run.blocks(progress)
    names = [p.name for p in plan.linears]
    if plan.head is not None:
        run.head()
        names.append(HEAD)
    return RoundedModel(tuple(names), model.block_count, pieces)


class _HeadReached(Exception):
    """Ends a forward pass before the head's large product."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class _Rounding:
    """One run of the rounding stage."""

    def __init__(
        self,
        model: StreamedModel,
        measurement: Measurement,
        plan: Plan,
        config: RoundConfig,
        pieces: StageDirectory,
    ) -> None:
        self.model = model
        self.tokens = torch.from_numpy(measurement.tokens).long()
        self.plans = {p.name: p for p in (*plan.linears, *([plan.head] if plan.head else []))}
        self.measured = {linear.name: linear for linear in (*measurement.linears, measurement.head)}
        self.config = config
        self.pieces = pieces
        self.batches = micro_batches(*self.tokens.shape)

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
            self.pieces.save(f"drift-{index}", {"drift": _drift(**state)})
            self.pieces.save(f"state-{index}", state)
            self.pieces.discard(f"state-{index - 1}")

    def _round_block(self, index: int, original: Tensor, quantized: Tensor) -> dict[str, Tensor]:
        family = self.model.family
        with torch.no_grad(), self.model.block(index) as block:
            targets, original = self._run_original(index, block, original)
            runs = [partial(self._run, index, quantized, batch) for batch in self.batches]
            joins = [stage.joins for stage in family.stages if stage.joins]
            with SteppedForwards(block, [stage.linears[0] for stage in family.stages], joins, runs) as forwards:
                stream = ""
                for number, stage in enumerate(family.stages):
                    names = family.linear_names(index, stage)
                    modules = [block.get_submodule(inner) for inner in stage.linears]
                    weights = self._token_weights(names[0])
                    sums = StageSums(modules[0], stage, self.model.device)
                    for position, batch in enumerate(self.batches):
                        seen = forwards.advance(position)
                        base = seen[stream] if stream else self._on_device(quantized[batch])
                        sums.add(batch.start, seen[stage.linears[0]], targets[number][batch], base, weights[batch])
                    del targets[number]
                    gram, shift = sums.solved(correct_drift=self.config.correct_drift)
                    tasks = [
                        partial(self._round_linear, name, module, gram, shift, stage.joins is not None)
                        for name, module in zip(names, modules, strict=True)
                    ]
                    run_all(tasks, self.model.device)
                    stream = stage.joins or stream
                output = torch.empty_like(quantized)
                for position, batch in enumerate(self.batches):
                    output[batch] = forwards.finish(position).cpu()
            check_finite(output, f"{self.model.block_name(index)}, quantized")
        return {"original": original, "quantized": output}

    def _on_device(self, hidden: Tensor) -> Tensor:
        return hidden.to(self.model.device)

    def _token_weights(self, linear: str) -> Tensor:
        return self._on_device(torch.from_numpy(self.measured[linear].token_weights)).float()

    def _run(self, index: int, hidden: Tensor, batch: slice) -> Tensor:
        return self.model.run_block(index, self._on_device(hidden[batch]))

    def _run_original(self, index: int, block: Any, hidden: Tensor) -> tuple[dict[int, Tensor], Tensor]:
        # What every stage should see or make: its original input, or the original sum where it joins the stream.
        kept: dict[int, list[Tensor]] = {}
        outputs = []
        stages = self.model.family.stages
        watched = [stage.linears[0] if stage.joins is None else stage.joins for stage in stages]
        for batch in self.batches:
            with tapped_inputs(block, [name for name in watched if name != BLOCK_OUTPUT]) as taps:
                output = self._run(index, hidden, batch)
            outputs.append(output.cpu())
            for number, name in enumerate(watched):
                kept.setdefault(number, []).append(output.cpu() if name == BLOCK_OUTPUT else taps[name].cpu())
        output = torch.cat(outputs)
        check_finite(output, self.model.block_name(index))
        return {number: torch.cat(parts) for number, parts in kept.items()}, output

    def _round_linear(self, name: str, module: Any, gram: Tensor, shift: Tensor | None, joins: bool) -> None:
        linear = self._rounded(self.plans[name], _shifted(module.weight, shift, joins), gram)
        module.weight.copy_(linear.dequantize().to(module.weight))

    def head(self) -> None:
        """Round the output head on what the quantized decoder gives it."""
        if self.pieces.has(HEAD):
            return
        state = self.pieces.load(f"state-{self.model.block_count - 1}")
        with torch.no_grad(), self.model.tail() as head:
            sums = StageSums(head, Stage((HEAD,)), self.model.device)
            weights = self._token_weights(HEAD)
            for batch in self.batches:
                wanted, inputs = (self._head_input(head, state[key][batch]) for key in ("original", "quantized"))
                sums.add(batch.start, inputs, wanted, inputs, weights[batch])
            gram, shift = sums.solved(correct_drift=self.config.correct_drift)
            target = _shifted(head.weight, shift, False)
        run_all([partial(self._rounded, self.plans[HEAD], target, gram)], self.model.device)

    def _head_input(self, head: nn.Linear, hidden: Tensor) -> Tensor:
        def stop(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            raise _HeadReached(args[0])

        handle = head.register_forward_pre_hook(stop)
        try:
            self.model.logits(self._on_device(hidden))
        except _HeadReached as reached:
            return reached.inputs
        finally:
            handle.remove()
        raise AssertionError("the model calls its head")

    def _rounded(self, plan: LinearPlan, target: Tensor, gram: Tensor) -> QuantizedLinear:
        measured = self.measured[plan.name]
        order = _stored_order(plan, measured).to(target.device)
        damping = measured.damping if math.isfinite(measured.damping) else DAMPINGS[-1]
        factor = inverse_factor(gram[order][:, order], damping)
        fisher = torch.from_numpy(measured.fisher).to(target.device)
        outputs = OutputFeedback.of(fisher, torch.from_numpy(measured.coupling)) if self.config.couple_outputs else None
        linear, _ = round_linear(target, factor.upper, plan.stored_groups, order, fisher, outputs)
        linear.validate(plan.name)
        self.pieces.save(plan.name, _pack(linear, factor.damping))
        return linear


def _drift(original: Tensor, quantized: Tensor) -> Tensor:
    # Of first and of other tokens, shape (2,).
    errors, sizes = (x.square().sum(dim=-1) for x in (quantized - original, original))
    parts = [(errors[:, :1], sizes[:, :1]), (errors[:, 1:], sizes[:, 1:])]
    return torch.stack([error.sum() / size.sum().clamp(min=_TINY) for error, size in parts]).sqrt()


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
