"""Statistics of experts, each of which sees only the tokens that a router sends to it.

While the backward pass runs, only what the gradients tell is summed, and the common input of all experts is kept. Gram
matrices are made afterwards, of one expert at a time: those of all together would not fit into memory.

Calibration text may reach an expert so rarely that its Gram matrix has no full rank. So other tokens are added to those
that chose it, each with a tenth of their mean weight, until there are as many as the matrix has rows; or all of them.
And no expert is taken to matter nothing: one token more, of the mean gradient of all experts, is counted to each.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..convert.families import Stage
from .sketch import FisherSketch
from .statistics import StageStatistics
from .surgery import Expert

__all__ = ["ExpertInputs", "ExpertSums", "collect_experts", "expert_of", "expert_stages", "expert_statistics"]

_OTHERS_WEIGHT = 0.1
"""What a token that did not choose an expert counts for it, relative to the mean of those that did."""


def expert_stages(stages: Sequence[Stage]) -> dict[int, tuple[Stage, Stage]]:
    """Return the two stages of every expert among a block's stages: those that make its neurons, and read them."""
    found: dict[int, list[Stage]] = {}
    for stage in stages:
        if stage.expert is not None:
            found.setdefault(stage.expert, []).append(stage)
    return {number: (pair[0], pair[1]) for number, pair in found.items()}


def expert_of(block: nn.Module, stage: Stage) -> Expert:
    """Return the module of the expert that a stage belongs to."""
    module = block.get_submodule(stage.linears[0].rpartition(".")[0])
    assert isinstance(module, Expert)
    return module


@dataclass(eq=False)
class ExpertSums:
    """Sums over tokens for one stage of one expert.

    Attributes:
        fisher: Per linear, the sum over tokens of (dL/dy)^2, float32, shape (out,).
        couplings: Per linear, the sketch of the Fisher matrix of its outputs.
        weights: Sum of (dL/dy)^2 over all outputs, of every token, float32, shape (tokens,), on the CPU.
    """

    fisher: dict[str, Tensor]
    couplings: dict[str, FisherSketch]
    weights: Tensor

    def see_gradient(self, linear: str, gradient: Tensor, tokens: Tensor) -> None:
        """Take the gradients of one linear's outputs.

        Args:
            linear: Its name.
            gradient: Shape (chosen, out).
            tokens: Which tokens of all calibration rows these are, int64, shape (chosen,).
        """
        flat = gradient.detach().float()
        if linear not in self.couplings:
            self.couplings[linear] = FisherSketch(flat.shape[1], flat.device)
            self.fisher[linear] = torch.zeros(flat.shape[1], device=flat.device)
        squares = flat.square()
        of_tokens = squares.sum(dim=1)
        self.couplings[linear].add(flat, of_tokens)
        self.fisher[linear] += squares.sum(dim=0)
        self.weights[tokens.cpu()] += of_tokens.cpu()


@dataclass(eq=False)
class ExpertInputs:
    """What ``collect_experts`` collects.

    Attributes:
        inputs: Common input of the experts, float32, shape (tokens, hidden size), on the CPU.
        first_token: Index of the first token of the micro-batch under way, among those of all rows.
        sums: Per stage, in their order.
    """

    inputs: Tensor
    first_token: int
    sums: dict[Stage, ExpertSums]


