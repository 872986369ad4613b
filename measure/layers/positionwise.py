"""The parts of a block that see one position at a time, run over a few thousand positions at a time.

An MLP widens its input several times: over a whole row of 128k tokens that is gigabytes, a dozen times over in the
backward pass. Attention must see the row whole (``attention``), an MLP need not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoint.model.structure import BlockStructure
from .experts import hold_forward

__all__ = ["CHUNK_POSITIONS", "chunked_positionwise"]

CHUNK_POSITIONS = 4096
"""Positions that go through together, and up to which nothing is cut: twice a micro-batch of short rows."""


@contextmanager
def chunked_positionwise(block: nn.Module, structure: BlockStructure) -> Iterator[None]:
    """Cut long rows before they enter the parts of a block that do not mix positions.

    Forward and backward pass both work through one piece after another; the backward pass runs a piece forward again,
    with gradients, so that what hooks on linears see is one piece of a row after another.

    Args:
        block: A decoder block.
        structure: Its structure; the first input group belongs to what mixes positions, and so does what convolves.
    """
    places = structure.places
    inside = (places[each.first].parameter if each.first in places else each.first for each in structure.groups)
    mixing, *others = (name.partition(".")[0] for name in inside)
    found = (block.get_submodule(name) for name in sorted({*others} - {mixing}))
    modules: list[Any] = [each for each in found if not any(isinstance(inner, nn.Conv1d) for inner in each.modules())]
    with ExitStack() as stack:
        for module in modules:
            stack.enter_context(hold_forward(module, _in_pieces(module.forward)))
        yield


def _in_pieces(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.shape[:-1].numel() <= CHUNK_POSITIONS or args or kwargs:
            return forward(hidden_states, *args, **kwargs)
        return _Pieces.apply(forward, hidden_states)  # type: ignore[no-untyped-call] # torch has none

    return run


def _cut(hidden: Tensor) -> list[Tensor]:
    # Views, row after row, so that tokens come in the order in which a whole batch has them.
    return [piece[None] for row in hidden for piece in row.split(CHUNK_POSITIONS)]


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        ctx.forward = forward
        ctx.save_for_backward(hidden)
        output = torch.empty_like(hidden)
        for piece, result in zip(_cut(hidden), _cut(output), strict=True):
            result.copy_(forward(piece))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor]:
        (hidden,) = ctx.saved_tensors
        before = torch.empty_like(hidden)
        for piece, gradient, result in zip(_cut(hidden), _cut(gradients[0]), _cut(before), strict=True):
            own = piece.detach().requires_grad_()
            with torch.enable_grad():
                output = ctx.forward(own)
            result.copy_(torch.autograd.grad(output, own, gradient)[0])
        return None, before
