"""Which matrices read what a norm makes, where nothing else does: factors can be moved between the two then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from ..model.structure import LinearPlace
from .flow import Flow, Product
from .joins import is_norm

__all__ = ["read_norms", "weight_offset"]

_SHAPED = {"zeros_like", "empty_like", "ones_like", "full_like", "new_zeros", "new_empty", "new_ones", "new_full"}
"""Operations that look at the shape of a value alone."""


def read_norms(block: nn.Module, flow: Flow) -> dict[str, tuple[LinearPlace, ...]]:
    """Return the matrices that read a norm's output, routers and stacked experts among them, by the norm's path.

    Args:
        block: The block that was recorded. One with linears that the recording does not show has none: which of its
            experts work depends on values.
        flow: The recording's values.
    """
    called = {call.module for call in flow.recording.calls}
    linears = (name for name, module in block.named_modules() if isinstance(module, nn.Linear))
    if not called.issuperset(linears):
        return {}
    shapes = flow.recording.shapes
    times = Counter(call.module for call in flow.recording.calls)
    found = {}
    for call in flow.recording.calls:
        if is_norm(call, flow) and times[call.module] == 1:
            value = call.outputs[0]
            products = list(_readers(flow, value, shapes[value][-1]))
            read = {product.parameter for product in products if product is not None}
            if products and all(each in products for each in flow.products if each.parameter in read):
                places = [LinearPlace(each.parameter, turned=each.turned) for each in products if each is not None]
                if len(places) == len(products):
                    found[call.module] = tuple(dict.fromkeys(places))
    return found


def weight_offset(norm: nn.Module) -> float | None:
    """Return what a norm adds to its weight before it multiplies by it: 0, or 1 as Gemma's do.

    Args:
        norm: A module that normalizes one value; its weights may be on the meta device.

    Returns:
        None if its output is not proportional to one weight a channel, or it holds anything else but a bias.
    """
    names = {name for name, _ in norm.named_parameters()}
    if "weight" not in names or names - {"weight", "bias"} or list(norm.buffers()):
        return None
    made: Any = deepcopy(norm).to_empty(device="cpu").float()
    if made.weight.ndim != 1:
        return None
    values = torch.linspace(-1, 2, len(made.weight)).view(1, 1, -1)

    def output(weight: float) -> Tensor:
        for name, parameter in made.named_parameters():
            parameter.fill_(weight if name == "weight" else 0.0)
        result: Tensor = made(values)
        return result

    with torch.no_grad():
        for offset in (0.0, 1.0):
            try:
                none, once, twice = (output(weight - offset) for weight in (0.0, 1.0, 2.0))
            except Exception:  # of whatever type modelling code raises: it takes other values than these
                return None
            if not none.any() and once.any() and torch.allclose(2 * once, twice):
                return offset
    return None


def _readers(flow: Flow, value: int, channels: int) -> Iterator[Product | None]:
    # None stands for whatever is no product with a parameter.
    products = {product.operation: product for product in flow.products}
    waiting = [value]
    if value == flow.recording.output:
        yield None
    while waiting:
        for index, operation in flow.users(waiting.pop()):
            if index in products:
                yield products[index]
            elif operation.name in _SHAPED:
                continue
            elif flow.looks_at(operation) and all(flow.recording.shapes[x][-1] == channels for x in operation.outputs):
                waiting += operation.outputs
            else:
                yield None
