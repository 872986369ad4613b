"""The rounding pass: blocks are quantized one after another, each on the inputs that the quantized ones before it make.

Two streams of hidden states run through the model side by side, the original's and the quantized one's. In every stage
of a block the weight is first moved to where it best reproduces the *original's* output from the *quantized* inputs,
so that the drift of the earlier stages is cancelled and not accumulated (``drift``), and then rounded with error
feedback by a rounder, which knows the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.files.resume import ResumeStore
from ...checkpoint.model.families import HEAD, InputGroup
from ...convert.format import Rounder
from ...convert.rounded import RoundedModel, drift_of
from ...linalg.parallel import run_all
from ...measure.measurement import Measurement
from ...measure.model.states import new_state
from ...measure.model.stream import StreamedModel, check_finite, micro_batches
from ...measure.statistics.experts import expert_of, expert_stages
from ...measure.statistics.inputs import tapped_inputs, tapped_outputs
from ...progress import Progress
from .drift import InputSums
from .pausable import PausableForwards

__all__ = ["ROUNDED", "RoundingPass"]

ROUNDED = "rounded"
"""Name of the stage in the work directory."""

_SLICE_OUTPUTS = 16384
"""Outputs that drift is cancelled for together: 256 MiB in float32 for 4096 inputs."""


class _HeadReached(Exception):
    """Ends a forward pass before the head's large product."""

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self.inputs = inputs


class _AllSeen(Exception):
    """Ends a forward pass of a block of which no more is needed."""


