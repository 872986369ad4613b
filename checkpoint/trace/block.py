"""The structure of a decoder block, read from a recording of one forward pass on the meta device.

What a linear reads, whether its output joins the residual stream, and whether it chooses experts follows from the
operations before and after it; names play no part in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..model.structure import BlockStructure, InputGroup, LinearPlace
from .flow import Flow, Product
from .joins import StreamReading, read_stream
from .norms import read_norms
from .recording import Recording, record

__all__ = ["read_structure", "trace_block"]

_CHOICES = {"topk", "sort", "argmax"}
"""Operations that choose the largest of some scores."""


def trace_block(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> BlockStructure:
    """Return the structure of a decoder block.

    A matrix that multiplies in another way than that of a linear that is called once, or of stacked experts, is in no
    input group.

    Args:
        block: The block, in evaluation mode; its weights may be on the meta device.
        args: What the model calls it with, tensors on the meta device: hidden states first.
        kwargs: The same, by name.
    """
    return read_structure(block, record(block, block.forward, args, kwargs))


def read_structure(block: nn.Module, recording: Recording) -> BlockStructure:
    """Return the structure of a decoder block from the recording of a forward pass."""
    flow = Flow(recording)
    routers = tuple(product for product in flow.products if _chooses(product, flow) or _is_gate(product))
    used = Counter(product.parameter for product in flow.products)
    once = [product for product in flow.products if product not in routers and used[product.parameter] == 1]
    linears = [linear for product in once if (linear := _linear(product, flow)) is not None]
    choices = {router.out_features for router in routers}
    stacked = [_Matrix(product, product.output) for product in once if _is_stacked(product, choices)]
    stream = read_stream(flow, {linear.output: linear.product.path for linear in linears})
    groups = [_group(members, stream) for members in _grouped(linears, flow, stream)]
    for path in dict.fromkeys(matrix.product.path for matrix in stacked):
        own = [matrix for matrix in stacked if matrix.product.path == path]
        groups += _expert_groups(_grouped(own, flow, stream), stream)
    return BlockStructure(
        groups=tuple(groups),
        places=dict(place for matrix in [*linears, *stacked] for place in _places(matrix.product)),
        routers=tuple(dict.fromkeys(product.path for product in routers)),
        experts=tuple(dict.fromkeys(matrix.product.path for matrix in stacked)),
        norms=read_norms(block, flow),
    )


@dataclass(frozen=True, slots=True)
class _Matrix:
    """A matrix that can be quantized.

    Attributes:
        product: What it multiplies.
        output: Number of the value that its module returns; of an expert's matrix, that comes out of the product.
    """

    product: Product
    output: int


def _chooses(product: Product, flow: Flow) -> bool:
    operations = flow.recording.operations
    return any(operations[index].name in _CHOICES for index in flow.after(product.output))


def _is_gate(product: Product) -> bool:
    # One number a token, as the gate of shared experts has it.
    return len(product.shape) == 2 and product.out_features == 1


def _is_stacked(product: Product, choices: set[int]) -> bool:
    # One matrix an expert: one is picked, or all work on what a router has sorted.
    return len(product.shape) == 3 and (product.picked or product.shape[0] in choices)


def _linear(product: Product, flow: Flow) -> _Matrix | None:
    # The product as that of a module, if that does nothing else and is called once, on its first argument.
    recording = flow.recording
    calls = [call for call in recording.calls if call.module == product.path]
    if product.parameter != f"{product.path}.weight" or len(product.shape) != 2 or len(calls) != 1:
        return None
    (call,) = calls
    if product.operation not in call.operations or flow.root(call.inputs[0]) != flow.root(product.reads):
        return None
    others = [recording.operations[index] for index in call.operations if index != product.operation]
    plain = all(flow.keeps(each) or (each.name == "add" and len(flow.depending(each)) == 1) for each in others)
    return _Matrix(product, call.outputs[0]) if plain and len(call.outputs) == 1 else None


def _grouped(matrices: Sequence[_Matrix], flow: Flow, stream: StreamReading) -> list[list[_Matrix]]:
    # Of one input, those of which two meet, element by element, before anything mixes tokens.
    reached = {matrix: set(flow.after(matrix.output, pointwise=True)) for matrix in matrices}
    groups: list[list[_Matrix]] = []
    for matrix in matrices:
        for group in groups:
            if any(_belong(matrix, other, reached[matrix] & reached[other], flow, stream) for other in group):
                group.append(matrix)
                break
        else:
            groups.append([matrix])
    return groups


def _belong(matrix: _Matrix, other: _Matrix, both: set[int], flow: Flow, stream: StreamReading) -> bool:
    if flow.root(matrix.product.reads) != flow.root(other.product.reads):
        return False
    if matrix.product.path in stream.joins or other.product.path in stream.joins:
        return False
    sizes = {flow.size(matrix.output), flow.size(other.output)}
    return any(
        each.pointwise and len(set(flow.depending(each))) > 1 and {flow.size(each.outputs[0])} == sizes
        for each in (flow.recording.operations[index] for index in both)
    )


def _group(members: Sequence[_Matrix], stream: StreamReading) -> InputGroup:
    paths = tuple(matrix.product.path for matrix in members)
    reads_stream = members[0].product.reads in stream.normed
    join = stream.joins.get(paths[0])
    if join is None:
        return InputGroup(paths, reads_stream=reads_stream)
    return InputGroup(
        paths,
        adds=join.norm or join.linear,
        normed=join.norm is not None,
        reads_stream=reads_stream,
        scale=join.scale,
    )


def _expert_groups(groups: Sequence[Sequence[_Matrix]], stream: StreamReading) -> Iterator[InputGroup]:
    for expert in range(groups[0][0].product.shape[0]):
        for members in groups:
            names = tuple(_expert_name(matrix.product, expert) for matrix in members)
            yield InputGroup(names, expert=expert, reads_stream=members[0].product.reads in stream.normed)


def _places(product: Product) -> Iterator[tuple[str, LinearPlace]]:
    if len(product.shape) == 2:
        yield product.path, LinearPlace(product.parameter, turned=product.turned)
        return
    for expert in range(product.shape[0]):
        yield _expert_name(product, expert), LinearPlace(product.parameter, expert, turned=product.turned)


def _expert_name(product: Product, expert: int) -> str:
    return f"{product.path}.{expert}.{product.parameter.rpartition('.')[2]}"