@contextmanager
def collect_experts(block: nn.Module, path: str, stages: Sequence[Stage], tokens: int) -> Iterator[ExpertInputs]:
    """Collect what gradients tell of experts while forward and backward passes run through a block.

    Args:
        block: A decoder block, its weights loaded.
        path: Module that holds the experts.
        stages: The experts' stages; none where the block has no experts.
        tokens: Number of tokens of all calibration rows.

    Yields:
        The sums; the caller says before each micro-batch which its first token is.
    """
    seen = ExpertInputs(torch.empty(0), 0, {stage: ExpertSums({}, {}, torch.zeros(tokens)) for stage in stages})
    handles = []

    def keep_inputs(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden = args[0].detach().float().cpu()
        if not len(seen.inputs):
            seen.inputs = torch.empty(tokens, hidden.shape[1])
        seen.inputs[seen.first_token : seen.first_token + len(hidden)] = hidden

    if stages:
        handles.append(block.get_submodule(path).register_forward_pre_hook(keep_inputs))
    for stage in stages:
        expert = expert_of(block, stage)
        for name in stage.linears:
            handles.append(block.get_submodule(name).register_forward_hook(_output_hook(seen, stage, name, expert)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _output_hook(seen: ExpertInputs, stage: Stage, name: str, expert: Expert) -> Any:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        tokens = seen.first_token + expert.tokens
        output.register_hook(lambda gradient: seen.sums[stage].see_gradient(name, gradient, tokens))

    return hook


def expert_statistics(
    block: nn.Module,
    pair: tuple[Stage, Stage],
    seen: ExpertInputs,
    row_tokens: int,
    *,
    all_tokens: bool,
) -> tuple[StageStatistics, StageStatistics]:
    """Return the statistics of both stages of one expert, as if other stages' had been collected.

    Args:
        block: The block, its weights loaded.
        pair: The expert's stages.
        seen: What the backward pass collected of all experts.
        row_tokens: Tokens of a calibration row.
        all_tokens: Whether all tokens that did not choose the expert are added, not only as many as are missing.
    """
    expert = expert_of(block, pair[0])
    made = []
    for position, stage in enumerate(pair):
        device = block.get_submodule(stage.linears[0]).weight.device
        assert isinstance(device, torch.device)
        weights = seen.sums[stage].weights
        width = seen.inputs.shape[1] if position == 0 else expert.neuron_count
        weights = _with_others(weights, len(weights) if all_tokens else width, seed=pair[0].expert or 0)
        sums = StageStatistics(width, device)
        for parity, half in enumerate(sums.halves):
            of_half = torch.arange(len(weights)) // row_tokens % 2 == parity
            tokens = (of_half & (weights > 0)).nonzero()[:, 0]
            inputs = seen.inputs[tokens].to(device)
            with torch.no_grad():
                half.add(inputs if position == 0 else expert.neurons(inputs), weights[tokens].to(device))
        sums.token_weights = [weights]
        for number, name in enumerate(stage.linears):
            sums.fisher[name] = _fisher(seen, stage, name, _mean_fisher(seen, position, number))
            sums.couplings[name] = seen.sums[stage].couplings.get(name) or FisherSketch(len(sums.fisher[name]), device)
        made.append(sums)
    return made[0], made[1]


def _fisher(seen: ExpertInputs, stage: Stage, name: str, token: Tensor) -> Tensor:
    own = seen.sums[stage].fisher.get(name)
    return token if own is None else own + token


def _mean_fisher(seen: ExpertInputs, position: int, number: int) -> Tensor:
    # Of one linear in its role (of which stage, which of its linears): the mean over all tokens of all experts.
    total, tokens = torch.zeros(()), 0
    for index, (stage, sums) in enumerate(seen.sums.items()):
        if index % 2 == position and sums.fisher:
            total = total.to(sums.fisher[stage.linears[number]].device) + sums.fisher[stage.linears[number]]
            tokens += int((sums.weights > 0).sum())
    return total / max(tokens, 1)


def _with_others(weights: Tensor, wanted: int, *, seed: int) -> Tensor:
    # Weights of the tokens that chose the expert, and of some that did not, until `wanted` tokens have one.
    chose = weights > 0
    missing = min(wanted, len(weights)) - int(chose.sum())
    if missing <= 0:
        return weights
    others = (~chose).nonzero()[:, 0]
    drawn = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))[:missing]]
    weight = _OTHERS_WEIGHT * float(weights[chose].mean()) if bool(chose.any()) else 1.0
    return weights.index_fill(0, drawn, weight)
