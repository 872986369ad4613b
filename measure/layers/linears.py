"""One face for all linears of a block: modules of their own, stored turned or not, and the matrices of experts."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor, nn

from ...checkpoint.model.structure import BlockStructure, LinearPlace

__all__ = ["LinearView", "linear_of", "module_of"]


class LinearView(Protocol):
    """A linear as measuring and rounding see it."""

    @property
    def weight(self) -> Tensor:
        """Weight, shape (out, in), in the memory that the block computes with: what is copied into it counts."""

    @property
    def bias(self) -> Tensor | None:
        """Bias, shape (out,); None where there is none."""

    @property
    def in_features(self) -> int:
        """Number of input channels."""

    @property
    def out_features(self) -> int:
        """Number of output channels."""


class _PlacedLinear:
    """A linear whose weight is a part of a parameter, or lies turned in it."""

    def __init__(self, block: nn.Module, place: LinearPlace) -> None:
        self._block = block
        self._place = place

    @property
    def weight(self) -> Tensor:
        place, path = self._place, self._place.parameter.rpartition(".")
        weight: Tensor = getattr(self._block.get_submodule(path[0]), path[2]).data
        if place.expert is not None:
            weight = weight[place.expert]
        if place.turned:
            weight = weight.T
        return weight if place.rows is None else weight[place.rows[0] : place.rows[1]]

    @property
    def bias(self) -> Tensor | None:
        # Biases of experts join no stream with a target of its own, so nobody asks for them.
        module: Any = module_of(self._block, self._place)
        return None if self._place.expert is not None else module.bias

    @property
    def in_features(self) -> int:
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        return int(self.weight.shape[0])


def linear_of(block: nn.Module, structure: BlockStructure, name: str) -> LinearView:
    """Return a linear of a block.

    Args:
        block: A decoder block.
        structure: Its structure.
        name: The linear's name inside the block.
    """
    place = structure.places.get(name)
    if place is None or (place.expert is None and not place.turned):
        module: Any = block.get_submodule(name)
        return module  # type: ignore[no-any-return]
    return _PlacedLinear(block, place)


def module_of(block: nn.Module, place: LinearPlace) -> nn.Module:
    """Return the module that holds a linear's parameter."""
    return block.get_submodule(place.parameter.rpartition(".")[0])
