"""Parts of linears cut out of their weights and statistics, and put back.

ggml's types round a row times a factor as they round the row, so only what goes into the file knows of factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ....linalg.hessian import Hessian
from .rowmap import Part

__all__ = ["hessian_of", "joined_weight", "outputs_of", "part_of", "stored_part"]


def part_of(weight: Tensor, part: Part) -> Tensor:
    """Return a part of a weight with its columns in the file's order; the weight itself where that is all of it.

    Args:
        weight: Shape (K, out), the transpose of a Hugging Face weight.
        part: The part.

    Returns:
        Shape (K, outputs).
    """
    ordered = weight if part.columns is None else weight[_indices(part.columns, weight)]
    return outputs_of(ordered, part)


def stored_part(weight: Tensor, part: Part) -> Tensor:
    """Return the same times the factors that the file has its outputs with, in at least float32 if there are any."""
    own = part_of(weight, part)
    return own if part.factors is None else own * torch.from_numpy(part.factors).to(own.device)


def outputs_of(values: Tensor, part: Part) -> Tensor:
    """Return a part's outputs, over which the last dimension runs; the values themselves where these are all."""
    return values if part.holds_all(values.shape[-1]) else values[..., _indices(part.outputs, values)]


def hessian_of(hessian: Hessian, part: Part) -> Hessian:
    """Return the Hessian of inputs in the file's order of columns; the same where that is the linear's."""
    if part.columns is None:
        return hessian
    columns = _indices(part.columns, hessian.gram)
    return Hessian(hessian.gram.index_select(0, columns).index_select(1, columns))


def joined_weight(
    parts: Sequence[Part], values: Sequence[Tensor], shape: tuple[int, ...], original: Callable[[], Tensor]
) -> Tensor:
    """Return the Hugging Face weight that decoded parts of a linear make.

    Args:
        parts: The parts.
        values: Rows of each in the order of ``Part.outputs``, their columns in the file's order, floating
            point, shape (outputs, K).
        shape: Of the weight, (out, K).
        original: Returns the original's weight, for outputs that no part holds.
    """
    if len(parts) == 1 and parts[0].is_weight(shape[0]):
        return values[0]
    held = np.zeros(shape[0], dtype=bool)
    for part in parts:
        held[part.outputs] = True
    weight = torch.empty(shape) if held.all() else original().float()
    for part, rows in zip(parts, values, strict=True):
        _put_part_(weight, part, rows)
    return weight


def _put_part_(weight: Tensor, part: Part, values: Tensor) -> None:
    """Put the decoded rows of a part where they belong in a Hugging Face weight.

    Args:
        weight: Shape (out, K); changed.
        part: The part.
        values: Its rows in the order of ``part.outputs``, their columns in the file's order, shape (outputs, K).
    """
    if part.columns is not None:
        values = values[:, _indices(np.argsort(part.columns), values)]
    if part.factors is not None:
        values = values / torch.from_numpy(part.factors).to(values.device)[:, None]
    weight[_indices(part.outputs, weight)] = values.to(weight)


def _indices(order: NDArray[np.int64], beside: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(order)).to(beside.device)
