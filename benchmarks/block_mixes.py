"""Bit allocation of ExLlamaV2's kind: fixed mixes for a whole attention or MLP, scored by that part's output error.

ExLlamaV2 0.3.2 (conversion/measure.py, optimize.py) rounds every part of every block in each of a fixed table of
mixes, scores a mix by the relative Frobenius error of the part's output with the residual stream in it, on inputs of
the unquantized model, and minimises the sum of a power of these errors within the budget. The power is the one, from
1.5 to 3.5, whose solution has the smallest largest error. The tables below are of the same kind, not the same; where
ExLlamaV2 anneals, the choice here is next to optimal, and what is left of the budget is spent, so that this
comparison leans to its side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from baselines import Widths, budget_bits, plan_of, spend
from bpwise.convert.checkpoint import TensorSource
from bpwise.convert.exl2.layout import RowGroup, linear_bits
from bpwise.convert.work import StageDirectory
from bpwise.errors import BudgetError
from bpwise.measure.calibration import CalibrationSet
from bpwise.measure.families import BLOCK_OUTPUT, Family, Stage
from bpwise.measure.measurement import MeasuredLinear, Measurement
from bpwise.measure.statistics import tapped_inputs
from bpwise.measure.stream import StreamedModel, micro_batches
from bpwise.progress import Progress, silent
from bpwise.quantize.allocate import allocate
from bpwise.quantize.plan import Plan
from bpwise.rounding.feedback import round_linear
from bpwise.rounding.hessian import inverse_factor
from torch import Tensor

__all__ = ["ATTENTION_MIXES", "MLP_MIXES", "Mix", "ScoredPart", "Shares", "mixed_plan", "score_mixes"]

_POWERS = tuple(1.5 + 0.1 * step for step in range(21))
"""Powers of the errors that are tried: ExLlamaV2's range."""


@dataclass(frozen=True, slots=True)
class Shares:
    """How one linear is divided.

    Attributes:
        group_rows: Rows of a group.
        shares: Widths and the share of rows that each has, widest first; the shares sum to 1.
    """

    group_rows: int
    shares: tuple[tuple[int, float], ...]

    def groups(self, rows: int) -> list[RowGroup]:
        """Return the row groups of a linear with that many input features: wide shares are rounded up."""
        groups = []
        left = rows
        for bits, share in self.shares:
            count = math.ceil(min(rows * share, left) / self.group_rows)
            for _ in range(count):
                groups.append(RowGroup(bits, min(self.group_rows, left)))
                left -= groups[-1].rows
        return groups


Mix = dict[str, Shares]
"""How each linear of a part is divided, by the last component of its name."""


def _pure(bits: int, group_rows: int = 128) -> Shares:
    return Shares(group_rows, ((bits, 1.0),))


def _two(bits: int, share: float, narrow_bits: int, group_rows: int = 128) -> Shares:
    return Shares(group_rows, ((bits, share), (narrow_bits, 1.0 - share)))


def _attention(queries_keys: Shares, values: Shares, output: Shares) -> Mix:
    return {"q_proj": queries_keys, "k_proj": queries_keys, "v_proj": values, "o_proj": output}


def _mlp(gate: Shares, up: Shares, down: Shares) -> Mix:
    return {"gate_proj": gate, "up_proj": up, "down_proj": down}


ATTENTION_MIXES: tuple[Mix, ...] = (
    _attention(_two(3, 0.1, 2, 64), _two(3, 0.2, 2, 64), _two(3, 0.1, 2, 64)),
    _attention(_two(3, 0.2, 2, 64), _pure(3, 64), _two(3, 0.2, 2, 64)),
    _attention(_pure(3, 64), _two(4, 0.1, 3), _pure(3, 64)),
    _attention(_two(4, 0.15, 3), _two(4, 0.5, 3), _two(4, 0.15, 3)),
    _attention(_pure(4), _pure(4), _pure(4)),
    _attention(_pure(4, 64), _pure(5), _pure(4, 64)),
    _attention(_two(5, 0.2, 4), _pure(5, 64), _two(5, 0.2, 4)),
    _attention(_pure(5), _two(6, 0.2, 5), _pure(5)),
    _attention(_two(6, 0.2, 5), _pure(6), _two(6, 0.2, 5)),
    _attention(_pure(6), _pure(6), _pure(6)),
    _attention(_two(8, 0.1, 6), _pure(8), _two(8, 0.1, 6)),
    _attention(_pure(8), _pure(8), _pure(8)),
)
"""Mixes of an attention, from about 2.2 to 8.1 bits per weight on large matrices."""

