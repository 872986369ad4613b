"""Second moments that say how an error in a linear's weight will hurt: weighted Gram matrices, the diagonal Fisher.

The damage of an error dW is the mean over tokens of ``0.5 * sum_n (g_n dy_n)^2`` with g = dL/dy and dy = x dW. L is
the sum over all positions of v . logits, v being a random direction whose covariance is the Fisher matrix of the
logits, so that (g . dy)^2 is on average twice the KL divergence in nats that dy causes. It is taken apart as ``F_n *
w``: a Fisher weight of each output and a weight of each token, ``w = sum_n g_n^2`` scaled to mean 1, so that the
input's second moment becomes ``H = mean w x x^T``. Without w, tokens that hardly matter dominate H wherever their
activations are large, and the first token, which attention uses as a sink, does not count enough.
Source: the nearest Kronecker product, Van Loan and Pitsianis (1993), one step from the identity; GuidedQuant (Kim et
al., arXiv 2505.07004) weights by groups of outputs. How outputs act together is kept at low rank (``sketch``).

That sum takes tokens one by one, but the tokens of a sequence act together: attention adds up the values of many, and
with them their errors. Exact is the square of ``sum x dW g`` over a sequence, whose tokens have the gradient of weights
``X^T G``; a few random combinations of its columns are kept of every row, to tell how much more that is (``heldout``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.structure import BlockStructure
from ...linalg.hessian import random_signs
from ...linalg.sampling import subsample_tokens
from ..layers.linears import linear_of
from .sketch import FisherSketch

__all__ = [
    "COMBINATIONS",
    "GRAM_BLOCK",
    "InputStatistics",
    "WeightedGram",
    "collect",
    "tapped_inputs",
    "tapped_outputs",
    "tokens_of_halves",
]

GRAM_BLOCK = 256
"""Columns of a Gram matrix that are summed together; only blocks on and above the diagonal are."""

COMBINATIONS = 32
"""Random combinations of the outputs that a row's gradient of weights is kept for."""

_NO_INPUT = 1e-4
"""Inputs of at most this length, relative to the median token's, are taken for zero. Values of a token that many others
attend to, the first for example, are some hundredths as long as others."""

_NO_NORM = 0.05
"""The same of what a norm makes of the residual stream, which is about as long for all tokens (see ``normless``)."""


class WeightedGram:
    """The weighted mean of x x^T over tokens that arrive in micro-batches.

    Attributes:
        weight: Sum of the weights so far.
    """

    def __init__(self, width: int, device: torch.device) -> None:
        """Start from nothing.

        Args:
            width: Length K of x.
            device: Where the sums are kept.
        """
        self._upper = torch.zeros(width, width, device=device)
        self.weight = 0.0

    def add(self, inputs: Tensor, weights: Tensor) -> None:
        """Add tokens.

        Args:
            inputs: x, float32, shape (tokens, K).
            weights: Their weights, not negative, shape (tokens,).
        """
        self.add_scaled(inputs * weights.sqrt()[:, None], weights)

    def add_scaled(self, scaled: Tensor, weights: Tensor) -> None:
        """As ``add``, of inputs that are multiplied by the roots of their weights."""
        for first in range(0, scaled.shape[1], GRAM_BLOCK):
            block = scaled[:, first : first + GRAM_BLOCK]
            self._upper[first : first + GRAM_BLOCK, first:].addmm_(block.T, scaled[:, first:])
        self.weight += float(weights.sum())

    def mean(self) -> Tensor:
        """Return sum w x x^T / sum w, float32, shape (K, K); zero if all weights are. Ends the summing.

        It is symmetric to the bit, which sums of products need not be: kernels may add up x_i x_j and x_j x_i in
        different orders.
        """
        upper, self._upper = self._upper, torch.empty(0)
        for first in range(0, len(upper), GRAM_BLOCK):
            last = first + GRAM_BLOCK
            upper[last:, first:last] = upper[first:last, last:].T
            block = upper[first:last, first:last]
            block.copy_(block.triu() + block.triu(1).T)
        return upper.div_(self.weight) if self.weight > 0 else upper.zero_()


