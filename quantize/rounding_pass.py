"""The rounding pass: blocks are quantized one after another, each on the inputs that the quantized ones before it make.

Two streams of hidden states run through the model side by side, the original's and the quantized one's. In every stage
of a block the weight is first moved to where it best reproduces the *original's* output from the *quantized* inputs,
so that the drift of the earlier stages is cancelled and not accumulated (``drift``), and then rounded with error
feedback by a rounder, which knows the format.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..convert.work import StageDirectory
from ..measure.families import BLOCK_OUTPUT, HEAD, Stage
from ..measure.heldout import DAMPINGS
from ..measure.measurement import MeasuredLinear, Measurement
from ..measure.statistics import tapped_inputs
from ..measure.stream import StreamedModel, check_finite, micro_batches
from ..progress import Progress
from ..rounding.parallel import run_all
from .drift import StageSums
from .stepped import SteppedForwards

__all__ = ["Drift", "Rounder", "RoundingPass", "drift_section", "kept_drift", "rounding_damping"]

_TINY = 1e-30


class Rounder(Protocol):
    """Rounds single linears to one format."""

    def round(self, measured: MeasuredLinear, target: Tensor, gram: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Round one linear.

        Args:
            measured: What is known of it.
            target: The weight to represent, float32, shape (K, out).
            gram: Weighted mean of x x^T over the quantized model's inputs, float32, shape (K, K).

        Returns:
            What to keep, by name, and the weight that a reader makes of it, shape (out, K).
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class Drift:
    """Distance of hidden states from the original's, relative to their norm, as root mean squares over tokens.

    Attributes:
        first_token: Of the first token of every row, whose activations are by far the largest in many models.
        other_tokens: Of all others.
    """

    first_token: float
    other_tokens: float


def kept_drift(pieces: StageDirectory, blocks: int) -> list[Drift]:
    """Return how far the hidden states after every block were from the original's, over the calibration rows."""
    kept = (pieces.load(f"drift-{index}")["drift"].tolist() for index in range(blocks))
    return [Drift(first_token=first, other_tokens=others) for first, others in kept]


def drift_section(drift: Sequence[Drift]) -> dict[str, dict[str, str | float]]:
    """Return what a report says of the drift: section -> entry -> value; nothing where there is none."""
    entries: dict[str, str | float] = {
        f"block {index}": f"{each.first_token:.2%}, {each.other_tokens:.2%}" for index, each in enumerate(drift)
    }
    return {"Drift of the hidden states (first token, other tokens; relative)": entries} if entries else {}


def rounding_damping(measured: MeasuredLinear) -> float:
    """Return the relative damping to round a linear with: the measured one, or the largest where none was enough."""
    return measured.damping if math.isfinite(measured.damping) else DAMPINGS[-1]


class _HeadReached(Exception):
    """Ends a forward pass before the head's large product."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class RoundingPass:
    """One run of the rounding stage."""

    def __init__(
        self,
        model: StreamedModel,
        measurement: Measurement,
        rounder: Rounder,
        pieces: StageDirectory,
        *,
        correct_drift: bool,
        kept: Collection[str] = (),
    ) -> None:
        """Prepare a run.

        Args:
            model: The original.
            measurement: Gives the calibration rows, and what is known of each linear.
            rounder: Rounds single linears.
            pieces: Where finished linears are kept, by name.
            correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
            kept: Linears that stay as they are, in float16; of a stage all or none.
        """
        self.model = model
        self.tokens = torch.from_numpy(measurement.tokens).long()
        self.measured = {linear.name: linear for linear in (*measurement.linears, measurement.head)}
        self.rounder = rounder
        self.pieces = pieces
        self.correct_drift = correct_drift
        self.kept = frozenset(kept)
        self.batches = micro_batches(*self.tokens.shape)

    def blocks(self, progress: Progress, table: Tensor | None = None) -> None:
        """Round all decoder blocks, in order.

        Args:
            progress: Wraps the blocks.
            table: The quantized model's token embeddings, shape (tokens, hidden size), where they differ.
        """
        original = self.model.embed(self.tokens)
        state = {"original": original, "quantized": original if table is None else self.model.embed(self.tokens, table)}
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
            stops = [stage.linears[0] for stage in family.stages if not self._keeps(index, stage)]
            for stage in family.stages:
                if self._keeps(index, stage):
                    for inner in stage.linears:
                        weight = block.get_submodule(inner).weight
                        weight.copy_(weight.half())
            with SteppedForwards(block, stops, joins, runs) as forwards:
                stream = ""
                for number, stage in enumerate(family.stages):
                    if self._keeps(index, stage):
                        stream = stage.joins or stream
                        continue
                    names = family.linear_names(index, stage)
                    modules = [block.get_submodule(inner) for inner in stage.linears]
                    weights = self._token_weights(names[0])
                    sums = StageSums(modules[0], stage, self.model.device)
                    for position, batch in enumerate(self.batches):
                        seen = forwards.advance(position)
                        base = seen[stream] if stream else self._on_device(quantized[batch])
                        sums.add(batch.start, seen[stage.linears[0]], targets[number][batch], base, weights[batch])
                    del targets[number]
                    gram, shift = sums.solved(correct_drift=self.correct_drift)
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

    def _keeps(self, index: int, stage: Stage) -> bool:
        return not self.kept.isdisjoint(self.model.family.linear_names(index, stage))

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
        weight = self._rounded(name, _shifted(module.weight, shift, joins), gram)
        module.weight.copy_(weight.to(module.weight))

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
            gram, shift = sums.solved(correct_drift=self.correct_drift)
            target = _shifted(head.weight, shift, False)
        run_all([partial(self._rounded, HEAD, target, gram)], self.model.device)

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

    def _rounded(self, name: str, target: Tensor, gram: Tensor) -> Tensor:
        kept, weight = self.rounder.round(self.measured[name], target, gram)
        self.pieces.save(name, kept)
        return weight


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
