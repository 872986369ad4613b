"""Rounding one block, input group by input group, each on what the groups rounded before it make of their inputs.

Notes:
    For the linears W, shape (K, out), of one input group, with the inputs y that they get in the quantized model and
    d, what these miss of their targets (``targets``); means are weighted by what each token counts in the end loss:

    1. ``H = mean y y^T`` and ``mean y^T d`` are summed over all micro-batches, forward by forward  (``_sum_inputs``)
    2. ``V = W + (H + ridge)^-1 mean y^T d`` cancels drift                                          (``drift``)
    3. V is rounded with error feedback: with ``H + damping = R R^T``, R upper triangular, row k is rounded at
       ``v_k + sum_{j<k} (R_jk / R_kk) (v_j - q_j)``, which gives q_k                               (``Rounder``)
    4. Q, as a reader will decode it, takes the place of W; the forwards go on to the next group    (``pausable``)

    Sources: 2 is the first step of Qronos (Zhang et al., arXiv 2505.11695), 3 is GPTQ (Frantar et al., arXiv
    2210.17323, section 3.3).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.model.structure import InputGroup
from ...measure.layers.linears import linear_of
from ...measure.model.batches import check_finite
from ...measure.model.calls import Calls
from ...measure.model.stream import StreamedModel
from .drift import InputSums
from .experts import round_experts_
from .linears import LinearRounder
from .pausable import PausableForwards, output_of
from .targets import Targets, experts_input, run_micro_batch, subtract_

__all__ = ["BlockRounding"]


class BlockRounding:
    """One block on its way from the original's weights to the quantized ones.

    Attributes:
        groups: Input groups with something to round, in the order of computation; in the place of all experts' groups
            ``experts_input``.
    """

    def __init__(
        self,
        model: StreamedModel,
        index: int,
        block: Any,
        linears: LinearRounder,
        batches: Sequence[slice],
        calls: Calls | None = None,
    ) -> None:
        """Look at the block's input groups; nothing is rounded.

        Args:
            model: The original.
            index: Which block.
            block: The block, its weights loaded.
            linears: Rounds them.
            batches: The micro-batches.
            calls: How blocks of the quantized model are called; None where that is as in the original.
        """
        self._calls = calls
        self._model = model
        self._index = index
        self._block = block
        self._linears = linears
        self._batches = batches
        self._structure = model.structure(index)
        self._all_groups = self._structure.groups
        self._names = {group: linears.names_of(index, group) for group in self._all_groups}
        self._experts_input = experts_input(self._structure)
        self._experts = [group for group in self._all_groups if group.expert is not None and self._names[group]]
        self.groups = [group for group in self._all_groups if group.expert is None and self._names[group]]
        if self._experts and self._experts_input is not None:
            self.groups.append(self._experts_input)

    def sort_groups(self, order: Sequence[str]) -> None:
        """Put the groups into the order in which the block calls them; it may call experts before other linears.

        Args:
            order: As ``OriginalBlock.order``.
        """
        places = {name: place for place, name in enumerate(order)}
        self.groups.sort(key=lambda group: places.get(group.first, len(places)))

    def round_(self, targets: Targets, stream: Tensor) -> None:
        """Round the block's linears, and run the block so.

        Args:
            targets: Targets of ``groups``, by the original; each is let go once its group's inputs are summed.
            stream: What enters the block in the quantized model, shape (rows, tokens, hidden size), on the CPU. In its
                place comes what leaves it.

        Raises:
            NumericalError: NaN or infinity leaves it.
        """
        subtract_(targets, stream)
        self._cast_unquantized_()
        with self._forwards(stream) as forwards:
            for group in self.groups:
                if group is self._experts_input:
                    self._round_experts_(targets, forwards)
                else:
                    sums = self._sum_inputs(group, targets, forwards)
                    self._linears.round_group_(self._index, self._block, group, self._names[group], sums)
            for number, batch in enumerate(self._batches):
                stream[batch] = forwards.finish(number).cpu()
        check_finite(stream, f"{self._model.block_name(self._index)}, quantized")

    def _cast_unquantized_(self) -> None:
        # Writers keep in float16 what is not rounded.
        for group, names in self._names.items():
            for inner in set(group.linears) - names.keys():
                weight = linear_of(self._block, self._structure, inner).weight
                weight.copy_(weight.half())

    def _forwards(self, stream: Tensor) -> PausableForwards:
        # All that paused forwards hold is little beside a CPU's memory, but not beside that of a small GPU.
        keep_paused = self._model.device.type == "cpu" and self._model.offload_dir is None
        stops = [group.first for group in self.groups]
        runs = [
            partial(run_micro_batch, self._model, self._index, stream, batch, self._calls) for batch in self._batches
        ]
        return PausableForwards(self._block, stops, list(self._adding()), runs, keep_paused=keep_paused)

    def _adding(self) -> dict[str, float]:
        # Modules whose outputs join the residual stream, and at which scales.
        return {group.adds: group.scale for group in self._all_groups if group.adds}

    def _sum_inputs(self, group: InputGroup, targets: Targets, forwards: PausableForwards) -> InputSums:
        # Run every forward up to the group. Its target, and all taps, go when this ends.
        target = targets[group]
        weights = self._linears.token_weights(next(iter(self._names[group].values())))
        module = linear_of(self._block, self._structure, next(iter(self._names[group])))
        sums = InputSums(module, group, self._model.device, target.gains)
        for number, batch in enumerate(self._batches):
            inputs = self._advance(group, number, targets, forwards)
            sizes = None if target.sizes is None else target.sizes[batch]
            sums.add(batch.start, inputs, target.values[batch], weights[batch], sizes)
        targets.pop(group)
        return sums

    def _advance(self, group: InputGroup, number: int, targets: Targets, forwards: PausableForwards) -> Tensor:
        # Inputs of a group in one micro-batch. What has joined the stream on the way there leaves the targets to come.
        taps = forwards.advance(number)
        for name, scale in self._adding().items():
            if output_of(name) in taps:
                subtract_(targets, taps[output_of(name)], self._batches[number], scale)
        return taps[group.first]

    def _round_experts_(self, targets: Targets, forwards: PausableForwards) -> None:
        assert self._experts_input is not None
        batches = range(len(self._batches))
        inputs = torch.cat([self._advance(self._experts_input, each, targets, forwards).cpu() for each in batches])
        original = targets.pop(self._experts_input).values
        round_experts_(self._linears, self._index, self._block, self._structure, self._experts, original, inputs)
