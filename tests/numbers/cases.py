"""Linears whose numbers are at the edge of arithmetic, formats or statistics, and what may come of them."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

INPUTS = 64
OUTPUTS = 24
TOKENS = 256

Change = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Case:
    """One linear.

    Attributes:
        inputs: x of every calibration token, float32, shape (tokens, K).
        weight: W, float32, shape (out, K).
        slopes: dL/dy of each output, up to a random sign, float32, shape (out,).
    """

    inputs: Tensor
    weight: Tensor
    slopes: Tensor = field(default_factory=lambda: torch.ones(OUTPUTS))


def plain(tokens: int = TOKENS) -> Case:
    """Correlated inputs of different powers."""
    rng = torch.Generator().manual_seed(0)
    mixing = torch.randn(INPUTS, INPUTS, generator=rng) * torch.logspace(0.5, -0.5, INPUTS)
    inputs = torch.randn(tokens, INPUTS, generator=rng) @ mixing
    return Case(inputs, torch.randn(OUTPUTS, INPUTS, generator=rng) * 0.05)


def changed(change: Change, tokens: int = TOKENS) -> Case:
    case = plain(tokens)
    change(case.inputs, case.weight)
    return case


def _one_direction(x: Tensor, _: Tensor) -> None:
    x.copy_(torch.outer(x[:, 0], x[0]))


def _one_value(x: Tensor, _: Tensor) -> None:
    x.copy_(x[:1].expand_as(x))


def _dead(x: Tensor, _: Tensor) -> None:
    x[:, ::4] = 0


def _constant(x: Tensor, _: Tensor) -> None:
    x[:, 5], x[:, 40] = 3.0, -50.0


def _twins(x: Tensor, _: Tensor) -> None:
    x[:, 32:] = x[:, :32]


def _outlier_channel(x: Tensor, _: Tensor) -> None:
    x[:, 11] *= 1e5


def _outlier_token(x: Tensor, _: Tensor) -> None:
    x[17] *= 1e5


def _tiny_inputs(x: Tensor, _: Tensor) -> None:
    x *= 1e-18


def _subnormal_inputs(x: Tensor, _: Tensor) -> None:
    x *= 1e-40


def _huge_inputs(x: Tensor, _: Tensor) -> None:
    x *= 1e15


def _no_inputs(x: Tensor, _: Tensor) -> None:
    x.zero_()


def _infinite(x: Tensor, _: Tensor) -> None:
    x[17, 3] = math.inf


def _overflowing(x: Tensor, _: Tensor) -> None:
    x[32:64] *= 1e25  # squares are beyond float32, in one sequence


def _zero_outputs(_: Tensor, w: Tensor) -> None:
    w[::3] = 0


def _zero_columns(_: Tensor, w: Tensor) -> None:
    w[:, 32:] = 0
    w[:, 3] = 0


def _zero_matrix(_: Tensor, w: Tensor) -> None:
    w.zero_()


def _subnormal_weights(_: Tensor, w: Tensor) -> None:
    w *= 1e-39


def _small_weights(_: Tensor, w: Tensor) -> None:
    w *= 1e-6


def _some_small_outputs(_: Tensor, w: Tensor) -> None:
    w[::2] *= 1e-6


def _large_output(_: Tensor, w: Tensor) -> None:
    w[3] *= 1e6


def _large_column(_: Tensor, w: Tensor) -> None:
    w[:, 7] *= 1e5


def _large_weights(_: Tensor, w: Tensor) -> None:
    w *= 6e4 / w.abs().max()


def _infinite_weight(_: Tensor, w: Tensor) -> None:
    w[3, 4] = -math.inf


def _on_a_grid(_: Tensor, w: Tensor) -> None:
    # Codes of 4 bits, the largest in every group of 32, and one scale that is a power of two.
    codes = torch.randint(-8, 8, w.shape, generator=torch.Generator().manual_seed(1))
    codes[:, ::8] = -8
    w.copy_(codes / 64)


def _one_output_counts() -> Tensor:
    slopes = torch.zeros(OUTPUTS)
    slopes[5] = 1.0
    return slopes


GOOD: dict[str, Case] = {
    "plain": plain(),
    "inputs of rank 1": changed(_one_direction),
    "all tokens alike": changed(_one_value),
    "dead channels": changed(_dead),
    "constant channels": changed(_constant),
    "channels twice": changed(_twins),
    "a channel of 1e5": changed(_outlier_channel),
    "a token of 1e5": changed(_outlier_token),
    "one sequence": plain(32),
    "one token": plain(1),
    "inputs of 1e-18": changed(_tiny_inputs),
    "inputs of 1e15": changed(_huge_inputs),
    "zero outputs": changed(_zero_outputs),
    "zero columns": changed(_zero_columns),
    "a zero matrix": changed(_zero_matrix),
    "subnormal weights": changed(_subnormal_weights),
    "weights of 1e-6": changed(_small_weights),
    "outputs of a millionth": changed(_some_small_outputs),
    "a column 1e5 times larger": changed(_large_column),
    "weights up to 60000": changed(_large_weights),
    "weights on a grid": changed(_on_a_grid),
    "one output counts": replace(plain(), slopes=_one_output_counts()),
    "gradients of 1e-15": replace(plain(), slopes=torch.full((OUTPUTS,), 1e-15)),
    "gradients of 1e12": replace(plain(), slopes=torch.full((OUTPUTS,), 1e12)),
    "no gradient arrives": replace(plain(), slopes=torch.zeros(OUTPUTS)),
}
"""Rounded with feedback: no worse than to nearest."""

WITHOUT_FEEDBACK: dict[str, Case] = {
    "no inputs": changed(_no_inputs),
    "subnormal inputs": changed(_subnormal_inputs),
}
"""Rounded to nearest, and reported so: no error of a weight shows."""

REFUSED: dict[str, tuple[Case, str]] = {
    "an output a million times larger": (changed(_large_output), r"l\.weight: values range from .* at most 65504"),
    "an infinite weight": (changed(_infinite_weight), r"l\.weight: values range from -inf"),
    "an infinite input": (changed(_infinite), r"l: NaN or infinity in the weighted inputs"),
    "inputs that overflow in one sequence": (changed(_overflowing), r"l: NaN or infinity in the weighted inputs"),
}
"""Ended with a sentence."""