class RoundingPass:
    """One run of the rounding stage."""

    def __init__(
        self,
        model: StreamedModel,
        measurement: Measurement,
        rounder: Rounder,
        store: ResumeStore,
        *,
        correct_drift: bool = True,
        inputs: ResumeStore | None = None,
    ) -> None:
        """Prepare a run.

        Args:
            model: The original.
            measurement: Gives the calibration rows, and what is known of each linear.
            rounder: Rounds single linears.
            store: Where finished linears are kept, by name.
            correct_drift: Whether weights are moved toward the original's outputs before they are rounded.
            inputs: What enters the original's blocks, if it is at hand (see ``bpwise.measure.run.kept_inputs``).
        """
        self.model = model
        self.tokens = torch.from_numpy(measurement.tokens).long()
        self.measured = {linear.name: linear for linear in (*measurement.linears, measurement.head)}
        self.rounder = rounder
        self.store = store
        self.correct_drift = correct_drift
        self.inputs = inputs
        self.batches = micro_batches(*self.tokens.shape)

    def blocks(self, progress: Progress, table: Tensor | None = None) -> None:
        """Round all decoder blocks, in order.

        Args:
            progress: Wraps the blocks.
            table: The quantized model's token embeddings, shape (tokens, hidden size), where they differ.
        """
        state = {"original": self.model.embed(self.tokens), "quantized": self.model.embed(self.tokens, table)}
        finished = self._finished()
        if finished >= 0:
            state = self._states(self.store, f"state-{finished}")
        for index in progress(range(self.model.block_count), "quantize: round"):
            if index <= finished:
                continue
            self._round_block(index, state)
            self.store.save(f"drift-{index}", {"drift": drift_of(**state)})
            self.store.save(f"state-{index}", state)
            self.store.discard(f"state-{index - 1}")
            if self.inputs is not None:
                self.inputs.discard(f"input-{index}")

    def _finished(self) -> int:
        # The last block that need not be done again, with all before it; -1 if there is none. A block that has lost a
        # artifact is done again from the first on: states in between are not kept.
        finished = max((i for i in range(self.model.block_count) if self.store.has(f"state-{i}")), default=-1)
        for index in range(finished + 1):
            names = [name for stage in self.model.stages(index) for name in self._rounded_of(index, stage).values()]
            if not all(self.store.has(artifact) for artifact in (f"drift-{index}", *names)):
                self.store.discard(f"state-{finished}")
                return -1
        return finished

    def _round_block(self, index: int, state: dict[str, Tensor]) -> None:
        # Puts both streams after the block in the place of those before it.
        stages = self.model.stages(index)
        shared = [stage for stage in stages if stage.expert is None]
        experts = [stage for stage in stages if stage.expert is not None and self._rounded_of(index, stage)]
        stops = [stage.linears[0] for stage in shared if self._rounded_of(index, stage)]
        stops += [self.model.family.experts_path] if experts else []
        adding = [stage.adds for stage in shared if stage.adds]
        joining = [stage.linears[0] for stage in shared if stage.adds]
        with torch.no_grad(), self.model.block(index) as block:
            wanted, state["original"] = self._run_original(index, block, state.pop("original"))
            quantized = state["quantized"]
            for linear in joining:
                wanted[linear][0].sub_(quantized)
            runs = [partial(self._run, index, quantized, batch) for batch in self.batches]
            for stage in stages:
                for inner in set(stage.linears) - self._rounded_of(index, stage).keys():
                    weight = block.get_submodule(inner).weight
                    weight.copy_(weight.half())
            gains = {stage.linears[0]: self._gains(block, stage) for stage in shared}  # runs norms watched below
            # All that waiting passes hold is little beside a CPU's memory, but not beside that of a small GPU.
            waiting = self.model.device.type == "cpu" and self.model.offload_dir is None
            with PausableForwards(block, stops, adding, runs, waiting=waiting) as forwards:
                for stage in shared:
                    rounded = self._rounded_of(index, stage)
                    if not rounded:
                        wanted.pop(stage.linears[0])
                        continue
                    modules = [block.get_submodule(inner) for inner in rounded]
                    names = list(rounded.values())
                    weights = self._token_weights(names[0])
                    target, sizes = wanted[stage.linears[0]]
                    sums = InputSums(modules[0], stage, self.model.device, gains[stage.linears[0]])
                    for position, batch in enumerate(self.batches):
                        seen = forwards.advance(position)
                        for name in adding:
                            if name in seen:
                                self._take_off(seen[name], [wanted[x][0][batch] for x in joining if x in wanted])
                        of_batch = None if sizes is None else sizes[batch]
                        inputs = seen[stage.linears[0]]
                        sums.add(batch.start, inputs, target[batch], weights[batch], of_batch)
                    del wanted[stage.linears[0]], target, seen, inputs
                    gram, shift = sums.solved(correct_drift=self.correct_drift)
                    self._round_linears(names, modules, gram, shift, joins=stage.adds is not None)
                if experts:
                    path = self.model.family.experts_path
                    inputs = torch.cat([forwards.advance(number)[path].cpu() for number in range(len(self.batches))])
                    self._round_experts(index, block, experts, wanted.pop(path)[0].flatten(0, 1), inputs)
                for position, batch in enumerate(self.batches):
                    quantized[batch] = forwards.finish(position).cpu()
            check_finite(quantized, f"{self.model.block_name(index)}, quantized")

    def _take_off(self, added: Tensor, missing: Sequence[Tensor]) -> None:
        # What has joined the stream is not missing there any more.
        for target in missing:
            target.sub_(added.view(target.shape).to(target.device), alpha=self.model.multiplier)

    def _round_experts(
        self, index: int, block: Any, stages: Sequence[InputGroup], original: Tensor, quantized: Tensor
    ) -> None:
        # One expert after another, on the tokens that it was measured on: (tokens, hidden size) of all rows.
        row_tokens = self.tokens.shape[1]
        for pair in expert_stages(stages).values():
            expert = expert_of(block, pair[0])
            names = [self.model.family.linear_names(index, stage) for stage in pair]
            weights = [self._token_weights(of_stage[0]).flatten() for of_stage in names]
            tokens = [of_stage.nonzero()[:, 0].cpu() for of_stage in weights]
            inputs = [self._on_device(quantized[of_stage]) for of_stage in tokens]
            targets = [self._on_device(original[of_stage]) for of_stage in tokens]
            targets[1] = expert.neurons(targets[1])  # while its weights are the original's
            for number, stage in enumerate(pair):
                if number == 1:
                    inputs[1] = expert.neurons(inputs[1])
                modules = [block.get_submodule(inner) for inner in stage.linears]
                sums = InputSums(modules[0], stage, self.model.device)
                given = weights[number][tokens[number].to(weights[number].device)]
                sums.add_tokens(tokens[number] // row_tokens, inputs[number], targets[number], given)
                gram, shift = sums.solved(correct_drift=self.correct_drift)
                self._round_linears(names[number], modules, gram, shift, joins=False)

    def _round_linears(
        self, names: Sequence[str], modules: Sequence[Any], gram: Tensor, shift: Tensor | None, *, joins: bool
    ) -> None:
        tasks = [
            partial(self._round_linear, name, module, gram, shift, joins)
            for name, module in zip(names, modules, strict=True)
        ]
        run_all(tasks, self.model.device)

    def _gains(self, block: Any, stage: InputGroup) -> Tensor | None:
        # What every output of a stage is multiplied by on its way into the residual stream, its norm's size apart.
        if stage.adds is None:
            return None
        module = block.get_submodule(stage.linears[0])
        gains = torch.full((module.out_features,), self.model.multiplier, device=self.model.device)
        if stage.normed:
            gains = gains * block.get_submodule(stage.adds)(torch.ones_like(gains)).float()
        return gains

    def _rounded_of(self, index: int, stage: InputGroup) -> dict[str, str]:
        # The linears of a stage that do not stay as they are: full names, by those in the block.
        names = self.model.family.linear_names(index, stage)
        return {
            inner: name
            for inner, name in zip(stage.linears, names, strict=True)
            if name not in self.rounder.unquantized
        }

    def _on_device(self, values: Tensor) -> Tensor:
        return values.to(self.model.device)

    def _token_weights(self, linear: str) -> Tensor:
        return self._on_device(torch.from_numpy(self.measured[linear].token_weights)).float()

    def _run(self, index: int, hidden: Tensor, batch: slice) -> Tensor:
        return self.model.run_block(index, self._on_device(hidden[batch]))

    def _run_original(
        self, index: int, block: Any, hidden: Tensor
    ) -> tuple[dict[str, tuple[Tensor, Tensor | None]], Tensor]:
        # What every stage should see or make, by its first linear: the original's input or, where the stage adds to the
        # residual stream, the original's sum there, and the size that a norm divides its output by. Of experts their
        # common input. And the block's output.
        stages = self.model.stages(index)
        shared = [stage for stage in stages if stage.expert is None]
        read = [stage.linears[0] for stage in shared if stage.adds is None]
        read += [self.model.family.experts_path] if len(shared) < len(stages) else []
        adding = [(stage.linears[0], stage.adds, stage.normed) for stage in shared if stage.adds is not None]
        targets: dict[str, Tensor] = {}
        sizes: dict[str, list[Tensor]] = {}
        known = self._known_output(index, stages)
        output = self.model.new_state(self.tokens) if known is None else known
        for batch in self.batches:
            norms = [name for _, name, normed in adding if normed]
            with (
                tapped_inputs(block, [*read, *norms]) as inputs,
                tapped_outputs(block, [name for _, name, _ in adding]) as added,
            ):
                if known is None:
                    output[batch] = self._run(index, hidden, batch).cpu()
                else:
                    self._run_until(index, hidden, batch, block.get_submodule(stages[-2].linears[0]))
            for name in read:
                first = next(other for other in read if inputs[other] is inputs[name])
                if first == name:
                    self._keep(targets, name, batch, inputs[name])
                else:  # as for queries, keys and values
                    targets[name] = targets[first]
            stream = self._on_device(hidden[batch])
            for linear, name, normed in adding:
                if known is not None and name == adding[-1][1]:
                    stream = output[batch]
                else:
                    stream = stream + self.model.multiplier * added[name]
                self._keep(targets, linear, batch, stream)
                if normed:
                    size = inputs[name].square().mean(dim=-1, keepdim=True).sqrt()
                    sizes.setdefault(linear, []).append(size.cpu())
        check_finite(output, self.model.block_name(index))
        wanted = {name: (target, torch.cat(sizes[name]) if name in sizes else None) for name, target in targets.items()}
        return wanted, output

    def _keep(self, targets: dict[str, Tensor], name: str, batch: slice, values: Tensor) -> None:
        # Values of a micro-batch's tokens, of all tokens under a name.
        if name not in targets:
            targets[name] = self.model.new_state(self.tokens, values.shape[-1])
        targets[name][batch] = values.cpu().view(targets[name][batch].shape)

    def _states(self, store: ResumeStore, artifact: str) -> dict[str, Tensor]:
        return store.load(artifact, partial(new_state, directory=self.model.offload_dir))

    def _known_output(self, index: int, stages: Sequence[InputGroup]) -> Tensor | None:
        # The original block's output, where its last stage need not run: it only adds this stage's part.
        plain = all(stage.expert is None and not stage.normed for stage in stages)
        ends = len(stages) > 1 and stages[-1].adds is not None and stages[-2].adds is None
        if self.inputs is None or not self.inputs.has(f"input-{index + 1}") or not (plain and ends):
            return None
        return self._states(self.inputs, f"input-{index + 1}")["hidden"]

    def _run_until(self, index: int, hidden: Tensor, batch: slice, module: nn.Module) -> None:
        # Hooks that are there already see the module's input.
        def stop(_module: nn.Module, _args: tuple[Tensor, ...]) -> None:
            raise _AllSeen

        handle = module.register_forward_pre_hook(stop)
        try:
            self._run(index, hidden, batch)
        except _AllSeen:
            pass
        finally:
            handle.remove()

    def _round_linear(self, name: str, module: Any, gram: Tensor, shift: Tensor | None, joins: bool) -> None:
        kept = self._rounded(name, _shifted(module.weight, shift, joins), gram)
        module.weight.copy_(self.rounder.decoded(name, kept))

    def head(self) -> None:
        """Round the output head on what the quantized decoder gives it."""
        if self.store.has(HEAD):
            return
        state = RoundedModel((), self.model.block_count, self.store).last_states(self.model.offload_dir)
        with torch.no_grad(), self.model.tail() as head:
            sums = InputSums(head, InputGroup((HEAD,)), self.model.device)
            weights = self._token_weights(HEAD)
            for batch in self.batches:
                wanted, inputs = (self._head_input(head, state[key][batch]) for key in ("original", "quantized"))
                sums.add(batch.start, inputs, wanted, weights[batch])
            gram, shift = sums.solved(correct_drift=self.correct_drift)
            del state, wanted, inputs
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

    def _rounded(self, name: str, target: Tensor, gram: Tensor) -> dict[str, Tensor]:
        kept = self.rounder.round_linear(self.measured[name], target, gram)
        self.store.save(name, kept)
        return kept


def _shifted(weight: Tensor, shift: Tensor | None, joins: bool) -> Tensor:
    # The weight [inputs, outputs], moved by `shift`: itself where the stage joins the stream, else times the weight.
    # In memory of its own; an output head keeps its dtype, and has no second copy in this one.
    shifted = torch.empty(weight.T.shape, device=weight.device)
    for first in range(0, len(weight), _SLICE_OUTPUTS):
        columns = slice(first, first + _SLICE_OUTPUTS)
        plain = weight[columns].float().T
        if shift is not None:
            plain = plain + shift[:, columns] if joins else torch.addmm(plain, shift, plain)
        shifted[:, columns] = plain
    return shifted
