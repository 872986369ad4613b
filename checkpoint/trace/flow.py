"""Where the values of a recording come from and go to: views of one value, weights, and what they multiply."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from .recording import Operation, Recording

__all__ = ["Flow", "Product"]

_LOOKS = {"view", "_unsafe_view", "_reshape_alias", "reshape", "unsqueeze", "squeeze", "t", "transpose", "permute"}
_LOOKS |= {"expand", "clone", "_to_copy", "alias", "detach", "lift_fresh", "contiguous"}
"""Operations that give a value another shape, order of dimensions or dtype."""

_PICKS = {"slice", "select", "split", "split_with_sizes", "chunk", "unbind", "narrow", "index", "index_select"}
"""Operations that take a part of a value."""

_MATRICES = {"mm": (-2, -1), "bmm": (-2, -1), "addmm": (-2, -1), "baddbmm": (-2, -1), "linear": (0, 1)}
_GROUPED = {"_grouped_mm": (0, 1), "grouped_mm_fallback": (0, 1)}
_MATRICES |= _GROUPED
"""Products of matrices, and which of their inputs are the factors; in those of groups, each token meets one matrix of a
stack."""


@dataclass(frozen=True, slots=True)
class Product:
    """A parameter that multiplies something that depends on the block's input.

    Attributes:
        parameter: Its name.
        shape: Its shape.
        turned: Whether its last two dimensions are (in, out).
        picked: Whether it is one matrix of a stack, picked for a token.
        operation: Index of the product among the operations.
        reads: Number of the value that it multiplies.
        output: Number of the value that comes out.
    """

    parameter: str
    shape: tuple[int, ...]
    turned: bool
    picked: bool
    operation: int
    reads: int
    output: int

    @property
    def path(self) -> str:
        """Path of the module that owns the parameter."""
        return self.parameter.rpartition(".")[0]

    @property
    def out_features(self) -> int:
        """Number of its outputs."""
        return self.shape[-1] if self.turned else self.shape[-2]


@dataclass(frozen=True, slots=True)
class _Weight:
    """A view of a parameter.

    Attributes:
        number: Number of the value that is the parameter.
        swapped: Whether its last two dimensions were exchanged.
        picked: Whether it is a part.
    """

    number: int
    swapped: bool = False
    picked: bool = False


class Flow:
    """The values of a recording, and how they hang together.

    Attributes:
        recording: What was recorded.
        products: Weights that multiply values, in the order of computation.
    """

    def __init__(self, recording: Recording) -> None:
        """Follow all values from the first operation to the last."""
        self.recording = recording
        self.products: list[Product] = []
        self._roots: dict[int, int] = {}
        self._weights = {number: _Weight(number) for number in recording.parameters}
        self._dependent = {recording.input}
        self._users: defaultdict[int, list[int]] = defaultdict(list)
        for index, operation in enumerate(recording.operations):
            for value in operation.inputs:
                self._users[value].append(index)
            if self.depending(operation):
                self._dependent.update(operation.outputs)
                self._find_product(index, operation)
            self._follow_views(operation)

    def size(self, value: int) -> int:
        """Return the number of elements of a value."""
        return math.prod(self.recording.shapes[value])

    def root(self, value: int) -> int:
        """Return the value that another one is a view or a cast of, as a whole; itself if it is none."""
        return self._roots.get(value, value)

    def depends(self, value: int) -> bool:
        """Return whether a value depends on the block's input."""
        return value in self._dependent

    def depending(self, operation: Operation) -> list[int]:
        """Return those inputs of an operation that depend on the block's input."""
        return [value for value in operation.inputs if value in self._dependent]

    def looks_at(self, operation: Operation) -> bool:
        """Return whether what comes out is its first input in another form, or a part of it."""
        return operation.name in _LOOKS or operation.name in _PICKS

    def keeps(self, operation: Operation) -> bool:
        """Return whether what comes out is the whole of its first input in another form."""
        sliced = operation.name == "slice"  # often of all there is
        same_size = len(operation.outputs) == 1 and self.size(operation.outputs[0]) == self.size(operation.inputs[0])
        return (operation.name in _LOOKS or sliced) and same_size

    def multiplies(self, operation: Operation) -> bool:
        """Return whether it is a product of matrices."""
        return operation.name in _MATRICES

    def users(self, value: int) -> Iterator[tuple[int, Operation]]:
        """Yield the operations that take a value, and their indices."""
        for index in self._users[value]:
            yield index, self.recording.operations[index]

    def after(self, value: int, *, pointwise: bool = False) -> Iterator[int]:
        """Yield the indices of the operations that a value reaches before the next product of matrices.

        Args:
            value: Its number.
            pointwise: Whether to stop also at all that is not done to each element of its own: at whatever mixes
                tokens.
        """
        seen: set[int] = set()
        waiting = [value]
        while waiting:
            for index in self._users[waiting.pop()]:
                operation = self.recording.operations[index]
                mixes = not (operation.pointwise or self.looks_at(operation))
                if index not in seen and not self.multiplies(operation) and not (pointwise and mixes):
                    seen.add(index)
                    waiting += operation.outputs
                    yield index

    def _follow_views(self, operation: Operation) -> None:
        if not operation.inputs or not self.looks_at(operation):
            return
        source = operation.inputs[0]
        if self.keeps(operation):
            self._roots[operation.outputs[0]] = self.root(source)
        weight = self._weights.get(source)
        if weight is not None:
            swapped = weight.swapped ^ self._swaps_last_two(operation)
            picked = weight.picked or operation.name in _PICKS
            self._weights.update((value, _Weight(weight.number, swapped, picked)) for value in operation.outputs)

    def _swaps_last_two(self, operation: Operation) -> bool:
        dimensions = len(self.recording.shapes[operation.inputs[0]])
        order = [int(number) % dimensions for number in operation.numbers] if dimensions else []
        if operation.name == "transpose":
            return set(order) == {dimensions - 2, dimensions - 1}
        return operation.name == "t" or (operation.name == "permute" and order[-2:] == [dimensions - 1, dimensions - 2])

    def _find_product(self, index: int, operation: Operation) -> None:
        if operation.name not in _MATRICES:
            return
        first, second = (operation.inputs[place] for place in _MATRICES[operation.name])
        for factor, value in ((first, second), (second, first)):
            weight = self._weights.get(factor)
            if weight is not None and self.depends(value):
                shape = tuple(self.recording.shapes[weight.number])
                # A weight that comes second is (in, out) as it stands there; F.linear takes it as (out, in).
                turned = weight.swapped ^ (factor == second and operation.name != "linear")
                if self._is_matrix(factor, shape, swapped=weight.swapped):
                    name = self.recording.parameters[weight.number]
                    place = (index, value, operation.outputs[0])
                    picked = weight.picked or operation.name in _GROUPED
                    self.products.append(Product(name, shape, turned, picked, *place))
                return

    def _is_matrix(self, factor: int, shape: tuple[int, ...], *, swapped: bool) -> bool:
        # Whether a factor has the features of the parameter that it is a view of: grouped linears cut theirs.
        features = tuple(self.recording.shapes[factor][-2:])
        return features == (shape[:-3:-1] if swapped else shape[-2:])
