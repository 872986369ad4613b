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

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..convert.gguf.blocks import GRID_TYPES, Blocks, repack, unpack
from ..convert.gguf.ggml import Bytes, GgmlType, decode, encode

__all__ = ["RoundedRows", "round_to_type"]


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
    row_weights, outputs = weight.shape
    data = np.empty((outputs, kind.row_bytes(row_weights)), dtype=np.uint8)
    rounded = torch.empty(outputs, row_weights, device=weight.device)
    importance = upper.diagonal().square().reciprocal()
    errors = torch.empty_like(weight)
    for block in range(row_weights // kind.block_weights):
        rows = slice(block * kind.block_weights, (block + 1) * kind.block_weights)
        target = weight[rows]
        if block:
            target = torch.addmm(target, upper[: rows.start, rows].T, errors[: rows.start], alpha=-1)
        encoded = encode(target.T.contiguous().cpu(), kind, importance[rows].cpu(), threads=threads)
        if kind.name in GRID_TYPES:
            codes = _codes_with_feedback(target, upper[rows, rows], unpack(encoded, kind))
            encoded = repack(encoded, kind, codes)
        decoded = decode(encoded, kind, threads=threads).to(weight.device)
        data[:, block * kind.block_bytes : (block + 1) * kind.block_bytes] = encoded
        rounded[:, rows] = decoded
        errors[rows] = torch.linalg.solve_triangular(upper[rows, rows].T, target - decoded.T, upper=False)
    return RoundedRows(data=data, weight=rounded, errors=errors.square().sum(dim=0))


def _codes_with_feedback(target: Tensor, upper: Tensor, blocks: Blocks) -> Tensor:
    # The codes of one block of every output, shape (out, S): input feature after input feature. In steps of each
    # feature's scale, and with errors e_j U_jj, few operations are left for every one of them.
    scales = blocks.scales.T.to(target.device).repeat_interleave(blocks.sub_weights, dim=0)
    steps = torch.where(scales == 0, 1.0, scales)  # a scale of 0 decodes to the offset, whatever the code
    offsets = blocks.offsets.T.to(target.device).repeat_interleave(blocks.sub_weights, dim=0)
    levels = blocks.levels.to(target.device)
    middles = (levels[1:] + levels[:-1]) / 2
    feedback = (upper / upper.diagonal()[:, None]).T.contiguous()
    errors = torch.empty_like(target)
    codes = torch.empty(target.shape, dtype=torch.int64, device=target.device)
    for i, row in enumerate((target - offsets).unbind()):
        moved = torch.addmv(row, errors[:i].T, feedback[i, :i], alpha=-1) if i else row
        codes[i] = torch.bucketize(moved / steps[i], middles)
        errors[i] = moved - scales[i] * levels[codes[i]]
    return codes.T.to(torch.uint8)
