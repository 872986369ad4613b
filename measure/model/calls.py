"""What decoder blocks are called with beside their hidden states, as the model's own forward prepares it.

Masks, rotary embeddings and positions depend on the shape of a micro-batch alone and are kept once. Where something
depends on the tokens too (per-layer embeddings), or blocks hand state to later ones (shared keys and values), every
micro-batch keeps its own.
"""

from __future__ import annotations

from collections import UserDict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

__all__ = ["Calls"]


class Calls:
    """Recorded calls of all blocks over all micro-batches of one stream of hidden states."""

    def __init__(self) -> None:
        """Start from nothing."""
        self._shared: dict[tuple[int, ...], list[tuple[list[Any], TreeSpec] | None]] = {}
        self._own: dict[tuple[int, int], tuple[list[Any], TreeSpec]] = {}
        self._same: dict[tuple[int, int], bool] = {}

    def begin(self) -> None:
        """Forget which tensors of the last micro-batch were the same as those kept; they may be gone."""
        self._same.clear()

    def record(self, index: int, blocks: int, first_row: int, hidden: Tensor, rest: tuple[Any, Any]) -> None:
        """Record one call.

        Args:
            index: Which block.
            blocks: Number of blocks.
            first_row: First row of the micro-batch.
            hidden: Its hidden states.
            rest: Further arguments, and keyword arguments.
        """
        leaves, form = tree_flatten(rest)
        kept = self._shared.setdefault(tuple(hidden.shape), [None] * blocks)
        before = kept[index]
        if before is None:
            kept[index] = (leaves, form)
            if any(map(_is_state, leaves)):
                self._own[first_row, index] = (leaves, form)
            return
        same = [self._is_same(ours, theirs) for ours, theirs in zip(before[0], leaves, strict=True)]
        if not all(same):
            merged = [ours if equal else own for ours, own, equal in zip(before[0], leaves, same, strict=True)]
            self._own[first_row, index] = (merged, form)

    def of(
        self, index: int, first_row: int, hidden_shape: tuple[int, ...], layer_input: Tensor | None = None
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return arguments and keyword arguments of one call; see ``record``.

        Args:
            index: Which block.
            first_row: First row of the micro-batch.
            hidden_shape: Shape of its hidden states, as the model has them.
            layer_input: Stands in for the block's own embeddings; see ``layer_input``.
        """
        leaves, form = self._recorded(index, first_row, hidden_shape)
        if layer_input is not None:
            own = self.layer_input(index, first_row, hidden_shape, layer_input.shape[-1])
            leaves = [layer_input if leaf is own else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(leaves, form)
        return args, kwargs

    def layer_input(self, index: int, first_row: int, hidden_shape: tuple[int, ...], width: int) -> Tensor | None:
        """Return the embeddings of its own that a block is called with, shape (rows, tokens, width); None without any.

        Args:
            index: Which block.
            first_row: First row of the micro-batch.
            hidden_shape: Shape of its hidden states, as the model has them.
            width: Their length.
        """
        shape = (*hidden_shape[-3:-1], width)
        leaves, _ = self._recorded(index, first_row, hidden_shape)
        tensors = (leaf for leaf in leaves if isinstance(leaf, Tensor))
        return next((leaf for leaf in tensors if leaf.shape == shape and leaf.is_floating_point()), None)

    def _recorded(self, index: int, first_row: int, hidden_shape: tuple[int, ...]) -> tuple[list[Any], TreeSpec]:
        recorded = self._own.get((first_row, index)) or self._shared[hidden_shape][index]
        assert recorded is not None
        return recorded

    @property
    def hands_state(self) -> bool:
        """Whether blocks hand state to later ones."""
        return bool(self.states(0))

    def states(self, first_row: int) -> list[UserDict[Any, Any]]:
        """Return the objects through which blocks hand state to later ones, of one micro-batch; usually none."""
        found = {
            id(leaf): leaf
            for (row, _), (leaves, _) in self._own.items()
            if row == first_row
            for leaf in leaves
            if _is_state(leaf)
        }
        return list(found.values())

    def _is_same(self, ours: Any, theirs: Any) -> bool:
        if _is_state(theirs):
            return False
        if not isinstance(ours, Tensor) or not isinstance(theirs, Tensor):
            return True  # rules, flags and numbers follow from the shape
        key = (id(ours), id(theirs))
        if key not in self._same:
            self._same[key] = ours is theirs or (ours.shape == theirs.shape and torch.equal(ours, theirs))
        return self._same[key]


def _is_state(leaf: Any) -> bool:
    return isinstance(leaf, UserDict)