MLP_MIXES: tuple[Mix, ...] = (
    _mlp(_two(3, 0.1, 2, 64), _two(3, 0.1, 2, 64), _two(3, 0.3, 2, 64)),
    _mlp(_two(3, 0.2, 2, 64), _two(3, 0.4, 2, 64), _two(4, 0.1, 3, 64)),
    _mlp(_pure(3, 64), _pure(3, 64), _two(4, 0.2, 3, 64)),
    _mlp(_two(4, 0.15, 3), _two(4, 0.3, 3), _two(5, 0.1, 4)),
    _mlp(_pure(4), _pure(4), _two(5, 0.1, 4)),
    _mlp(_two(5, 0.15, 4), _two(5, 0.3, 4), _two(6, 0.1, 5)),
    _mlp(_pure(5), _pure(5), _two(6, 0.1, 5)),
    _mlp(_two(6, 0.15, 5), _two(6, 0.3, 5), _two(8, 0.05, 6)),
    _mlp(_pure(6), _pure(6), _two(8, 0.05, 6)),
    _mlp(_two(8, 0.1, 6), _two(8, 0.1, 6), _two(8, 0.2, 6)),
    _mlp(_two(8, 0.3, 6), _two(8, 0.3, 6), _pure(8)),
    _mlp(_pure(8), _pure(8), _pure(8)),
)
"""Mixes of an MLP, from about 2.3 to 8.1 bits per weight on large matrices."""


@dataclass(frozen=True, slots=True)
class ScoredPart:
    """An attention or an MLP of one block with its scored mixes.

    Attributes:
        linears: Its linears.
        mixes: The mixes.
        bits: Stored bits of every mix.
        errors: Relative Frobenius error of the part's output under every mix, averaged over rows, dimensionless.
    """

    linears: tuple[MeasuredLinear, ...]
    mixes: tuple[Mix, ...]
    bits: tuple[int, ...]
    errors: tuple[float, ...]

    def rising(self) -> list[int]:
        """Return the mixes that no other beats in both bits and error, by rising bits."""
        best = math.inf
        kept = []
        for option in sorted(range(len(self.mixes)), key=lambda i: (self.bits[i], self.errors[i])):
            if self.errors[option] < best:
                best = self.errors[option]
                kept.append(option)
        return kept


def mixed_plan(measurement: Measurement, parts: Sequence[ScoredPart], bpw: float) -> Plan:
    """Choose a mix for every part.

    Args:
        measurement: Gives the decoder's linears in order.
        parts: All parts of all blocks, scored.
        bpw: Decoder bits per weight, overheads included; met from below.

    Returns:
        The plan. What the mixes leave of the budget widens single row groups.

    Raises:
        BudgetError: Not even the smallest mixes fit.
    """
    budget = budget_bits(measurement, bpw)
    if sum(min(part.bits) for part in parts) > budget:
        raise BudgetError(f"{bpw:g} bits per weight: too few for the fixed mixes on this model. Ask for more.")
    chosen = min((_choose(parts, budget, power) for power in _POWERS), key=lambda choice: _largest_error(parts, choice))
    widths = {}
    for part, option in zip(parts, chosen, strict=True):
        for linear in part.linears:
            groups = _groups(part.mixes[option], linear)
            widths[linear.name] = Widths(linear, [g.rows for g in groups], [g.bits for g in groups])
    ordered = [widths[linear.name] for linear in measurement.linears]
    spend(ordered, budget)
    return plan_of(measurement, ordered, bpw)


