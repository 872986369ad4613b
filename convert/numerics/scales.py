"""Factors for groups of weights, and the gradient of a loss with respect to their logarithms."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.structure import BlockStructure, LinearPlace
from ...measure.layers.experts import ExpertProduct, watched_experts
from ...measure.layers.linears import LinearView, linear_of

__all__ = ["Factors", "GroupScales", "Groups"]


@dataclass(frozen=True, slots=True, eq=False)
class Groups:
    """Which weights of a linear share factors: each is multiplied by that of its input and that of its output.

    Attributes:
        inputs: Group of each input feature, int64, shape (K,), on the CPU.
        outputs: Group of each output feature, int64, shape (out,), on the CPU; None for no factors of outputs.
    """

    inputs: Tensor
    outputs: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """Factors of a linear's groups.

    Attributes:
        inputs: Of groups of inputs, float32, shape (groups,), on the CPU.
        outputs: Of groups of outputs, the same; None where there are none.
    """

    inputs: Tensor
    outputs: Tensor | None = None


class GroupScales:
    """Factors of groups of a model's linears, and the gradient of a loss with respect to their logarithms.

    Attributes:
        logs: Logarithms of the factors, float32, shape (all groups,), on the CPU.
        gradient: What backward passes have added up to, for ``logs``, of which it is the ``grad``.
    """

    def __init__(self, groups: Mapping[str, Groups], device: torch.device) -> None:
        """Start with factors of 1.

        Args:
            groups: Of each linear, by full name.
            device: Where the linears run.
        """
        self._inputs: dict[str, _Features] = {}
        self._outputs: dict[str, _Features] = {}
        first = 0
        for name, own in groups.items():
            for found, of_features in ((self._inputs, own.inputs), (self._outputs, own.outputs)):
                if of_features is not None:
                    count = int(of_features.max()) + 1
                    found[name] = _Features(of_features, slice(first, first + count))
                    first += count
        self._device = device
        self.logs = torch.zeros(first, requires_grad=True)
        self.gradient = self.logs.grad = torch.zeros(first)

    def factors(self) -> dict[str, Factors]:
        """Return the factors of each linear."""
        known = self.logs.detach().exp()
        return {
            name: Factors(known[own.place], known[self._outputs[name].place] if name in self._outputs else None)
            for name, own in self._inputs.items()
        }

    @contextmanager
    def applied(self, block: nn.Module, structure: BlockStructure, linears: Mapping[str, str]) -> Iterator[None]:
        """Scale what enters and leaves the linears of a block; a backward pass in this context adds to the gradient.

        Args:
            block: A decoder block whose weights go when the context ends: those of experts are scaled themselves.
            structure: Its structure.
            linears: Full names of its linears, by those in the block; those without groups are left alone.
        """
        experts: dict[str, list[tuple[LinearView, LinearPlace, str]]] = {}
        with ExitStack() as hooks:
            for inner, name in linears.items():
                if name not in self._inputs:
                    continue
                place = structure.places.get(inner)
                if place is None or place.expert is None:
                    module = block.get_submodule(inner)
                    hooks.enter_context(module.register_forward_pre_hook(self._input_hook(name)))
                    if name in self._outputs:
                        hooks.enter_context(module.register_forward_hook(self._output_hook(name)))
                else:
                    linear = linear_of(block, structure, inner)
                    linear.weight.mul_(self._of(self._inputs[name]))
                    if name in self._outputs:
                        linear.weight.mul_(self._of(self._outputs[name])[:, None])
                    experts.setdefault(place.parameter.rpartition(".")[0], []).append((linear, place, name))
            for path, own in experts.items():
                see = partial(self._see_product, path, own)
                hooks.enter_context(watched_experts(block.get_submodule(path), see))
            yield

    def _of(self, features: _Features) -> Tensor:
        # The factor of each feature.
        return self.logs.detach()[features.place].exp()[features.groups].to(self._device)

    def _add(self, features: _Features, gradient: Tensor, values: Tensor) -> None:
        # The gradient at scaled values, and these; or the same divided and multiplied by the factors.
        of_features = (gradient * values).flatten(0, -2).sum(dim=0)
        # On the CPU, where sums have an order.
        self.gradient[features.place].index_add_(0, features.groups, of_features.cpu())

    def _see_product(
        self, path: str, linears: Sequence[tuple[LinearView, LinearPlace, str]], product: ExpertProduct
    ) -> None:
        if not product.output.requires_grad:
            return
        inputs, outputs = product.inputs.detach(), product.output.detach()

        def hook(gradient: Tensor) -> None:
            for linear, place, name in linears:
                if (place.parameter, place.expert) == (f"{path}.{product.parameter}", product.expert):
                    own = slice(*(place.rows or (0, gradient.shape[1])))
                    self._add(self._inputs[name], gradient[:, own] @ linear.weight, inputs)
                    if name in self._outputs:
                        self._add(self._outputs[name], gradient[:, own], outputs[:, own])

        product.output.register_hook(hook)

    def _input_hook(self, name: str) -> Any:
        return lambda _module, args: (self._scaled(self._inputs[name], args[0]), *args[1:])

    def _output_hook(self, name: str) -> Any:
        def hook(module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            bias = getattr(module, "bias", None)
            scaled = self._scaled(self._outputs[name], output if bias is None else output - bias)
            return scaled if bias is None else scaled + bias

        return hook

    def _scaled(self, features: _Features, values: Tensor) -> Tensor:
        scaled = values * self._of(features)
        if scaled.requires_grad:
            seen = scaled.detach()
            scaled.register_hook(lambda gradient: self._add(features, gradient, seen))
        return scaled


@dataclass(frozen=True, slots=True, eq=False)
class _Features:
    """Inputs or outputs of a linear: the group of each, and where the groups' logarithms stand."""

    groups: Tensor
    place: slice
