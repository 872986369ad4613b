"""Rounding onto ggml's types with error feedback.

ggml's own encoder chooses the scales of a block of 32 or 256 input features, as it does for llama.cpp; what it is given
differs: the weights of a block have first taken over the errors of all blocks before it. Inside the block the codes are
then chosen anew, each weight answering to the errors of those before it, in all types that code every weight for
itself; the others keep ggml's codes. So every type that ggml can encode is served, and llama.cpp reads the result.

Legend: W is the transpose of a Hugging Face weight, shape (K, out); H = mean x x^T, shape (K, K); H = R R^T with R
upper triangular; D = W - Q, what rounding changes. With S a block of rows, its target is
``T = W_S + R_SS^-T sum_{blocks B before} R_BS^T D_B``, its error ``E = R_SS^T (T - Q)``, and the sum of E^2 over all
blocks is exactly tr(D^T H D). Source: GPTQ (arXiv 2210.17323), with blocks in the place of single rows where codes
stand for several weights, and the factor of H in the place of that of its inverse (see ``bpwise.linalg.hessian``).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .blocks import GRID_TYPES, Blocks, repack, unpack
from .kernels import Bytes, GgmlType, decode, encode

__all__ = ["ENCODING", "expected_errors", "round_to_type"]

ENCODING = torch.device("cpu")
"""Where ggml's encoder is, and with it all that waits for it, whatever the device of the weights."""


def round_to_type(weight: Tensor, upper: Tensor, kind: GgmlType, *, threads: int = 1) -> Bytes:
    """Round one linear.

    Inside a block ggml weighs the squared errors of input feature k by R_kk^2: what an error costs after feedback.

    Args:
        weight: The weight to represent, float32, shape (K, out).
        upper: R, rows in the order of the input features, float32, shape (K, K).
        kind: A quantized type; K must be a whole number of its blocks.
        threads: Threads that ggml's encoder splits the outputs over.

    Returns:
        Encoded rows, one an output, uint8, shape (out, row_bytes).

    Raises:
        BpwiseError: ggml's library is not installed.
        NumericalError: A weight is not finite, or too large for the type.
        ShapeError: K is no whole number of blocks.
    """
    weight, upper = weight.to(ENCODING), upper.to(ENCODING)  # once, not block by block
    row_weights, outputs = weight.shape
    data = np.empty((outputs, kind.row_bytes(row_weights)), dtype=np.uint8)
    missed = torch.empty_like(weight)  # D
    for first in range(0, row_weights, kind.block_weights):
        rows = slice(first, first + kind.block_weights)
        root = upper[rows, rows]
        inverse = _inverse(root)
        target = weight[rows]
        if first:
            target = torch.addmm(target, inverse.T, upper[:first, rows].T @ missed[:first])
        encoded = encode(target.T.contiguous(), kind, root.diagonal().square(), threads=threads)
        if kind.name in GRID_TYPES:
            codes, _ = _fed_back(target[None], root[None], inverse[None], unpack(encoded, kind))
            encoded = repack(encoded, kind, codes[0].T.to(torch.uint8))
        data[:, first // kind.block_weights * kind.block_bytes :][:, : kind.block_bytes] = encoded
        torch.sub(weight[rows], decode(encoded, kind, threads=threads).T, out=missed[rows])
    return data


def expected_errors(weight: Tensor, upper: Tensor, kind: GgmlType) -> Tensor:
    """Estimate the error that ``round_to_type`` will leave, with one encoder call and all blocks at once.

    Each block is rounded as if it were the first. What it takes over from those before it moves its targets, but hardly
    makes them larger: it is left out.

    Args:
        weight: As in ``round_to_type``.
        upper: As in ``round_to_type``.
        kind: As in ``round_to_type``.

    Returns:
        dW^T H dW of every output, float32, shape (out,), on the CPU.

    Raises:
        BpwiseError: As ``round_to_type``.
    """
    weight = weight.to(ENCODING)
    encoded = encode(weight.T.contiguous(), kind, upper.diagonal().square().to(ENCODING))
    roots = _blocks(upper, kind.block_weights).to(ENCODING)
    targets = weight.unflatten(0, (len(roots), -1))
    if kind.name in GRID_TYPES:
        _, missed = _fed_back(targets, roots, _inverse(roots), unpack(encoded, kind))
        errors = roots.diagonal(dim1=1, dim2=2)[:, :, None] * missed
    else:
        errors = roots.mT @ (targets - decode(encoded, kind).T.view_as(targets))
    squares: Tensor = errors.square().sum(dim=(0, 1))
    return squares


def _blocks(upper: Tensor, length: int) -> Tensor:
    # The blocks of R on its diagonal, shape (blocks, S, S).
    places = [slice(first, first + length) for first in range(0, len(upper), length)]
    return torch.stack([upper[place, place] for place in places])


def _inverse(roots: Tensor) -> Tensor:
    identity = torch.eye(roots.shape[-1]).expand_as(roots)
    inverse: Tensor = torch.linalg.solve_triangular(roots, identity, upper=True)
    return inverse


def _fed_back(targets: Tensor, roots: Tensor, inverses: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    # Codes of blocks that do not see each other, and what each misses of the value that feedback inside the block has
    # moved it to, both float32, shape (blocks, S, out): input feature after input feature. Given ggml's scales; R_SS
    # and its inverse U have shape (blocks, S, S).
    def by_block(values: Tensor) -> Tensor:
        return values.T.repeat_interleave(blocks.sub_weights, dim=0).view_as(targets)

    scales = by_block(blocks.scales)
    steps = torch.where(scales == 0, 1.0, scales)  # a scale of 0 decodes to the offset, whatever the code
    levels = blocks.levels
    lowest, highest = float(levels[0]), len(levels) - 1.0
    even = bool((levels == levels[0] + torch.arange(len(levels))).all())
    middles = (levels[1:] + levels[:-1]) / 2
    # With errors in the place of GPTQ's e_j = error_j R_jj, few operations are left for every row.
    feedback = (roots.diagonal(dim1=1, dim2=2)[:, :, None] * inverses).mT.contiguous()
    errors, codes = torch.empty_like(targets), torch.empty_like(targets)
    for i, row in enumerate((targets - by_block(blocks.offsets)).split(1, dim=1)):
        moved = torch.baddbmm(row, feedback[:, i : i + 1, :i], errors[:, :i], alpha=-1) if i else row
        here = slice(i, i + 1)
        wanted = moved / steps[:, here]
        if even:
            codes[:, here] = wanted.sub_(lowest).round_().clamp_(0.0, highest)
            level = wanted + lowest
        else:
            nearest = torch.bucketize(wanted, middles)
            codes[:, here], level = nearest, levels[nearest]
        torch.addcmul(moved, scales[:, here], level, value=-1, out=errors[:, here])
    return codes, errors
