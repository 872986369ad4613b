"""The experts of a block, watched while Transformers' own forward runs through them.

Transformers keeps all experts of a block in a few tensors, experts first, and multiplies the tokens of one expert after
another with its slices. Their activations, biases, clamps and orders of rows differ from family to family; none of that
needs to be known here, as it is seen which slice is multiplied with what.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...checkpoint.model.structure import BlockStructure, InputGroup

__all__ = ["ExpertProduct", "expert_pairs", "hold_forward", "neurons_of_expert", "watched_experts"]

_PRODUCTS = ("linear", "matmul", "__matmul__", "mm")
_VIEWS = ("t", "transpose", "to", "contiguous", "T", "mT", "__get__")


@dataclass(frozen=True, slots=True, eq=False)
class ExpertProduct:
    """One expert's tokens multiplied by one of its matrices.

    Attributes:
        parameter: Name of the parameter inside the experts' module.
        expert: Number of the expert.
        tokens: Which of the module's tokens they are, int64, shape (chosen,).
        inputs: Shape (chosen, in).
        output: Shape (chosen, out), before any bias.
    """

    parameter: str
    expert: int
    tokens: Tensor
    inputs: Tensor
    output: Tensor


class _Watch(TorchFunctionMode):
    """Reports the products of one call of an experts' module, in their order."""

    def __init__(self, parameters: Mapping[int, str], hidden: Tensor, see: Callable[[ExpertProduct], None]) -> None:
        super().__init__()
        self._parameters = parameters
        self._hidden = hidden
        self._see = see
        self._slices: dict[int, tuple[str, int]] = {}
        self._kept: list[Tensor] = []  # ids mean something as long as the tensors live
        self._tokens = torch.empty(0, dtype=torch.int64)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            self._see_index(args[0], args[1], output)
        elif name in _PRODUCTS and len(args) > 1:
            self._see_product(args[0], args[1], output)
        elif name in _VIEWS and args and id(args[0]) in self._slices and isinstance(output, Tensor):
            self._keep(output, *self._slices[id(args[0])])
        return output

    def _see_index(self, source: Tensor, index: Any, output: Any) -> None:
        if source is self._hidden and isinstance(index, Tensor):
            self._tokens = index
        elif id(source) in self._parameters and isinstance(output, Tensor) and output.ndim == source.ndim - 1:
            self._keep(output, self._parameters[id(source)], int(index))

    def _see_product(self, first: Any, second: Any, output: Tensor) -> None:
        for weight, inputs in ((second, first), (first, second)):
            if id(weight) in self._slices:
                self._see(ExpertProduct(*self._slices[id(weight)], self._tokens, inputs, output))

    def _keep(self, tensor: Tensor, parameter: str, expert: int) -> None:
        self._slices[id(tensor)] = (parameter, expert)
        self._kept.append(tensor)


@contextmanager
def hold_forward(module: Any, forward: Callable[..., Any]) -> Iterator[None]:
    """Have a module run another forward while the context lasts."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


@contextmanager
def watched_experts(module: Any, see: Callable[[ExpertProduct], None]) -> Iterator[None]:
    """Report every product of an experts' module while its block runs.

    Args:
        module: Holds the experts of a block, called with the tokens' hidden states first, shape (tokens, in).
        see: Called for every product, in the order of computation.
    """
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        with _Watch(_matrices(module), hidden, see):
            return forward(*args, **kwargs)

    with hold_forward(module, run):
        yield


def neurons_of_expert(module: Any, expert: int, last: str, hidden: Tensor) -> Tensor:
    """Return what an expert's last matrix reads for some tokens, shape (tokens, neurons).

    Args:
        module: Holds the experts of a block.
        expert: Number of the expert.
        last: Name of the parameter of the last matrix.
        hidden: Hidden states, shape (tokens, in).
    """

    class _Reached(Exception):
        pass

    found: list[Tensor] = []

    def see(product: ExpertProduct) -> None:
        if product.parameter == last:
            found.append(product.inputs)
            raise _Reached

    chosen = torch.full((len(hidden), 1), expert, dtype=torch.int64, device=hidden.device)
    weights = torch.ones(len(hidden), 1, dtype=hidden.dtype, device=hidden.device)
    try:
        with _Watch(_matrices(module), hidden, see):
            module.forward(hidden, chosen, weights)
    except _Reached:
        return found[0]
    return hidden.new_empty(0, getattr(module, last).shape[-1])  # no tokens


def _matrices(module: Any) -> dict[int, str]:
    return {id(each): name for name, each in module.named_parameters(recurse=False) if each.ndim > 2}


def expert_pairs(structure: BlockStructure) -> Iterator[tuple[str, InputGroup, InputGroup]]:
    """Yield of each expert its module, the group that makes its neurons, and the group that reads them.

    Args:
        structure: The block's structure.
    """
    found: dict[tuple[str, int], list[InputGroup]] = {}
    for group in structure.groups:
        if group.expert is not None:
            module = structure.places[group.first].parameter.rpartition(".")[0]
            found.setdefault((module, group.expert), []).append(group)
    for (module, _), (neurons, output) in found.items():
        yield module, neurons, output
