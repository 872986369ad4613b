"""Statistics of experts, each of which sees only the tokens that a router sends to it.

While the backward pass runs, only what the gradients tell is summed, and the common input of all experts is kept. Gram
matrices are made afterwards, of one expert at a time: those of all together would not fit into memory.

Calibration text may reach an expert so rarely that its Gram matrix has no full rank. So other tokens are added to those
that chose it, each with a tenth of their mean weight, until there are as many as the matrix has rows; or all of them.
And no expert is taken to matter nothing: one token more, of the mean gradient of all experts, is counted to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.structure import InputGroup
from ..model.surgery import Expert
from .inputs import InputStatistics, tokens_of_halves
from .sketch import FisherSketch

__all__ = ["ExpertInputs", "ExpertSums", "collect_experts", "expert_of", "expert_stages", "expert_statistics"]

_OTHERS_WEIGHT = 0.1
"""What a token that did not choose an expert counts for it, relative to the mean of those that did."""


def expert_stages(groups: Sequence[InputGroup]) -> dict[int, tuple[InputGroup, InputGroup]]:
    """Return the two input groups of every expert in a block: those that make its neurons, and read them."""
    found: dict[int, list[InputGroup]] = {}
    for group in groups:
        if group.expert is not None:
            found.setdefault(group.expert, []).append(group)
    return {number: (pair[0], pair[1]) for number, pair in found.items()}


def expert_of(block: nn.Module, group: InputGroup) -> Expert:
    """Return the module of the expert that an input group belongs to."""
    module = block.get_submodule(group.linears[0].rpartition(".")[0])
    assert isinstance(module, Expert)
    return module


@dataclass(eq=False)
class ExpertSums:
    """Sums over tokens for one input group of one expert.

    Attributes:
        fisher: Per linear, the sum over tokens of (dL/dy)^2, float32, shape (out,).
        couplings: Per linear, the sketch of the Fisher matrix of its outputs.
        weights: Sum of (dL/dy)^2 over all outputs, of every token, float32, shape (tokens,), on the CPU.
    """

    fisher: dict[str, Tensor]
    couplings: dict[str, FisherSketch]
    weights: Tensor

    @property
    def tokens(self) -> int:
        """How many tokens chose the expert, and matter for the loss."""
        return int((self.weights > 0).sum())

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
        first_token: Index of the first token of the micro-batch under way, or of its piece, among those of all rows.
        next_token: The same of the next one; they come in order.
        sums: Per input group, in their order.
    """

    inputs: Tensor
    first_token: int
    next_token: int
    sums: dict[InputGroup, ExpertSums]


@contextmanager
def collect_experts(block: nn.Module, path: str, groups: Sequence[InputGroup], tokens: int) -> Iterator[ExpertInputs]:
    """Collect what gradients tell of experts while forward and backward passes run through a block.

    Args:
        block: A decoder block, its weights loaded.
        path: Module that holds the experts.
        groups: The experts' input groups; none where the block has no experts.
        tokens: Number of tokens of all calibration rows.

    Yields:
        The sums.
    """
    seen = ExpertInputs(torch.empty(0), 0, 0, {group: ExpertSums({}, {}, torch.zeros(tokens)) for group in groups})

    def keep_inputs(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():  # a backward pass will run this again
            return
        hidden = args[0].detach().float().cpu()
        if not len(seen.inputs):
            seen.inputs = torch.empty(tokens, hidden.shape[1])
        seen.first_token, seen.next_token = seen.next_token, seen.next_token + len(hidden)
        seen.inputs[seen.first_token : seen.next_token] = hidden

    with ExitStack() as hooks:
        if groups:
            hooks.enter_context(block.get_submodule(path).register_forward_pre_hook(keep_inputs))
        for group in groups:
            expert = expert_of(block, group)
            for name in group.linears:
                hook = _output_hook(seen, group, name, expert)
                hooks.enter_context(block.get_submodule(name).register_forward_hook(hook))
        yield seen


def _output_hook(seen: ExpertInputs, group: InputGroup, name: str, expert: Expert) -> Any:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        tokens = seen.first_token + expert.tokens
        output.register_hook(lambda gradient: seen.sums[group].see_gradient(name, gradient, tokens))

    return hook


def expert_statistics(
    block: nn.Module, groups: Sequence[InputGroup], seen: ExpertInputs, row_tokens: int, *, all_tokens: bool
) -> Iterator[tuple[InputGroup, int, InputStatistics]]:
    """Yield the statistics of experts, input group by input group, as if other input groups' had been collected.

    Args:
        block: The block, its weights loaded.
        groups: The experts' input groups.
        seen: What the backward pass collected of them.
        row_tokens: Tokens of a calibration row.
        all_tokens: Whether all tokens that did not choose an expert are added, not only as many as are missing.

    Yields:
        An input group, how many tokens chose its expert, and the statistics.
    """
    pairs = expert_stages(groups)
    means = [_mean_fishers(seen, [pair[position] for pair in pairs.values()]) for position in range(2)]
    for number, pair in pairs.items():
        chosen = seen.sums[pair[0]].tokens
        for position, group in enumerate(pair):
            neurons_of = expert_of(block, group).neurons if position else None
            sums = _statistics(block, group, seen, row_tokens, neurons_of, all_tokens=all_tokens, seed=number)
            own = seen.sums[group]
            for name, mean in zip(group.linears, means[position], strict=True):
                sums.fisher[name] = own.fisher[name] + mean if name in own.fisher else mean
                sums.couplings[name] = own.couplings.get(name) or FisherSketch(len(mean), mean.device)
            yield group, chosen, sums


def _statistics(
    block: nn.Module,
    group: InputGroup,
    seen: ExpertInputs,
    row_tokens: int,
    neurons_of: Callable[[Tensor], Tensor] | None,
    *,
    all_tokens: bool,
    seed: int,
) -> InputStatistics:
    # Gram matrices and token weights; what enters the group is the experts' common input, or what `neurons_of` makes of
    # it.
    linear: Any = block.get_submodule(group.linears[0])
    weights = seen.sums[group].weights
    weights = _with_others(weights, len(weights) if all_tokens else linear.in_features, seed=seed)
    sums = InputStatistics(linear.in_features, row_tokens, linear.weight.device)
    for half, of_half in zip(sums.halves, tokens_of_halves(0, len(weights), row_tokens), strict=True):
        tokens = of_half[weights[of_half] > 0]
        inputs = seen.inputs[tokens].to(linear.weight.device)
        with torch.no_grad():
            half.add(inputs if neurons_of is None else neurons_of(inputs), weights[tokens].to(linear.weight.device))
    sums.token_weights = [weights]
    return sums


def _mean_fishers(seen: ExpertInputs, groups: Sequence[InputGroup]) -> list[Tensor]:
    # Of each linear in its place in the input group: the mean over all tokens of all experts.
    reached = [group for group in groups if seen.sums[group].fisher]
    tokens = sum(seen.sums[group].tokens for group in reached)
    columns = zip(*([seen.sums[group].fisher[name] for name in group.linears] for group in reached), strict=True)
    return [torch.stack(column).sum(dim=0) / max(tokens, 1) for column in columns]


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
