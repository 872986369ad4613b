"""Backward passes through blocks that share keys and values.

A block that hands state to later ones has it as a further output; to those that read it, it is a further input with a
gradient of its own. Blocks are run backwards from the last one, so when a writer's turn comes all readers have given
their gradients.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["StateGradients"]


class StateGradients:
    """Gradients of state that has been read by blocks already run backwards, and not been reached yet itself.

    Attributes:
        pending: By micro-batch, key and position: what a resumed run goes on from.
    """

    def __init__(self, pending: dict[str, Tensor]) -> None:
        """Go on from gradients that an earlier run left."""
        self.pending = pending

    def backward(
        self,
        states: Sequence[UserDict[Any, tuple[Tensor, ...]]],
        forward: Callable[[], Tensor],
        gradient: Tensor,
        first_row: int,
    ) -> None:
        """Run one block forward and backward; gradients of leaves are left in them.

        Args:
            states: Objects through which blocks hand state on, as the forward pass through all blocks left them.
            forward: Runs the block.
            gradient: At its output.
            first_row: Names the micro-batch.
        """
        given = [
            {key: tuple(tensor.detach().requires_grad_() for tensor in tensors) for key, tensors in state.items()}
            for state in states
        ]
        for state, own in zip(states, given, strict=True):
            state.data = dict(own)
        outputs, gradients = [forward()], [gradient]
        for state, own in zip(states, given, strict=True):
            for key, tensors in state.items():
                if tensors is own.get(key):
                    continue
                for position, tensor in enumerate(tensors):
                    arrived = self.pending.pop(f"{first_row} {key} {position}", None)
                    if arrived is not None:
                        outputs.append(tensor)
                        gradients.append(arrived.to(tensor.device))
        torch.autograd.backward(outputs, gradients)
        for state, own in zip(states, given, strict=True):
            for key, tensors in own.items():
                for position, tensor in enumerate(tensors):
                    if tensor.grad is not None:
                        name = f"{first_row} {key} {position}"
                        before = self.pending.get(name)
                        added = tensor.grad.cpu()
                        self.pending[name] = added if before is None else before + added
            state.data = {key: tuple(tensor.detach() for tensor in tensors) for key, tensors in state.items()}
