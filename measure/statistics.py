"""Second moments that say how an error in a linear's weight will hurt: Gram matrices and the diagonal Fisher."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .families import Stage

__all__ = ["StageStatistics", "collect", "tapped_inputs"]


@dataclass(slots=True, eq=False)
class StageStatistics:
    """Sums over tokens for one stage; divide by the number of tokens for means.

    Attributes:
        gram: Sum of x x^T over tokens, x being the stage's common input, float32, shape (K, K).
        fisher: Per linear, the sum over tokens of (dL/dy)^2, float32, shape (out,). L is the sum, over all
            positions, of the negative log-likelihood of a token that the model itself sampled, in nats.
        tokens: Number of tokens summed.
    """

    gram: Tensor
    fisher: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0

    def add_input(self, inputs: Tensor) -> None:
        """Add the inputs of a micro-batch, shape (rows, tokens, K)."""
        flat = inputs.detach().flatten(0, -2).float()
        self.gram.addmm_(flat.T, flat)
        self.tokens += flat.shape[0]

    def add_gradient(self, linear: str, gradient: Tensor) -> None:
        """Add the gradients of one linear's outputs, shape (rows, tokens, out)."""
        squares = gradient.detach().flatten(0, -2).float().square().sum(dim=0)
        previous = self.fisher.get(linear)
        self.fisher[linear] = squares if previous is None else previous + squares


@contextmanager
def collect(block: nn.Module, stages: Sequence[Stage]) -> Iterator[list[StageStatistics]]:
    """Collect statistics of every stage while forward and backward passes run through a block.

    Args:
        block: A decoder block, its weights loaded.
        stages: Its stages.

    Yields:
        One ``StageStatistics`` a stage, filled as micro-batches pass.
    """
    statistics, handles = [], []
    for stage in stages:
        first: Any = block.get_submodule(stage.linears[0])
        width = first.in_features
        stage_sums = StageStatistics(torch.zeros(width, width, device=first.weight.device))
        statistics.append(stage_sums)
        handles.append(first.register_forward_pre_hook(_input_hook(stage_sums)))
        for name in stage.linears:
            handles.append(block.get_submodule(name).register_forward_hook(_output_hook(stage_sums, name)))
    try:
        yield statistics
    finally:
        for handle in handles:
            handle.remove()


def _input_hook(sums: StageStatistics) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        sums.add_input(args[0])

    return hook


def _output_hook(sums: StageStatistics, name: str) -> Any:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        output.register_hook(lambda gradient: sums.add_gradient(name, gradient))

    return hook


@contextmanager
def tapped_inputs(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the latest input of submodules while the block runs.

    Args:
        block: A decoder block.
        names: Submodules of it.

    Yields:
        Input by submodule name, overwritten at every forward.
    """
    taps: dict[str, Tensor] = {}

    def tap(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
            taps[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(tap(name), with_kwargs=True) for name in names]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
