"""The passes of the measuring step: forward, head, backward with the curves of each block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..checkpoint.files.resume import ResumeStore
from ..checkpoint.model.structure import InputGroup
from ..linalg.products import products
from ..progress import Progress
from .curves import CurveMaker
from .embeddings import EMBEDDING, LAYER_EMBEDDING, measured_table
from .head import probed_head
from .input_group import FinishedLinear, finished_linears, measure_group, tied_head
from .layers.linears import linear_of
from .layers.positionwise import chunked_positionwise
from .model.batches import check_finite, micro_batches
from .model.state_gradients import StateGradients
from .model.states import new_state
from .model.stream import StreamedModel
from .statistics.embedding_gradients import embedding_gradients
from .statistics.experts import collect_experts, expert_statistics
from .statistics.heldout import DAMPINGS
from .statistics.inputs import InputStatistics, collect

__all__ = ["MeasuringPasses", "finished_decoder", "finished_head", "repeat_without"]


class MeasuringPasses:
    """One run of the measuring step: what its passes share. Every finished block is kept in ``artifacts``."""

    def __init__(
        self,
        model: StreamedModel,
        tokens: Tensor,
        artifacts: ResumeStore,
        makers: Sequence[CurveMaker],
        *,
        damping: float | None,
        seed: int,
        experts_see_all_tokens: bool,
        precision: str,
    ) -> None:
        """Prepare a run.

        Args:
            model: The model to measure.
            tokens: Token ids of the calibration sequences, int64, shape (rows, tokens).
            artifacts: Where finished blocks are kept.
            makers: The formats' curves.
            damping: Damping of the Hessians, or None to choose it for each input group on held-out sequences.
            seed: Seed of the random signs that probe the Fisher information.
            experts_see_all_tokens: Whether tokens that did not choose an expert count a little for it, all of them.
            precision: Of products in the passes and of sums over tokens, as ``pass_precision`` returns it.
        """
        self.model = model
        self.tokens = tokens
        self.artifacts = artifacts
        self.makers = makers
        self.dampings = DAMPINGS if damping is None else (damping,)
        self.seed = seed
        self.experts_see_all_tokens = experts_see_all_tokens
        self.precision = precision
        self.batches = micro_batches(*tokens.shape)
        self._state_gradients = StateGradients({})

    def forward(self, progress: Progress) -> None:
        """Keep the input of every block on disk, and the output of the last; rounding in this run reads them again."""
        last = self.model.block_count
        self._discard_unusable()
        needed = [index for index in range(last) if not self.artifacts.has(f"curves-{index}")]
        needed += [] if self.artifacts.has("head") else [last]
        missing = max((index for index in needed if not self.artifacts.has(f"input-{index}")), default=-1)
        blocks = progress(range(last), "measure: forward")
        for maker in self.makers if needed else ():
            maker.warm_up()
        embedded = self.model.embed(self.tokens)  # which makes ready to run blocks, too
        if missing >= 0 and not self.artifacts.has("input-0"):
            self.artifacts.save("input-0", {"hidden": embedded})
        hidden: Tensor | None = embedded
        del embedded
        hands_state, has = self.model.calls.hands_state, self.artifacts.has
        then = _followed([i for i in range(last) if hands_state or (i < missing and not has(f"input-{i + 1}"))])
        for index in blocks:
            if index not in then:
                hidden = None
                continue
            if hidden is None:
                hidden = self._artifact(f"input-{index}")["hidden"]
            self._forward_block(index, hidden, then[index])
            self.artifacts.save(f"input-{index + 1}", {"hidden": hidden})

    def _discard_unusable(self) -> None:
        # The backward pass goes on with a gradient, from block to block. Where that is gone, by damage or because a
        # finished block has to be done again, it begins anew at the head; blocks below are not affected.
        waiting = [index for index in range(self.model.block_count) if not self.artifacts.has(f"curves-{index}")]
        waiting += [] if self.artifacts.has(EMBEDDING) else [-1]
        if not waiting:
            return
        last = max(waiting)
        if not self.artifacts.has(f"gradient-{last + 1}"):
            self.artifacts.discard("head")
            last = self.model.block_count
        for index in range(max(0, min(waiting)), last):
            self.artifacts.discard(f"curves-{index}")

    def _artifact(self, name: str) -> dict[str, Tensor]:
        # States, in memory or in files as all are.
        return self.artifacts.load(name, partial(new_state, directory=self.model.offload_dir))

    def _forward_block(self, index: int, hidden: Tensor, then: int | None) -> None:
        # Puts the block's output in the place of its input; `then` is the block of the next call.
        structure = self.model.structure(index)
        with (
            torch.no_grad(),
            self.model.block(index, then) as block,
            chunked_positionwise(block, structure),
            products(self.model.device, self.precision),
        ):
            for batch in self.batches:
                inputs = hidden[batch].to(self.model.device)
                hidden[batch] = self.model.run_block(index, inputs, batch.start).cpu()
        check_finite(hidden, self.model.block_name(index))

    def head(self) -> None:
        """Probe the logits, keep the gradient at the last block's output, measure the head."""
        if self.artifacts.has("head"):
            return
        last = self.model.block_count
        hidden = self._artifact(f"input-{last}")["hidden"]
        with self.model.tail() as head:
            with products(self.model.device, self.precision):
                sums, gradient = probed_head(self.model, head, self.tokens, hidden, seed=self.seed)
            name, tied = self.model.source.head_name, self.model.source.tied_embeddings
            none = {name: torch.empty(head.out_features, 0)}  # its outputs are rounded each for itself
            packed = measure_group({name: head}, sums, none, self.makers, self.dampings, keep_gram=tied)
        self.artifacts.save(f"gradient-{last}", {"gradient": gradient})
        self.artifacts.save("head", packed)

    def backward(self, progress: Progress) -> None:
        """Go back through the blocks: statistics, then curves, block by block."""
        gradient: Tensor | None = None
        blocks = range(self.model.block_count - 1, -1, -1)
        then = _followed([index for index in blocks if not self.artifacts.has(f"curves-{index}")])
        for index in progress(blocks, "measure: backward, curves"):
            if index not in then:
                continue
            if gradient is None:
                artifact = self._artifact(f"gradient-{index + 1}")
                gradient = artifact.pop("gradient")
                self._state_gradients = StateGradients(artifact)
            packed = self._measured_block(index, gradient, then[index])
            # The gradient first: a run cut off between the two repeats this block from an unchanged input.
            self.artifacts.save(f"gradient-{index}", {"gradient": gradient, **self._state_gradients.pending})
            self.artifacts.save(f"curves-{index}", packed)
            self.artifacts.discard(f"gradient-{index + 1}")

    def _measured_block(self, index: int, gradient: Tensor, then: int | None) -> dict[str, Tensor]:
        # Puts the gradient at the block's input in the place of that at its output; `then` is of the next call.
        structure = self.model.structure(index)
        packed: dict[str, Tensor] = {}
        with self.model.block(index, then) as block:
            with (
                collect(block, structure, self.tokens.shape[1]) as statistics,
                collect_experts(block, structure, self.tokens.numel()) as seen,
                chunked_positionwise(block, structure),
                products(self.model.device, self.precision),
            ):
                self._backward_block(index, self._artifact(f"input-{index}")["hidden"], gradient, statistics)
            for group, sums in zip(structure.plain_groups, statistics, strict=True):
                packed |= self._measured_stage(index, block, group, sums)
            for group, chosen, sums in expert_statistics(
                block, structure, seen, self.tokens.shape[1], all_tokens=self.experts_see_all_tokens
            ):
                packed |= self._measured_stage(index, block, group, sums)
                for name in self.model.linear_names(index, group):
                    packed[f"{name}|chosen_tokens"] = torch.tensor(chosen)
        return packed

    def _measured_stage(self, index: int, block: Any, group: InputGroup, sums: InputStatistics) -> dict[str, Tensor]:
        names, structure = self.model.linear_names(index, group), self.model.structure(index)
        modules = [linear_of(block, structure, inner) for inner in group.linears]
        couplings = {n: sums.couplings[i].coupling(sums.fisher[i]) for n, i in zip(names, group.linears, strict=True)}
        sums.fisher = {n: sums.fisher[inner] for n, inner in zip(names, group.linears, strict=True)}
        linears = dict(zip(names, modules, strict=True))
        return measure_group(linears, sums, couplings, self.makers, self.dampings)

    def _backward_block(
        self,
        index: int,
        hidden: Tensor,
        gradient: Tensor,
        statistics: Sequence[InputStatistics],
    ) -> None:
        # Puts the gradient at the block's input in the place of that at its output.
        of_layer: list[Tensor] = []
        for batch in self.batches:
            inputs = hidden[batch].to(self.model.device).requires_grad_()
            own = self.model.layer_input(index, inputs, batch.start)
            own = None if own is None else own.detach().requires_grad_()
            self._state_gradients.backward(
                self.model.calls.states(batch.start),
                partial(self.model.run_block, index, inputs, batch.start, layer_input=own),
                gradient[batch].to(self.model.device),
                batch.start,
            )
            assert inputs.grad is not None
            gradient[batch] = inputs.grad.cpu()
            if own is not None:
                of_layer.append(torch.zeros(own.shape) if own.grad is None else own.grad.cpu())
            for sums in statistics:
                sums.end_batch()
        check_finite(gradient, self.model.block_name(index), "gradients")
        if of_layer:
            self.artifacts.save(f"layer-gradient-{index}", {"gradient": torch.cat(of_layer)})

    def embedding(self) -> None:
        """Measure the token embeddings, and those that blocks have of their own; the backward pass has ended."""
        if self.artifacts.has(EMBEDDING):
            return
        source, gradient = self.model.source, self._artifact("gradient-0")["gradient"]
        blocks = range(self.model.block_count if source.layer_embedding is not None else 0)
        of_layers = [self._artifact(f"layer-gradient-{index}")["gradient"] for index in blocks]
        for name, of_table in embedding_gradients(self.model, self.tokens, gradient, of_layers).items():
            own = name == source.embedding_name
            head = tied_head(self.artifacts.load("head")) if own and source.tied_embeddings else None
            packed = measured_table(self.model, name, self.tokens, of_table, self.makers, head)
            self.artifacts.save(EMBEDDING if own else LAYER_EMBEDDING, packed)