def _choose(parts: Sequence[ScoredPart], budget: int, power: float) -> list[int]:
    # Parts differ in how many mixes are worth having; the last is repeated, as an option that is never better.
    kept = [part.rising() for part in parts]
    most = max(map(len, kept))
    padded = [[*options, *[options[-1]] * (most - len(options))] for options in kept]
    errors = np.array([[part.errors[i] for i in options] for part, options in zip(parts, padded, strict=True)])
    bits = np.array([[part.bits[i] for i in options] for part, options in zip(parts, padded, strict=True)])
    choice = allocate(errors.astype(np.float64) ** power, bits.astype(np.int64), budget).choice
    return [options[int(i)] for options, i in zip(padded, choice, strict=True)]


def _largest_error(parts: Sequence[ScoredPart], choice: Sequence[int]) -> float:
    return max(part.errors[option] for part, option in zip(parts, choice, strict=True))


def _groups(mix: Mix, linear: MeasuredLinear) -> list[RowGroup]:
    return mix[linear.name.rpartition(".")[2]].groups(linear.in_features)


def score_mixes(
    source: TensorSource,
    calibration: CalibrationSet,
    measurement: Measurement,
    work: Path,
    *,
    score_rows: int,
    damping: float,
    device: torch.device,
    progress: Progress = silent,
) -> list[ScoredPart]:
    """Round every part of every block in every mix and compare its output with the original's.

    Args:
        source: The original model.
        calibration: Token ids; all rows make the Gram matrices.
        measurement: Gives each linear's row order.
        work: Work directory; finished blocks in it are not done again.
        score_rows: Outputs are compared on this many of the first rows.
        damping: Damping of the Gram matrices, relative to the mean of their diagonal.
        device: Where to compute.
        progress: Wraps the blocks.

    Returns:
        The parts, in model order.
    """
    identity = {
        "measurement": measurement.fingerprint,
        "calibration": calibration.fingerprint,
        "score_rows": score_rows,
        "damping": damping,
        "device": device.type,
        "mixes": repr((ATTENTION_MIXES, MLP_MIXES)),
    }
    pieces = StageDirectory(work, "mixes", identity)
    model = StreamedModel(source, device=device, dtype=torch.float32)
    scorer = _Scorer(model, calibration.tokens, measurement, score_rows, damping)
    if not all(pieces.has(f"block-{index}") for index in range(model.block_count)):
        hidden = model.embed(calibration.tokens)
        for index in progress(range(model.block_count), "score fixed mixes"):
            hidden = scorer.run_block(index, hidden, pieces)
    parts = []
    for index in range(model.block_count):
        errors = pieces.load(f"block-{index}")
        for number, (stages, mixes) in enumerate(_parts(model.family)):
            linears = scorer.linears(index, stages)
            bits = [sum(linear_bits(x.out_features, _groups(mix, x)) for x in linears) for mix in mixes]
            parts.append(ScoredPart(linears, mixes, tuple(bits), tuple(errors[str(number)].tolist())))
    return parts


def _parts(family: Family) -> Iterator[tuple[list[Stage], tuple[Mix, ...]]]:
    # A part ends where its output joins the residual stream.
    stages: list[Stage] = []
    for stage in family.stages:
        stages.append(stage)
        if stage.joins is not None:
            is_mlp = "down_proj" in stage.linears[0]
            yield stages, MLP_MIXES if is_mlp else ATTENTION_MIXES
            stages = []


