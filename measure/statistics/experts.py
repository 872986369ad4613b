"""Statistics of experts, each of which sees only the tokens that a router sends to it.

While the backward pass runs, only what the gradients tell is summed, and the common input of all experts is kept. Gram
matrices are made afterwards, of one expert at a time: those of all together would not fit into memory.

Calibration text may reach an expert so rarely that its Gram matrix has no full rank. So other tokens are added to those
that chose it, each with a tenth of their mean weight, until there are as many as the matrix has rows; or all of them.
And no expert is taken to matter nothing: one token more, of the mean gradient of all experts, is counted to each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from ...checkpoint.model.structure import BlockStructure, InputGroup
from ..layers.experts import ExpertProduct, expert_pairs, neurons_of_expert, watched_experts
from ..layers.linears import LinearView, linear_of
from .inputs import InputStatistics, tokens_of_halves
from .sketch import FisherSketch

__all__ = ["ExpertInputs", "ExpertSums", "collect_experts", "expert_statistics"]

_OTHERS_WEIGHT = 0.1
"""What a token that did not choose an expert counts for it, relative to the mean of those that did."""


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
def collect_experts(block: nn.Module, structure: BlockStructure, tokens: int) -> Iterator[ExpertInputs]:
    """Collect what gradients tell of experts while forward and backward passes run through a block.

    Args:
        block: A decoder block, its weights loaded.
        structure: Its structure; it may have no experts.
        tokens: Number of tokens of all calibration rows.

    Yields:
        The sums.
    """
    groups = [group for group in structure.groups if group.expert is not None]
    seen = ExpertInputs(torch.empty(0), 0, 0, {group: ExpertSums({}, {}, torch.zeros(tokens)) for group in groups})
    if not groups:
        yield seen
        return
    owners = {name: seen.sums[group] for group in groups for name in group.linears}
    (path,) = structure.experts
    linears: dict[tuple[str, int | None], list[str]] = {}
    for name in owners:
        place = structure.places[name]
        linears.setdefault((place.parameter.removeprefix(f"{path}."), place.expert), []).append(name)

    def see(product: ExpertProduct) -> None:
        if not product.output.requires_grad:
            return
        order = product.tokens.argsort()  # as they come in the rows, whatever the order of choices
        tokens_seen = seen.first_token + product.tokens[order]

        def hook(gradient: Tensor) -> None:
            for name in linears[product.parameter, product.expert]:
                first, last = structure.places[name].rows or (0, gradient.shape[1])
                owners[name].see_gradient(name, gradient[order, first:last], tokens_seen)

        product.output.register_hook(hook)

    def keep_inputs(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if not torch.is_grad_enabled():  # a backward pass will run this again
            return
        hidden = args[0].detach().float().cpu()
        if not len(seen.inputs):
            seen.inputs = torch.empty(tokens, hidden.shape[1])
        seen.first_token, seen.next_token = seen.next_token, seen.next_token + len(hidden)
        seen.inputs[seen.first_token : seen.next_token] = hidden

    module = block.get_submodule(path)
    with watched_experts(module, see), module.register_forward_pre_hook(keep_inputs):
        yield seen


def expert_statistics(
    block: nn.Module, structure: BlockStructure, seen: ExpertInputs, row_tokens: int, *, all_tokens: bool
) -> Iterator[tuple[InputGroup, int, InputStatistics]]:
    """Yield the statistics of experts, input group by input group, as if other input groups' had been collected.

    Args:
        block: The block, its weights loaded.
        structure: Its structure.
        seen: What the backward pass collected of them.
        row_tokens: Tokens of a calibration row.
        all_tokens: Whether all tokens that did not choose an expert are added, not only as many as are missing.

    Yields:
        An input group, how many tokens chose its expert, and the statistics.
    """
    pairs = list(expert_pairs(structure))
    means = [_mean_fishers(seen, groups) for groups in ([pair[1] for pair in pairs], [pair[2] for pair in pairs])]
    for path, neurons, output in pairs:
        number = neurons.expert
        assert number is not None
        chosen = seen.sums[neurons].tokens
        last = structure.places[output.first].parameter.removeprefix(f"{path}.")
        reads_neurons = partial(neurons_of_expert, block.get_submodule(path), number, last)
        for group, mean_fishers, neurons_of in ((neurons, means[0], None), (output, means[1], reads_neurons)):
            linear = linear_of(block, structure, group.first)
            sums = _statistics(linear, group, seen, row_tokens, neurons_of, all_tokens=all_tokens, seed=number)
            own = seen.sums[group]
            for name, mean in zip(group.linears, mean_fishers, strict=True):
                sums.fisher[name] = own.fisher[name] + mean if name in own.fisher else mean
                sums.couplings[name] = own.couplings.get(name) or FisherSketch(len(mean), mean.device)
            yield group, chosen, sums


def _statistics(
    linear: LinearView,
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
    weights = seen.sums[group].weights
    device = linear.weight.device
    weights = _with_others(weights, len(weights) if all_tokens else linear.in_features, seed=seed)
    sums = InputStatistics(linear.in_features, row_tokens, device)
    for half, of_half in zip(sums.halves, tokens_of_halves(0, len(weights), row_tokens), strict=True):
        tokens = of_half[weights[of_half] > 0]
        inputs = seen.inputs[tokens].to(device)
        with torch.no_grad():
            half.add(inputs if neurons_of is None else neurons_of(inputs), weights[tokens].to(device))
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
