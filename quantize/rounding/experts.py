"""Rounding experts, each on the tokens that it was measured on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from ...checkpoint.model.structure import BlockStructure, InputGroup
from ...measure.layers.experts import expert_pairs, neurons_of_expert
from ...measure.layers.linears import linear_of
from .drift import InputSums
from .linears import LinearRounder

__all__ = ["round_experts_"]


def round_experts_(
    linears: LinearRounder,
    index: int,
    block: Any,
    structure: BlockStructure,
    groups: Collection[InputGroup],
    original: Tensor,
    quantized: Tensor,
) -> None:
    """Round the experts of a block, one after another.

    Args:
        linears: Rounds their linears.
        index: Which block.
        block: The block, its experts unrounded.
        structure: Its structure.
        groups: Input groups of the experts that have something to round.
        original: Common input of the experts in the original, shape (rows, tokens, hidden size), on the CPU.
        quantized: The same in the quantized model, shape (rows * tokens, hidden size).
    """
    rounding = _ExpertRounding(linears, index, block, structure, original.shape[1])
    for path, neurons, output in expert_pairs(structure):
        assert neurons.expert is not None
        last = structure.places[output.first].parameter.removeprefix(f"{path}.")
        neurons_of = partial(neurons_of_expert, block.get_submodule(path), neurons.expert, last)
        first, second = (group if group in groups else None for group in (neurons, output))
        rounding.round_(first, second, neurons_of, original.flatten(0, 1), quantized)


@dataclass(frozen=True, slots=True, eq=False)
class _ExpertRounding:
    """Rounds single experts of one block."""

    linears: LinearRounder
    index: int
    block: Any
    structure: BlockStructure
    row_tokens: int

    def round_(
        self,
        neurons: InputGroup | None,
        output: InputGroup | None,
        neurons_of: Callable[[Tensor], Tensor],
        original: Tensor,
        quantized: Tensor,
    ) -> None:
        # The linears that make an expert's neurons, then the one that reads them; None for what stays as it is.
        # Targets are the original's, so they are made while its weights are in place.
        target = None if output is None else neurons_of(self._tokens_of(output, original))
        if neurons is not None:
            self._round_group_(neurons, self._tokens_of(neurons, quantized), self._tokens_of(neurons, original))
        if output is not None and target is not None:
            self._round_group_(output, neurons_of(self._tokens_of(output, quantized)), target)

    def _round_group_(self, group: InputGroup, inputs: Tensor, target: Tensor) -> None:
        sums = InputSums(linear_of(self.block, self.structure, group.first), group, self.linears.device)
        weights = self._token_weights(group)
        tokens = weights.nonzero()[:, 0]
        sums.add_tokens(tokens.cpu() // self.row_tokens, inputs, target, weights[tokens])
        self.linears.round_group_(self.index, self.block, group, self._names(group), sums)

    def _tokens_of(self, group: InputGroup, values: Tensor) -> Tensor:
        # The values of the tokens that the group was measured on, on the device.
        return values[self._token_weights(group).nonzero()[:, 0].cpu()].to(self.linears.device)

    def _token_weights(self, group: InputGroup) -> Tensor:
        return self.linears.token_weights(next(iter(self._names(group).values()))).flatten()

    def _names(self, group: InputGroup) -> dict[str, str]:
        return self.linears.names_of(self.index, group)
