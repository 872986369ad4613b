"""Work of passes through a decoder block.

A product of T x K by K x N takes 2 T K N operations. Of all else in a block, the number of passes over its elements was
read off Transformers' Llama.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...linalg.work import Elements, Products, Work
from ...measure.model.batches import MICRO_BATCH_TOKENS
from .attention import Attention
from .shapes import BlockShape, GroupShape

__all__ = ["Tokens", "pass_backward", "pass_forward", "product", "products", "read_weights"]

_OF_STREAM, _OF_GROUP = 16, 3
"""Operations on every element of a token's hidden state in a block (norms, sums, copies), and of the inputs and outputs
of a group (activations, rotations)."""

_BACKWARD = 3
"""The same with the backward pass, relative."""

_OF_READ_WEIGHTS = 3
"""Operations on every weight that is read: its values are checked and cast."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """Rows of text.

    Attributes:
        rows: Their number.
        row_tokens: Tokens of each.
    """

    rows: int
    row_tokens: int

    @property
    def all(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.row_tokens


def pass_forward(block: BlockShape, hidden: int, tokens: Tokens, dtype: torch.dtype = torch.float32) -> Work:
    """Return one forward pass of all rows through a block."""
    work = _operations(block, hidden, tokens.all) + Attention.work(block, tokens.rows, tokens.row_tokens, dtype=dtype)
    for group, count in block.groups:
        work += products(group, tokens.all, dtype) * count
    return work


def pass_backward(block: BlockShape, hidden: int, tokens: Tokens) -> Work:
    """Return a forward and a backward pass, which makes gradients of inputs and of no weights."""
    work = _operations(block, hidden, tokens.all) * _BACKWARD
    work += Attention.work(block, tokens.rows, tokens.row_tokens, backward=True)
    for group, count in block.groups:
        back = sum((product(group.share * tokens.all, each, group.inputs) for each in group.outputs), Work())
        work += (products(group, tokens.all) + back) * count
    return work


def product(tokens: float, inner: int, columns: int, dtype: torch.dtype = torch.float32) -> Work:
    """Return the product of tokens and a matrix of shape (inner, columns), a micro-batch at a time."""
    return Products.work(min(tokens, MICRO_BATCH_TOKENS), inner, columns, dtype) * (
        tokens / min(tokens, MICRO_BATCH_TOKENS)
    )


def products(group: GroupShape, tokens: int, dtype: torch.dtype = torch.float32) -> Work:
    """Return the products of a group, of all tokens of which its share goes through it."""
    return sum((product(group.share * tokens, group.inputs, each, dtype) for each in group.outputs), Work())


def _operations(block: BlockShape, hidden: int, tokens: int) -> Work:
    of_groups = sum(count * group.share * (group.inputs + sum(group.outputs)) for group, count in block.groups)
    return Elements.work(tokens * (_OF_STREAM * hidden + _OF_GROUP * of_groups))


def read_weights(weights: int) -> Work:
    """Return what reading weights of the original takes."""
    return Elements.work(_OF_READ_WEIGHTS * weights)