class _Scorer:
    """One run of the scoring."""

    def __init__(
        self, model: StreamedModel, tokens: Tensor, measurement: Measurement, score_rows: int, damping: float
    ) -> None:
        self.model = model
        self.measured = {linear.name: linear for linear in measurement.linears}
        self.batches = micro_batches(*tokens.shape)
        self.score_rows = score_rows
        self.tokens = tokens.numel()
        self.damping = damping

    def linears(self, index: int, stages: Sequence[Stage]) -> tuple[MeasuredLinear, ...]:
        return tuple(self.measured[name] for stage in stages for name in self.model.family.linear_names(index, stage))

    def run_block(self, index: int, hidden: Tensor, pieces: StageDirectory) -> Tensor:
        with torch.no_grad(), self.model.block(index) as block:
            grams, output = self._grams(index, block, hidden)
            if not pieces.has(f"block-{index}"):
                errors = {}
                for number, (stages, mixes) in enumerate(_parts(self.model.family)):
                    errors[str(number)] = self._score(index, block, stages, mixes, hidden, grams)
                pieces.save(f"block-{index}", errors)
        return output

    def _grams(self, index: int, block: Any, hidden: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        # The mean of x x^T of every stage, by its first linear, and the block's output.
        first = [stage.linears[0] for stage in self.model.family.stages]
        grams = {}
        for name in first:
            width = block.get_submodule(name).in_features
            grams[name] = torch.zeros(width, width, device=self.model.device)
        output = torch.empty_like(hidden)
        with tapped_inputs(block, first) as taps:
            for batch in self.batches:
                output[batch] = self.model.run_block(index, hidden[batch].to(self.model.device)).cpu()
                for name in first:
                    inputs = taps[name].flatten(0, -2)
                    grams[name].addmm_(inputs.T, inputs)
        return {name: gram / self.tokens for name, gram in grams.items()}, output

    def _score(
        self,
        index: int,
        block: Any,
        stages: Sequence[Stage],
        mixes: Sequence[Mix],
        hidden: Tensor,
        grams: dict[str, Tensor],
    ) -> Tensor:
        joins = stages[-1].joins
        inner = [name for stage in stages for name in stage.linears]
        names = [name for stage in stages for name in self.model.family.linear_names(index, stage)]
        gram_of = {name: grams[stage.linears[0]] for stage in stages for name in stage.linears}
        modules = [block.get_submodule(name) for name in inner]
        originals = [module.weight.detach().clone() for module in modules]
        reference = self._outputs(index, block, joins, hidden)
        rounded = []
        for name, full, original in zip(inner, names, originals, strict=True):
            rounded.append(self._rounded(original, self.measured[full], gram_of[name], mixes))
        errors = []
        for mix in mixes:
            for name, module, options in zip(inner, modules, rounded, strict=True):
                module.weight.copy_(options[mix[name.rpartition(".")[2]]])
            errors.append(_relative_error(self._outputs(index, block, joins, hidden), reference))
        for module, original in zip(modules, originals, strict=True):
            module.weight.copy_(original)
        return torch.tensor(errors, dtype=torch.float64)

    def _outputs(self, index: int, block: Any, joins: str | None, hidden: Tensor) -> Tensor:
        watched = [] if joins in (None, BLOCK_OUTPUT) else [joins]
        outputs = []
        with tapped_inputs(block, watched) as taps:
            # Whole micro-batches: the model knows what its blocks are called with for these alone.
            for batch in self.batches:
                if batch.start < self.score_rows:
                    output = self.model.run_block(index, hidden[batch].to(self.model.device))
                    outputs.append(taps[watched[0]] if watched else output)
        return torch.cat(outputs)[: self.score_rows]

    def _rounded(
        self, weight: Tensor, measured: MeasuredLinear, gram: Tensor, mixes: Sequence[Mix]
    ) -> dict[Shares, Tensor]:
        order = torch.from_numpy(measured.order).long().to(weight.device)
        upper = inverse_factor(gram[order][:, order], self.damping).upper
        fisher = torch.from_numpy(measured.fisher).to(weight.device)
        role = measured.name.rpartition(".")[2]
        return {
            shares: round_linear(weight.T.float(), upper, shares.groups(weight.shape[1]), order, fisher)[0].dequantize()
            for shares in dict.fromkeys(mix[role] for mix in mixes)
        }


def _relative_error(outputs: Tensor, reference: Tensor) -> float:
    # Both of shape (rows, tokens, hidden): the Frobenius norm of each row, relative, averaged over rows.
    norms = [tensor.flatten(1).norm(dim=1) for tensor in (outputs - reference, reference)]
    return float((norms[0] / norms[1]).mean())
