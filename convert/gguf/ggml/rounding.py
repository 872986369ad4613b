"""Rounding onto ggml's types with error feedback.

ggml's own encoder chooses the scales of a block of 32 or 256 input features, as it does for llama.cpp; what it is given
differs: the weights of a block have first taken over the errors of all blocks before it. Inside the block the codes are
then chosen anew, each weight answering to the errors of those before it, in all types that code every weight for
itself; the others keep ggml's codes. So every type that ggml can encode is served, and llama.cpp reads the result.

Legend: W is the transpose of a Hugging Face weight, shape (K, out); H = mean x x^T, shape (K, K); H^-1 = U^T U with U
upper triangular. With S a block of rows, T its target, that is W_S less the feedback of the blocks before, and Q what
became of it, the block's error E solves ``U_SS^T E = T - Q``, a later block takes over ``U_S,later^T E``, and the sum
of E^2 over all blocks is exactly tr(dW^T H dW). Source: GPTQ (arXiv 2210.17323), with blocks in the place of single
rows where codes stand for several weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .blocks import EVEN_TYPES, GRID_TYPES, Blocks, repack, unpack
from .kernels import Bytes, GgmlType, decode, encode

__all__ = ["RoundedRows", "errors_on_types", "round_to_type", "rounded_together"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoundedRows:
    """A linear in one of ggml's types.

    Attributes:
        data: Encoded rows, one an output, uint8, shape (out, row_bytes).
        weight: What a reader makes of them, float32, shape (out, K), on the device of the weight given.
        errors: dW^T H dW of every output, float32, shape (out,).
    """

    data: Bytes
    weight: Tensor
    errors: Tensor


def round_to_type(weight: Tensor, upper: Tensor, kind: GgmlType, *, threads: int = 1) -> RoundedRows:
    """Round one linear.

    Inside a block ggml weighs the squared errors of input feature k by 1 / U_kk^2: what an error costs after feedback.

    Args:
        weight: The weight to represent, float32, shape (K, out).
        upper: U, rows in the order of the input features, float32, shape (K, K).
        kind: A quantized type; K must be a whole number of its blocks.
        threads: Threads that ggml's encoder splits the outputs over.

    Returns:
        The encoded linear.

    Raises:
        BpwiseError: ggml's library is not installed.
        NumericalError: A weight is not finite, or too large for the type.
        ShapeError: K is no whole number of blocks.
    """
    (rounded,) = _rounded_together(weight, upper, [kind], threads)
    return rounded


def rounded_together(kinds: Sequence[GgmlType]) -> list[list[GgmlType]]:
    """Return the types in the groups that ``errors_on_types`` takes; each is a task of its own."""
    groups: dict[tuple[int, str], list[GgmlType]] = {}
    for kind in kinds:
        groups.setdefault((kind.block_weights, "" if kind.name in EVEN_TYPES else kind.name), []).append(kind)
    return list(groups.values())


def errors_on_types(weight: Tensor, upper: Tensor, kinds: Sequence[GgmlType]) -> Tensor:
    """Round one linear once to every type and say what it costs.

    The types go through the features side by side: the steps are small, and calling them is most of their cost.

    Args:
        weight: As in ``round_to_type``.
        upper: As in ``round_to_type``.
        kinds: One group of ``rounded_together``; K is a whole number of their blocks.

    Returns:
        dW^T H dW of every output in every type, float32, shape (types, out).

    Raises:
        BpwiseError: As ``round_to_type``.
    """
    return torch.stack([rounded.errors for rounded in _rounded_together(weight, upper, kinds, threads=1)])


def _rounded_together(weight: Tensor, upper: Tensor, kinds: Sequence[GgmlType], threads: int) -> list[RoundedRows]:
    # Types with blocks of one length, side by side: all with even levels, or a single other one.
    row_weights, outputs = weight.shape
    data = [np.empty((outputs, kind.row_bytes(row_weights)), dtype=np.uint8) for kind in kinds]
    rounded = torch.empty(len(kinds), outputs, row_weights, device=weight.device)
    importance = upper.diagonal().square().reciprocal()
    errors = torch.empty(row_weights, len(kinds) * outputs, device=weight.device)
    length = kinds[0].block_weights
    for block in range(row_weights // length):
        rows = slice(block * length, (block + 1) * length)
        target = weight[rows].repeat(1, len(kinds))
        if block:
            target = torch.addmm(target, upper[: rows.start, rows].T, errors[: rows.start], alpha=-1)
        weights = target.unflatten(1, (len(kinds), outputs)).permute(1, 2, 0).contiguous().cpu()
        encoded = [
            encode(part, kind, importance[rows].cpu(), threads=threads)
            for part, kind in zip(weights, kinds, strict=True)
        ]
        if kinds[0].name in GRID_TYPES:
            taken = [unpack(part, kind) for part, kind in zip(encoded, kinds, strict=True)]
            codes = _codes_with_feedback(target, upper[rows, rows], taken).split(outputs)
            encoded = [repack(part, kind, own) for part, kind, own in zip(encoded, kinds, codes, strict=True)]
        for index, (part, kind) in enumerate(zip(encoded, kinds, strict=True)):
            data[index][:, block * kind.block_bytes : (block + 1) * kind.block_bytes] = part
            rounded[index, :, rows] = decode(part, kind, threads=threads).to(weight.device)
        missed = target - rounded[:, :, rows].flatten(0, 1).T
        errors[rows] = torch.linalg.solve_triangular(upper[rows, rows].T, missed, upper=False)
    squares = errors.square().sum(dim=0).view(len(kinds), outputs)
    return [RoundedRows(data=data[i], weight=rounded[i], errors=squares[i]) for i in range(len(kinds))]


def _codes_with_feedback(target: Tensor, upper: Tensor, blocks: Sequence[Blocks]) -> Tensor:
    # The codes of one block of every output in every type, shape (types * out, S): input feature after input feature.
    # With errors e_j U_jj few operations are left for every one of them.
    def column(values: Tensor, sub_weights: int) -> Tensor:
        return values.T.to(target.device).repeat_interleave(sub_weights, dim=0)

    scales = torch.cat([column(each.scales, each.sub_weights) for each in blocks], dim=1)
    offsets = torch.cat([column(each.offsets, each.sub_weights) for each in blocks], dim=1)
    steps = torch.where(scales == 0, 1.0, scales)  # a scale of 0 decodes to the offset, whatever the code
    nearest = _nearest_code(blocks, target)
    levels = blocks[0].levels.to(target.device)
    lowest = _over_outputs([float(each.levels[0]) for each in blocks], target)
    feedback = (upper / upper.diagonal()[:, None]).T.contiguous()
    errors, codes = torch.empty_like(target), torch.empty_like(target)
    for i, row in enumerate((target - offsets).unbind()):
        moved = torch.addmv(row, errors[:i].T, feedback[i, :i], alpha=-1) if i else row
        codes[i] = nearest(moved / steps[i])
        level = codes[i] + lowest if len(blocks) > 1 else levels[codes[i].long()]
        errors[i] = moved - scales[i] * level
    return codes.T.to(torch.uint8)


def _nearest_code(blocks: Sequence[Blocks], target: Tensor) -> Callable[[Tensor], Tensor]:
    # From values in steps of their scales, shape (types * out,), to the codes of the nearest levels.
    if len(blocks) == 1:
        levels = blocks[0].levels.to(target.device)
        middles = (levels[1:] + levels[:-1]) / 2
        return lambda values: torch.bucketize(values, middles).to(values)
    lowest = _over_outputs([float(each.levels[0]) for each in blocks], target)
    highest = _over_outputs([float(len(each.levels) - 1) for each in blocks], target)
    none = torch.zeros_like(lowest)
    return lambda values: torch.clamp(torch.round(values - lowest), none, highest)


def _over_outputs(values: Sequence[float], target: Tensor) -> Tensor:
    # One number a type as one a column of ``target``.
    return torch.tensor(values, device=target.device).repeat_interleave(target.shape[1] // len(values))