def repeat_without(model: StreamedModel, artifacts: ResumeStore, kept: Callable[[str], bool]) -> None:
    """Let finished blocks go if of one of their linears something is not kept: they are measured again.

    Args:
        model: The model.
        artifacts: Those of the passes.
        kept: Tells that of a linear's full name.
    """
    for index in range(model.block_count):
        groups = model.structure(index).groups
        if not all(kept(name) for group in groups for name in model.linear_names(index, group)):
            artifacts.discard(f"curves-{index}")
    if not kept(model.source.head_name):
        artifacts.discard("head")


def _followed(indices: Sequence[int]) -> dict[int, int | None]:
    # The one after each; None after the last.
    return dict(zip(indices, [*indices, None][1:], strict=True))


def finished_decoder(model: StreamedModel, artifacts: ResumeStore) -> list[FinishedLinear]:
    """Return the measured linears of the decoder of a finished run, in model order."""
    return [
        measured[name]
        for index in range(model.block_count)
        for measured in [finished_linears(artifacts.load(f"curves-{index}"))]
        for group in model.structure(index).groups
        for name in model.linear_names(index, group)
    ]


def finished_head(artifacts: ResumeStore) -> FinishedLinear:
    """Return the measured output head of a finished run."""
    (head,) = finished_linears(artifacts.load("head")).values()
    return head