def tokens_of_halves(first_token: int, count: int, row_tokens: int) -> list[Tensor]:
    """Return which of some consecutive tokens belong to each half of the calibration rows: even rows, and odd ones.

    Args:
        first_token: Index of the first of them among the tokens of all rows.
        count: How many they are.
        row_tokens: Tokens of a row.

    Returns:
        For either half its tokens, counted from the first of them, int64, in order.
    """
    rows = torch.arange(first_token, first_token + count) // row_tokens
    return [(rows % 2 == parity).nonzero()[:, 0] for parity in range(2)]


class InputStatistics:
    """Sums over tokens for one input group. Tokens come in the order of the calibration rows, from the first of them.

    Tokens whose input is next to zero count nothing, as no error of a weight shows there, however large gradients are:
    they grow a thousandfold where a zero passes a norm (see ``normless``).

    Attributes:
        halves: Weighted mean of x x^T, x being the input group's common input, over every even row and every odd one.
        fisher: Per linear, the sum over tokens of (dL/dy)^2, float32, shape (out,), nats per squared unit
            of y.
        couplings: Per linear whose gradients were seen, the sketch of the Fisher matrix of its outputs.
        token_weights: Per micro-batch or piece of it, the weight of each token, float32, shape (tokens,), on the CPU:
            the sum of (dL/dy)^2 over all outputs of all linears, not scaled.
        row_gradients: Per half and row, X^T G Z with random signs Z over the root of their number, shape (K,
            ``COMBINATIONS``); added up over the linears. None of rows whose gradients were not seen as a whole.
        row_tokens: Tokens of a calibration row.
    """

    def __init__(self, width: int, row_tokens: int, device: torch.device, *, least_input: float = _NO_INPUT) -> None:
        """Start from nothing.

        Args:
            width: Length K of the input group's input.
            row_tokens: Tokens of a calibration row.
            device: Where the sums are kept.
            least_input: Length up to which an input is taken for zero, relative to the median token's.
        """
        self.halves = [WeightedGram(width, device) for _ in range(2)]
        self.fisher: dict[str, Tensor] = {}
        self.couplings: dict[str, FisherSketch] = {}
        self.token_weights: list[Tensor] = []
        self.row_gradients: tuple[list[Tensor], list[Tensor]] = ([], [])
        self.row_tokens = row_tokens
        self._least_input = least_input
        self._rng = torch.Generator().manual_seed(0)
        self._signs = torch.Generator().manual_seed(1)
        self._inputs: Tensor | None = None
        self._left_out: Tensor | None = None
        self._weights: Tensor | None = None
        self._together: Tensor | None = None

    def see_inputs(self, inputs: Tensor) -> None:
        """Take the inputs of a micro-batch, or of its next piece, shape (rows, tokens, K) or (rows * tokens, K).

        A micro-batch may come in pieces if the gradients of a piece's outputs are seen before the next piece's inputs.
        """
        if self._weights is not None:
            self.end_batch()
        self._inputs = inputs.detach().flatten(0, -2).float()
        lengths = torch.linalg.vector_norm(self._inputs, dim=1)
        zero = lengths <= self._least_input * lengths.median()
        # Of an input group that has no input at all, gradients still tell its outputs apart.
        self._left_out = zero if bool(zero.any()) and not bool(zero.all()) else None

    def see_gradient(self, linear: str, gradient: Tensor) -> None:
        """Take the gradients of one linear's outputs over the same micro-batch, shape (rows, tokens, out)."""
        flat = gradient.detach().flatten(0, -2).float()
        if self._left_out is not None:
            flat = flat.masked_fill(self._left_out[:, None], 0)
        if linear not in self.couplings:
            self.couplings[linear] = FisherSketch(flat.shape[1], flat.device)
        squares = flat.square()
        tokens = squares.sum(dim=1)
        self.see_sums(linear, squares.sum(dim=0), tokens)
        self.couplings[linear].add(flat, tokens)
        if len(flat) % self.row_tokens == 0:
            self._see_rows(flat)

    def _see_rows(self, gradients: Tensor) -> None:
        assert self._inputs is not None
        signs = random_signs(gradients.shape[1], COMBINATIONS, gradients.device, seed=self._signs)
        combined = gradients @ signs.div_(math.sqrt(COMBINATIONS))
        rows = (-1, self.row_tokens)
        together = self._inputs.unflatten(0, rows).mT @ combined.unflatten(0, rows)
        self._together = together if self._together is None else self._together + together

    def see_sums(self, linear: str, outputs: Tensor, tokens: Tensor) -> None:
        """Take the squared gradients of one linear's outputs, or their expectation, over the same micro-batch.

        Args:
            linear: Its name.
            outputs: Their sum over tokens, shape (out,).
            tokens: Their sum over outputs, shape (rows * tokens,).
        """
        self.fisher[linear] = self.fisher[linear] + outputs if linear in self.fisher else outputs
        self._weights = tokens if self._weights is None else self._weights + tokens

    def end_batch(self) -> None:
        """Add up the micro-batch: all its inputs and gradients have been seen."""
        assert self._inputs is not None
        assert self._weights is not None
        halves = tokens_of_halves(self.tokens, len(self._weights), self.row_tokens)
        for half, tokens in zip(self.halves, halves, strict=True):
            of_half = tokens.to(self._weights.device)
            kept, given = subsample_tokens(self._weights[of_half], self._rng)
            half.add_scaled(self._inputs[of_half[kept]].mul_(given.sqrt()[:, None]), given)
        if self._together is not None:
            for row, together in enumerate(self._together, self.tokens // self.row_tokens):
                self.row_gradients[row % 2].append(together)
        self.token_weights.append(self._weights.cpu())
        self._inputs = self._weights = self._together = None

    @property
    def tokens(self) -> int:
        """Number of tokens summed."""
        return sum(len(weights) for weights in self.token_weights)

    def scaled_weights(self) -> Tensor:
        """Return all token weights at mean 1, float32, shape (tokens summed,); all 1 where no gradient arrives."""
        weights = torch.cat(self.token_weights)
        mean = weights.mean()
        return weights / mean if mean > 0 else torch.ones_like(weights)


@contextmanager
def collect(block: nn.Module, structure: BlockStructure, row_tokens: int) -> Iterator[list[InputStatistics]]:
    """Collect statistics of every input group outside of experts while passes run through a block.

    Args:
        block: A decoder block, its weights loaded.
        structure: Its structure.
        row_tokens: Tokens of a calibration row.

    Yields:
        One ``InputStatistics`` an input group; the caller ends each micro-batch after its backward pass.
    """
    statistics = []
    with ExitStack() as hooks:
        for group in structure.plain_groups:
            first = linear_of(block, structure, group.first)
            least = _NO_NORM if group.reads_stream else _NO_INPUT
            sums = InputStatistics(first.in_features, row_tokens, first.weight.device, least_input=least)
            statistics.append(sums)
            hooks.enter_context(block.get_submodule(group.first).register_forward_pre_hook(_input_hook(sums)))
            for name in group.linears:
                hooks.enter_context(block.get_submodule(name).register_forward_hook(_output_hook(sums, name)))
        yield statistics


def _input_hook(sums: InputStatistics) -> Any:
    def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if torch.is_grad_enabled():  # else a backward pass will run this again
            sums.see_inputs(args[0])

    return hook


def _output_hook(sums: InputStatistics, name: str) -> Any:
    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        output.register_hook(lambda gradient: sums.see_gradient(name, gradient))

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

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(block.get_submodule(name).register_forward_pre_hook(tap(name), with_kwargs=True))
        yield taps


@contextmanager
def tapped_outputs(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep the latest output of submodules while the block runs; of several outputs the first.

    Args:
        block: A decoder block.
        names: Submodules of it.

    Yields:
        Output by submodule name, overwritten at every forward.
    """
    taps: dict[str, Tensor] = {}

    def tap(name: str) -> Any:
        def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Any) -> None:
            taps[name] = output[0] if isinstance(output, tuple) else output

        return hook

    with ExitStack() as hooks:
        for name in names:
            hooks.enter_context(block.get_submodule(name).register_forward_hook(tap(name)))
        yield taps
