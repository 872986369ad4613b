"""Rounding experts, each on the tokens that it was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...checkpoint.model.structure import InputGroup
from ...measure.statistics.experts import expert_of, expert_stages
from .drift import InputSums
from .linears import LinearRounder

__all__ = ["round_experts_"]


def round_experts_(
    linears: LinearRounder, index: int, block: Any, groups: Sequence[InputGroup], original: Tensor, quantized: Tensor
) -> None:
    """Round the experts of a block, one after another.

    Args:
        linears: Rounds their linears.
        index: Which block.
        block: The block, its experts unrounded.
        groups: Input groups of the experts.
        original: Common input of the experts in the original, shape (rows, tokens, hidden size), on the CPU.
        quantized: The same in the quantized model, shape (rows * tokens, hidden size).
    """
    rounding = _ExpertRounding(linears, index, block, original.shape[1])
    for neurons, output in expert_stages(groups).values():
        rounding.round_(neurons, output, original.flatten(0, 1), quantized)


@dataclass(frozen=True, slots=True, eq=False)
class _ExpertRounding:
    """Rounds single experts of one block."""

    linears: LinearRounder
    index: int
    block: Any
    row_tokens: int

    def round_(self, neurons: InputGroup, output: InputGroup, original: Tensor, quantized: Tensor) -> None:
        # The linears that make an expert's neurons, then the one that reads them.
        expert = expert_of(self.block, neurons)
        target = expert.neurons(self._tokens_of(output, original))  # while its weights are the original's
        sums = self._sum_inputs(neurons, self._tokens_of(neurons, quantized), self._tokens_of(neurons, original))
        self.linears.round_group_(self.block, neurons, self._names(neurons), sums)
        sums = self._sum_inputs(output, expert.neurons(self._tokens_of(output, quantized)), target)
        self.linears.round_group_(self.block, output, self._names(output), sums)

    def _sum_inputs(self, group: InputGroup, inputs: Tensor, target: Tensor) -> InputSums:
        sums = InputSums(self.block.get_submodule(group.first), group, self.linears.device)
        weights = self._token_weights(group)
        tokens = weights.nonzero()[:, 0]
        sums.add_tokens(tokens.cpu() // self.row_tokens, inputs, target, weights[tokens])
        return sums

    def _tokens_of(self, group: InputGroup, values: Tensor) -> Tensor:
        # The values of the tokens that the group was measured on, on the device.
        return values[self._token_weights(group).nonzero()[:, 0].cpu()].to(self.linears.device)

    def _token_weights(self, group: InputGroup) -> Tensor:
        return self.linears.token_weights(next(iter(self._names(group).values()))).flatten()

    def _names(self, group: InputGroup) -> dict[str, str]:
        return self.linears.names_of(self.index, group)
